"""Merged adapters, right and wrong. The expected weights are derived here, in float64."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from pairs import RANK, TARGETS, State, adapter, drawn, drift, found, model, products, written

from gradscope.drift.result import DriftReport, Merge
from gradscope.report.formats import Display, renderer


def merged(folder: Path, scale: float, dtype: torch.dtype = torch.float32) -> State:
    """The model with every product added, rounded to a type."""
    base = {n: t.to(dtype) for n, t in model().items()}
    new = {n: (base[n].double() + scale * p).to(dtype) for n, p in products(folder).items()}
    return base | new


def checked(folder: Path, new: State, dtype: torch.dtype = torch.float32) -> DriftReport:
    base = {n: t.to(dtype) for n, t in model().items()}
    return drift(folder, base, new, expect="merge", adapter=str(folder / "adapter"))


def expected(report: DriftReport) -> dict[str, list[str]]:
    """Findings of the rules about expectations."""
    kept = ("unexpected-change", "missing-change")
    return {name: s for name, s in found(report).items() if name in kept}


def merges(report: DriftReport) -> tuple[Merge, ...]:
    assert report.result is not None
    return report.result.merges


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("config", "scale"), [({}, 2.0), ({"use_rslora": True}, 4.0), ({"lora_alpha": 1}, 0.25)]
)
def test_a_right_merge_is_within_rounding(
    tmp_path: Path, dtype: torch.dtype, config: dict[str, Any], scale: float
) -> None:
    adapter(tmp_path, **config)

    report = checked(tmp_path, merged(tmp_path, scale, dtype), dtype)

    assert expected(report) == {}
    assert {m.scale for m in merges(report)} == {scale}
    assert all(m.residual_ulps <= m.max_ulps < 0.51 for m in merges(report))
    assert len(merges(report)) == 6


def test_rounding_is_uniform_within_half_a_step(tmp_path: Path) -> None:
    adapter(tmp_path)

    report = checked(tmp_path, merged(tmp_path, 2.0, torch.bfloat16), torch.bfloat16)

    assert all(m.residual_ulps == pytest.approx(12**-0.5, rel=0.15) for m in merges(report))


@pytest.mark.parametrize(("config", "told"), [({}, 2.0), ({"use_rslora": True}, 4.0)])
@pytest.mark.parametrize("times", [0.5, 2.0, -1.0])
def test_another_scale_is_told(
    tmp_path: Path, config: dict[str, Any], told: float, times: float
) -> None:
    adapter(tmp_path, **config)

    report = checked(tmp_path, merged(tmp_path, times * told))

    assert expected(report) == {"unexpected-change": ["high"]}
    assert all(m.fitted_scale == pytest.approx(times * told, rel=1e-4) for m in merges(report))
    assert f"a scale of {times * told:.4g}, not {told:.4g}" in report.findings[0].message


def test_a_merge_as_the_adapter_asks_is_no_finding_and_is_shown(tmp_path: Path) -> None:
    adapter(tmp_path)

    right, idle = checked(tmp_path, merged(tmp_path, 2.0)), checked(tmp_path, model())
    wrong = checked(tmp_path, merged(tmp_path, 1.0))

    assert (right.findings, right.gate.exit_code) == ((), 0)
    assert [f.name for f in wrong.findings] == ["unexpected-change"]
    texts = [str(renderer("table")(r, Display())) for r in (right, idle, wrong)]
    lines = [next(ln for ln in t.splitlines() if "s of the adapter:" in ln) for t in texts]
    said = (
        r"6 modules of the adapter: at most 0\.\d+ units in the last place \(rms\) from the merge"
    )
    assert re.fullmatch(said, lines[0].strip())
    assert lines[1].strip() == "6 modules of the adapter: 6 unchanged"
    far = float(lines[2].split("at most ")[1].split()[0].replace("e+", "e"))
    assert far == pytest.approx(max(m.residual_ulps or 0 for m in merges(wrong)), rel=1e-2)


def test_a_merge_that_did_nothing_is_told(tmp_path: Path) -> None:
    adapter(tmp_path)

    report = checked(tmp_path, model())

    assert expected(report) == {"missing-change": ["high"]}
    assert "6 of 6 modules" in report.findings[0].message
    cast = drift(tmp_path, model(), {n: t.half() for n, t in model().items()}, expect="merge",
                 adapter=str(tmp_path / "adapter"))  # fmt: skip
    assert expected(cast) == {"missing-change": ["high"]}


def test_an_adapter_that_does_nothing_is_merged_into_the_base(tmp_path: Path) -> None:
    zero = {f"base_model.model.layers.{n}.{t}.lora_B.weight": torch.zeros(32, RANK)
            for n in range(3) for t in TARGETS}  # fmt: skip
    adapter(tmp_path, zero)

    assert expected(checked(tmp_path, model())) == {}


def test_half_a_merge_and_another_adapter_are_told(tmp_path: Path) -> None:
    adapter(tmp_path)
    whole = merged(tmp_path, 2.0)
    half = whole | {n: model()[n] for n in whole if n.startswith("layers.2.")}
    other = model() | {"layers.0.mlp.weight": model()["layers.0.mlp.weight"] + 0.05 * drawn(32, 32)}

    assert expected(checked(tmp_path, half)) == {"missing-change": ["high"]}
    report = checked(tmp_path, whole | other)
    assert "unexpected-change" in expected(report)
    assert "not the adapter's" in " ".join(f.message for f in report.findings)


def test_what_the_adapter_does_not_name_must_stay(tmp_path: Path) -> None:
    adapter(tmp_path)
    new = merged(tmp_path, 2.0)
    new["layers.1.k_proj.weight"] = new["layers.1.k_proj.weight"] + 1e-3

    report = checked(tmp_path, new)

    assert expected(report) == {"unexpected-change": ["high"]}
    assert report.findings[0].subject == "layers.1.k_proj.weight"


def test_dora_is_merged_with_its_magnitudes(tmp_path: Path) -> None:
    magnitudes = {f"base_model.model.layers.{n}.{t}.lora_magnitude_vector":
                  1 + 0.1 * drawn(32, seed=n).abs() for n in range(3) for t in TARGETS}  # fmt: skip
    adapter(tmp_path, magnitudes, use_dora=True)
    plain = merged(tmp_path, 2.0)
    new = dict(plain)
    for name, m in magnitudes.items():
        weight = name.removeprefix("base_model.model.").rpartition(".")[0] + ".weight"
        v = model()[weight].double() + 2.0 * products(tmp_path)[weight]
        new[weight] = (m.double()[:, None] * v / v.norm(dim=1, keepdim=True)).float()

    assert expected(checked(tmp_path, new)) == {}
    assert expected(checked(tmp_path, plain)) == {"unexpected-change": ["high"]}


def test_a_weight_stored_the_other_way_round_is_merged_so(tmp_path: Path) -> None:
    adapter(tmp_path, fan_in_fan_out=True)
    new = model() | {n: (model()[n].double() + 2.0 * p.T).float()
                     for n, p in products(tmp_path).items()}  # fmt: skip

    assert expected(checked(tmp_path, new)) == {}


def test_a_convolution_is_merged_by_its_kernels(tmp_path: Path) -> None:
    base = {"conv.weight": drawn(8, 3, 3, 3), "conv.bias": drawn(8)}
    a, b = 0.1 * drawn(2, 3, 3, 3, seed=1), 0.1 * drawn(8, 2, 1, 1, seed=2)
    path = tmp_path / "adapter"
    path.mkdir()
    written(path / "adapter_model.safetensors", {
        "base_model.model.conv.lora_A.weight": a, "base_model.model.conv.lora_B.weight": b
    })  # fmt: skip
    (path / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 2}))
    new = base | {"conv.weight": base["conv.weight"] + torch.einsum(
        "orij,rckl->ockl", b, a)}  # fmt: skip

    report = drift(tmp_path, base, new, expect="merge", adapter=str(path))

    assert expected(report) == {}
    assert merges(report)[0].max_ulps < 3


def test_modules_saved_whole_replace_the_base(tmp_path: Path) -> None:
    saved = {"base_model.model.layers.0.norm.weight": 1 + 0.3 * drawn(32, seed=6)}
    adapter(tmp_path, saved)
    new = merged(tmp_path, 2.0)

    right = checked(tmp_path, new | {"layers.0.norm.weight": next(iter(saved.values()))})

    assert expected(right) == {}
    assert expected(checked(tmp_path, new)) == {"missing-change": ["high"]}


def test_modules_that_are_not_there_are_told(tmp_path: Path) -> None:
    adapter(tmp_path)
    new = merged(tmp_path, 2.0)
    adapter(tmp_path, {"base_model.model.head.lora_A.weight": drawn(RANK, 32),
                       "base_model.model.head.lora_B.weight": drawn(5, RANK)})  # fmt: skip

    report = checked(tmp_path, new)

    assert expected(report) == {"unexpected-change": ["high"]}
    assert "no weight of that name" in report.findings[0].message


def test_an_adapter_that_is_none_is_exit_3(tmp_path: Path) -> None:
    path = written(tmp_path / "other.safetensors", model())

    report = drift(tmp_path, model(), model(), expect="merge", adapter=path)

    assert report.gate.exit_code == 3
    assert "holds no adapter" in report.errors[0].message


@pytest.mark.filterwarnings("ignore::UserWarning")  # of PEFT, about models that are not the hub's
def test_peft_merges_as_is_expected(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="needs the extra `frameworks`")

    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q_proj, self.mlp = torch.nn.Linear(32, 32), torch.nn.Linear(32, 64)
            self.embed, self.conv = torch.nn.Embedding(20, 32), torch.nn.Conv1d(32, 8, 3)

    with_others = [*TARGETS, "embed", "conv"]
    for options in ({}, {"use_rslora": True}, {"use_dora": True}, {"lora_bias": True},
                    {"trainable_token_indices": {"embed": [7, 3]}},
                    {"target_modules": with_others},
                    {"target_modules": with_others, "use_dora": True}):  # fmt: skip
        torch.manual_seed(0)
        base = Layer()
        before = {n: t.clone() for n, t in base.state_dict().items()}
        config = peft.LoraConfig(
            **{"r": 4, "lora_alpha": 6, "target_modules": list(TARGETS), **options}
        )
        tuned = peft.get_peft_model(base, config)
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name or "embedding_A" in name or "tokens_delta" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        tuned.save_pretrained(tmp_path / "adapter")
        after = tuned.merge_and_unload().state_dict()

        report = drift(tmp_path, before, dict(after), expect="merge",
                       adapter=str(tmp_path / "adapter"))  # fmt: skip

        assert expected(report) == {}, options
        assert math.isclose(merges(report)[0].scale or 0, 3.0 if "use_rslora" in options else 1.5)
