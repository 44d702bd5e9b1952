"""What PEFT saves beside plain factors, and how it is merged. Derived here, in float64."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pairs import State, drawn, drift, found, written

from gradscope.drift.result import DriftReport

START = "base_model.model."
SCALE = 1.5


def saved(folder: Path, state: State, **config: Any) -> str:
    """An adapter of rank 4 at alpha 6, of names without PEFT's prefix."""
    folder.mkdir(parents=True)
    written(folder / "adapter_model.safetensors", {START + n: t for n, t in state.items()})
    document = {"peft_type": "LORA", "r": 4, "lora_alpha": 6} | config
    (folder / "adapter_config.json").write_text(json.dumps(document))
    return str(folder)


def factors(module: str, rows: int, columns: int, seed: int = 1) -> State:
    return {f"{module}.lora_A.weight": 0.1 * drawn(4, columns, seed=seed),
            f"{module}.lora_B.weight": 0.1 * drawn(rows, 4, seed=seed + 50)}  # fmt: skip


def product(state: State, module: str) -> torch.Tensor:
    a, b = (state[f"{module}.lora_{f}.weight"].double() for f in "AB")
    return SCALE * b @ a


def base() -> State:
    return {"embed.weight": drawn(40, 24, seed=3), "fc.weight": drawn(48, 24, seed=4),
            "fc.bias": drawn(48, seed=5), "square.weight": drawn(24, 24, seed=6),
            "norm.weight": 1 + 0.1 * drawn(24, seed=7)}  # fmt: skip


def told(folder: Path, new: State, *adapters: str, before: State | None = None) -> DriftReport:
    given = before if before is not None else base()
    return drift(folder, given, given | new, expect="merge", adapter=adapters)


def expected(report: DriftReport) -> set[str]:
    return set(found(report)) & {"unexpected-change", "missing-change"}


def test_a_table_whose_own_weights_were_saved_with_its_factors(tmp_path: Path) -> None:
    a, b = 0.1 * drawn(4, 40), 0.1 * drawn(24, 4, seed=1)
    table = {"embed.base_layer.weight": base()["embed.weight"], "embed.lora_embedding_A": a,
             "embed.lora_embedding_B": b}  # fmt: skip
    adapter = saved(tmp_path / "a", table)
    change = SCALE * (b.double() @ a.double()).T
    right = {"embed.weight": (base()["embed.weight"].double() + change).float()}

    assert expected(told(tmp_path, right, adapter)) == set()
    assert expected(told(tmp_path, {}, adapter)) == {"missing-change"}
    twice = {"embed.weight": (base()["embed.weight"].double() + 2 * change).float()}
    assert expected(told(tmp_path, twice, adapter)) == {"unexpected-change"}


def test_a_table_that_grew_is_merged_from_what_was_saved_with_its_factors(tmp_path: Path) -> None:
    grown = torch.cat([base()["embed.weight"], drawn(3, 24, seed=8)])
    a, b = 0.1 * drawn(4, 43), 0.1 * drawn(24, 4, seed=1)
    adapter = saved(tmp_path / "a", {"embed.base_layer.weight": grown, "embed.lora_embedding_A": a,
                                     "embed.lora_embedding_B": b})  # fmt: skip
    right = (grown.double() + SCALE * (b.double() @ a.double()).T).float()

    report = told(tmp_path, {"embed.weight": right}, adapter)

    assert expected(report) == set()


@pytest.mark.parametrize("by_name", [False, True])
def test_tokens_that_were_trained_alone(tmp_path: Path, by_name: bool) -> None:
    rows = [31, 2, 7]
    trained = drawn(3, 24, seed=9)
    indices = {"embed": rows} if by_name else rows
    state = factors("fc", 48, 24) | {"embed.token_adapter.trainable_tokens_delta": trained}
    adapter = saved(tmp_path / "a", state, trainable_token_indices=indices)
    fc = {"fc.weight": (base()["fc.weight"].double() + product(state, "fc")).float()}
    table = base()["embed.weight"].clone()
    table[rows] = trained
    turned = base()["embed.weight"].clone()
    turned[sorted(rows)] = trained

    assert expected(told(tmp_path, fc | {"embed.weight": table}, adapter)) == set()
    assert expected(told(tmp_path, fc, adapter)) == {"missing-change"}
    wrong = told(tmp_path, fc | {"embed.weight": turned}, adapter)
    assert expected(wrong) == {"unexpected-change"}


def test_offsets_of_second_factors_are_merged_into_biases(tmp_path: Path) -> None:
    state = factors("fc", 48, 24) | {"fc.lora_B.bias": 0.2 * drawn(48, seed=11)}
    adapter = saved(tmp_path / "a", state, lora_bias=True)
    weight = {"fc.weight": (base()["fc.weight"].double() + product(state, "fc")).float()}
    bias = {"fc.bias": base()["fc.bias"] + SCALE * state["fc.lora_B.bias"]}

    assert expected(told(tmp_path, weight | bias, adapter)) == set()
    assert expected(told(tmp_path, weight, adapter)) == {"missing-change"}


@pytest.mark.parametrize("module", ["fc", "square"])
def test_magnitudes_are_of_outputs_however_a_weight_is_stored(tmp_path: Path, module: str) -> None:
    """Conv1D stores inputs first: its outputs are columns."""
    stored = base()[f"{module}.weight"]  # [in, out]
    into, out = stored.shape
    state = factors(module, out, into)
    state[f"{module}.lora_magnitude_vector"] = 1 + drawn(out, seed=12).abs()
    adapter = saved(tmp_path / "a", state, use_dora=True, fan_in_fan_out=True)
    v = stored.double().T + product(state, module)
    m = state[f"{module}.lora_magnitude_vector"].double()
    right = (m[:, None] * v / v.norm(dim=1, keepdim=True)).T.float()
    rows = (m.new_ones(into)[:, None] * v.T / v.T.norm(dim=1, keepdim=True)).float()

    assert expected(told(tmp_path, {f"{module}.weight": right}, adapter)) == set()
    wrong = told(tmp_path, {f"{module}.weight": rows}, adapter)
    assert expected(wrong) == {"unexpected-change"}


def test_magnitudes_of_a_table_are_of_its_dimensions(tmp_path: Path) -> None:
    a, b, m = 0.1 * drawn(4, 40), 0.1 * drawn(24, 4, seed=1), 1 + drawn(24, seed=2).abs()
    adapter = saved(tmp_path / "a", {"embed.lora_embedding_A": a, "embed.lora_embedding_B": b,
                                     "embed.lora_magnitude_vector": m}, use_dora=True)  # fmt: skip
    v = base()["embed.weight"].double() + SCALE * (b.double() @ a.double()).T
    right = (m.double() * v / v.norm(dim=0)).float()

    assert expected(told(tmp_path, {"embed.weight": right}, adapter)) == set()


def test_several_adapters_are_merged_in_turn(tmp_path: Path) -> None:
    one, two = factors("fc", 48, 24), factors("fc", 48, 24, seed=2) | factors("square", 24, 24)
    paths = saved(tmp_path / "a", one), saved(tmp_path / "b", two)
    w = base()["fc.weight"].double()
    both = {"fc.weight": (w + product(one, "fc") + product(two, "fc")).float(),
            "square.weight": (base()["square.weight"].double() + product(two, "square")).float()
            }  # fmt: skip
    first = {"fc.weight": (w + product(one, "fc")).float()}

    assert expected(told(tmp_path, both, *paths)) == set()
    assert expected(told(tmp_path, first, *paths)) == {"unexpected-change", "missing-change"}
    assert expected(told(tmp_path, both, paths[0])) == {"unexpected-change"}
    assert expected(told(tmp_path, first, paths[0])) == set()


def test_products_summed_in_float32_are_right_where_base_and_product_are_small(
    tmp_path: Path,
) -> None:
    """What was rounded are the terms of the product, which cancel."""
    state = {"fc.lora_A.weight": drawn(4, 24), "fc.lora_B.weight": drawn(48, 4, seed=1)}
    state["fc.lora_B.weight"][:, 2:] = -state["fc.lora_B.weight"][:, :2]
    state["fc.lora_A.weight"][2:] = state["fc.lora_A.weight"][:2] * (1 + 1e-3)
    adapter = saved(tmp_path / "a", state)
    before = base() | {"fc.weight": 1e-4 * base()["fc.weight"]}
    product32 = SCALE * (state["fc.lora_B.weight"] @ state["fc.lora_A.weight"])

    report = told(tmp_path, {"fc.weight": before["fc.weight"] + product32}, adapter, before=before)

    assert expected(report) == set()
    assert report.result is not None
    assert report.result.merges[0].residual_ulps < 1


def codes(state: State) -> State:
    """Matrices in float8, with a scale for each row."""
    made: State = {}
    for name, w in state.items():
        if w.ndim == 2 and name != "embed.weight":
            scale = w.abs().amax(1, keepdim=True) / 448
            made |= {name: (w / scale).to(torch.float8_e4m3fn), f"{name}_scale": scale}
        else:
            made[name] = w
    return made


@pytest.mark.parametrize(("share", "wrong"), [(1.0, set()), (0.0, {"missing-change"}),
                                              (2.0, {"unexpected-change"})])  # fmt: skip
def test_a_merge_that_was_put_into_codes_is_told_by_the_share_of_the_product(
    tmp_path: Path, share: float, wrong: set[str]
) -> None:
    big = {"fc.weight": 0.3 * drawn(512, 256), "square.weight": drawn(64, 64)}
    state = factors("fc", 512, 256)
    adapter = saved(tmp_path / "a", state)
    merged = (big["fc.weight"].double() + share * product(state, "fc")).float()
    paths = (written(tmp_path / "base.safetensors", big),
             written(tmp_path / "new.safetensors", codes(big | {"fc.weight": merged})))  # fmt: skip

    import gradscope

    report = gradscope.analyze_drift(*paths, expect="merge", adapter=adapter)

    assert expected(report) == wrong
    assert report.result is not None
    (merge,) = report.result.merges
    assert merge.share == pytest.approx(share, abs=0.02)


def test_a_product_below_the_noise_of_codes_is_not_judged(tmp_path: Path) -> None:
    big = {"fc.weight": drawn(64, 64), "square.weight": drawn(64, 64, seed=1)}
    state = {n: 0.03 * t for n, t in factors("fc", 64, 64).items()}
    adapter = saved(tmp_path / "a", state)
    merged = codes(big | {"fc.weight": (big["fc.weight"].double() + product(state, "fc")).float()})

    report = told(tmp_path, merged, adapter, before=big)

    (finding,) = [f for f in report.findings if f.name == "unexpected-change"]
    assert "below the noise of the codes" in finding.message


def test_another_base_is_one_finding(tmp_path: Path) -> None:
    state = factors("fc", 48, 24)
    adapter = saved(tmp_path / "a", state)
    other = {n: t + 0.05 * drawn(*t.shape, seed=20) for n, t in base().items()}
    merged = other | {"fc.weight": (other["fc.weight"].double() + product(state, "fc")).float()}

    report = told(tmp_path, merged, adapter)

    (finding,) = [f for f in report.findings if f.name == "unexpected-change"]
    assert "merged into another base" in finding.message
    assert expected(told(tmp_path, merged, adapter, before=other)) == set()


def test_an_initialisation_that_changes_the_base_is_named(tmp_path: Path) -> None:
    state = factors("fc", 48, 24)
    adapter = saved(tmp_path / "a", state, init_lora_weights="pissa_niter_4")
    residual = base() | {"fc.weight": base()["fc.weight"] - 0.1}
    right = {"fc.weight": (residual["fc.weight"].double() + product(state, "fc")).float()}

    (finding,) = [f for f in told(tmp_path, right, adapter).findings
                  if f.name == "unexpected-change"]  # fmt: skip

    assert "'pissa' changes the base as well" in finding.message
    assert expected(told(tmp_path, right, adapter, before=residual)) == set()


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("root", [False, True])
def test_stacked_experts_have_factors_of_their_own(
    tmp_path: Path, turned: bool, root: bool
) -> None:
    """``target_parameters``: A [experts * rank, in], B [out, rank * experts], nested wrappers."""
    experts, rank, width, inner = 3, 4, 24, 10
    a_up, b_up = 0.1 * drawn(experts * rank, width), 0.1 * drawn(2 * inner, rank * experts, seed=1)
    a_down, b_down = 0.1 * drawn(experts * rank, inner), 0.1 * drawn(width, rank * experts, seed=2)
    state = {"mlp.experts.base_layer.lora_A.weight": a_up,
             "mlp.experts.base_layer.lora_B.weight": b_up,
             "mlp.experts.lora_A.weight": a_down, "mlp.experts.lora_B.weight": b_down}  # fmt: skip
    parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    adapter = saved(tmp_path / "a", state, target_parameters=parameters, use_rslora=root)
    before = {"mlp.experts.gate_up_proj": drawn(experts, 2 * inner, width, seed=3),
              "mlp.experts.down_proj": drawn(experts, width, inner, seed=4)}  # fmt: skip
    scale = 6 / (rank**0.5 if root else rank)
    right = {}
    for (name, w), (a, b) in zip(before.items(), ((a_up, b_up), (a_down, b_down)), strict=True):
        new = w.double().clone()
        for e in range(experts):
            new[e] += scale * (b.double()[:, e::experts] @ a.double()[e * rank : (e + 1) * rank])
        right[name] = new.float()
    if turned:
        before, right = ({n: t.mT for n, t in s.items()} for s in (before, right))
    mixed = {n: t.flip(0) for n, t in right.items()}

    report = told(tmp_path, right, adapter, before=before)
    assert expected(report) == set()
    assert report.result is not None
    assert {m.name for m in report.result.merges} == set(before)
    assert expected(told(tmp_path, {}, adapter, before=before)) == {"missing-change"}
    assert expected(told(tmp_path, mixed, adapter, before=before)) == {"unexpected-change"}
