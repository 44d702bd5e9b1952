"""What was said to have happened, held against what did: each with its healthy twin."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pairs import drawn, drift, found, model, written

import gradscope
from gradscope.errors import UsageError

Q = "layers.1.q_proj.weight"


def trained(*names: str) -> dict[str, torch.Tensor]:
    """The model with some tensors moved a little."""
    return model() | {n: model()[n] + 1e-3 * drawn(*model()[n].shape, seed=4) for n in names}


def test_what_is_frozen_may_not_change_by_a_bit(tmp_path: Path) -> None:
    new = model()
    new[Q].view(torch.int32)[0, 0] ^= 1
    options = {"expect_frozen": ["layers.1.*"], "ignore": ["weight-drift"]}

    assert found(drift(tmp_path, model(), new, **options)) == {"unexpected-change": ["high"]}
    assert found(drift(tmp_path, model(), model(), **options)) == {}
    assert found(drift(tmp_path, model(), new, expect_frozen=["layers.0.*"],
                       ignore=["weight-drift"])) == {}  # fmt: skip


def test_what_is_frozen_may_not_be_cast_or_lost(tmp_path: Path) -> None:
    cast = model() | {Q: model()[Q].half()}
    lost = {n: t for n, t in model().items() if n != Q}

    for new in (cast, lost):
        report = drift(tmp_path, model(), new, expect_frozen=["layers.*"])
        assert found(report)["unexpected-change"] == ["high"]


def test_what_should_change_may_not_be_the_base(tmp_path: Path) -> None:
    new = trained("layers.0.mlp.weight", "layers.0.mlp.bias")

    right = drift(tmp_path, model(), new, expect_changed=["layers.0.mlp.*"])
    wrong = drift(tmp_path, model(), new, expect_changed=["layers.[01].mlp.*"])

    assert "missing-change" not in found(right)
    (finding,) = [f for f in wrong.findings if f.name == "missing-change"]
    assert finding.message.startswith("2 of 4 tensors matching 'layers.[01].mlp.*'")
    assert (finding.severity, wrong.gate.exit_code) == ("high", 1)


def test_a_pattern_that_matches_nothing_is_a_wrong_request(tmp_path: Path) -> None:
    for option in ("expect_frozen", "expect_changed"):
        with pytest.raises(UsageError, match="matches no tensor's name"):
            drift(tmp_path, model(), model(), **{option: ["encoder.*"]})


def test_expectations_of_values_need_values(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="headers-only"):
        drift(tmp_path, model(), model(), expect="identical", headers_only=True)


def test_drift_by_role_has_a_limit(tmp_path: Path) -> None:
    new = model() | {Q: model()[Q] * 1.05}

    over = drift(tmp_path, model(), new, max_drift={"linear": 0.02})
    under = drift(tmp_path, model(), new, max_drift={"linear": 0.06, "embedding": 0.0})

    assert found(over)["unexpected-change"] == ["high"]
    assert "unexpected-change" not in found(under)
    assert found(drift(tmp_path, model(), new, max_drift={"*": 0.02}))["unexpected-change"]
    with pytest.raises(UsageError, match="a role is one of"):
        drift(tmp_path, model(), new, max_drift={"lineal": 0.1})


def test_identical_is_every_bit_and_type(tmp_path: Path) -> None:
    assert found(drift(tmp_path, model(), model(), expect="identical")) == {}
    wider = {n: t.double() for n, t in model().items()}
    assert found(drift(tmp_path, model(), wider, expect="identical")) == {
        "unexpected-change": ["high"]
    }


def test_a_conversion_may_cast_permute_and_transpose(tmp_path: Path) -> None:
    new = {n: t.bfloat16() for n, t in model().items()}
    moved = model() | {Q: model()[Q][torch.arange(31, -1, -1)], "layers.0.mlp.weight":
                       model()["layers.0.mlp.weight"].T}  # fmt: skip

    for healthy in (new, moved):
        assert found(drift(tmp_path, model(), healthy, expect="converted")) == {}
    new[Q] = (model()[Q] * (1 + 0.01 * drawn(32, 32))).bfloat16()
    assert found(drift(tmp_path, model(), new, expect="converted"))["unexpected-change"]


def quantised(bits: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """The model with its matrices in int8 codes of so many bits, a scale a row."""
    state: dict[str, torch.Tensor] = {}
    for name, t in model(seed=seed).items():
        if t.ndim == 2 and "embed" not in name:
            scale = t.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
            state |= {name: (t / scale).round().to(torch.int8), f"{name}_scale": scale}
        else:
            state[name] = t
    return state


def test_a_quantised_model_keeps_so_much_signal_a_bit(tmp_path: Path) -> None:
    assert found(drift(tmp_path, model(), quantised(8), expect="quantised")) == {}
    coarse = drift(tmp_path, model(), quantised(3), expect="quantised")
    assert found(coarse)["unexpected-change"] == ["high"]  # 8-bit codes of which three are used
    nothing = drift(tmp_path, model(), model(), expect="quantised")
    assert found(nothing) == {"missing-change": ["high"]}


def test_wrong_requests_are_told(tmp_path: Path) -> None:
    path = written(tmp_path / "m.safetensors", model())
    for options, said in (
        ({"expect": "merge"}, "needs --adapter"),
        ({"adapter": path}, "only used by"),
        ({"expect": "same"}, "one of identical, merge"),
        ({"max_drift": {"*": -1.0}}, "0 or more"),
    ):
        with pytest.raises(UsageError, match=said):
            gradscope.analyze_drift(path, path, **options)


@pytest.mark.parametrize(
    ("options", "left"),
    [
        ({}, 3),
        ({"expect_changed": ["layers.0.mlp.weight"]}, 2),
        ({"expect_changed": ["layers.0.mlp.weight", "embed*"]}, 1),
        ({"max_drift": {"linear": 0.5}}, 1),
        ({"max_drift": {"*": 0.5}}, 0),
        ({"max_drift": {"bias": 0.5}}, 3),
    ],
)
def test_what_was_said_to_change_is_not_found_to_have_moved(
    options: dict[str, Any], left: int, tmp_path: Path
) -> None:
    new = model()
    for name in ("layers.0.mlp.weight", "layers.1.q_proj.weight", "embed_tokens.weight"):
        new[name] = new[name] + 0.05 * new[name].std() * drawn(*new[name].shape, seed=3)

    report = drift(tmp_path, model(), new, **options)

    assert found(report) == ({"weight-drift": ["low"]} if left else {})
    assert [f.evidence["tensors"] for f in report.findings] == [left] * bool(left)


def test_a_change_that_was_not_wanted_is_one_finding(tmp_path: Path) -> None:
    new = model()
    new["layers.0.mlp.weight"] = 1.5 * new["layers.0.mlp.weight"]
    for options in ({"expect": "identical"}, {"expect_frozen": ["layers.*"]},
                    {"max_drift": {"linear": 0.1}}, {"expect": "converted"}):  # fmt: skip
        report = drift(tmp_path, model(), new, **options)
        assert found(report) == {"unexpected-change": ["high"]}
