"""What is said of dead and repeated units, wherever they lie and however many they are."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest

import gradscope
from gradscope.report.model import Finding
from gradscope.weights.result import TensorResult

from .checkpoints import Array, Tensor, bf16, gaussian, write


def examined(
    folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, object] | None = None
) -> tuple[list[Finding], dict[str, TensorResult]]:
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    report = gradscope.analyze_weights(write(folder / "model.safetensors", tensors))
    assert report.result is not None
    return list(report.findings), {t.name: t for t in report.result.tensors}


def told(findings: list[Finding], *names: str) -> list[tuple[str, str, str]]:
    """(severity, rule, subject) of findings, of some rules or all above info."""
    return [
        (f.severity.value, f.name, f.subject)
        for f in findings
        if (f.name in names if names else f.severity.rank > 0)
    ]


CASTS: dict[str, Callable[[Array], Tensor]] = {
    "F32": lambda x: x, "BF16": bf16, "F16": lambda x: x.astype(np.float16),
}  # fmt: skip


# -- a dead majority -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", CASTS)
@pytest.mark.parametrize(
    ("name", "shape", "dead"),
    [
        ("a.in_proj_weight", (384, 128), 256),
        ("features.0.weight", (64, 32, 3, 3), 44),
        ("l.weight", (64, 128), 63),
        ("l.weight", (1000, 64), 990),
        ("l.weight", (4, 300), 3),
    ],
)
@pytest.mark.parametrize("share", [5e-4, 1e-5, 0.0])
def test_a_dead_majority_is_one_finding(
    name: str, shape: tuple[int, ...], dead: int, share: float, dtype: str, tmp_path: Path
) -> None:
    x = gaussian(*shape)
    x[:dead] *= share
    findings, tensors = examined(tmp_path, {name: CASTS[dtype](x)})
    assert told(findings) == [("high", "dead-units", name)]
    units = tensors[name].units
    assert units is not None
    assert units.dead_rows == dead
    assert units.reference > 0.01


@pytest.mark.parametrize("shape", [(384, 128), (64, 32, 3, 3), (4, 300), (2, 600)])
@pytest.mark.parametrize("size", [30.0, 1e4])
def test_a_giant_among_the_living_makes_none_of_them_dead(
    shape: tuple[int, ...], size: float, tmp_path: Path
) -> None:
    x = gaussian(*shape)
    x[1] *= size
    findings, tensors = examined(tmp_path, {"l.weight": x})
    assert told(findings, "dead-units") == []
    assert tensors["l.weight"].units is not None


def test_far_elements_of_a_living_matrix_are_still_outliers(tmp_path: Path) -> None:
    x = gaussian(384, 128)
    x[:100] *= 5e-4  # 26 %
    x[300, 5] = 60.0
    findings, _ = examined(tmp_path, {"l.weight": x})
    expected = [("low", "outliers", "l.weight"), ("medium", "dead-units", "l.weight")]
    assert sorted(told(findings, "outliers", "dead-units")) == sorted(expected)


def test_a_damaged_value_in_a_dead_matrix_is_told_beside_it(tmp_path: Path) -> None:
    x = gaussian(384, 128)
    x[:256] *= 5e-4
    x[300, 5] = 1e30
    findings, _ = examined(tmp_path, {"l.weight": x})
    assert {name for _, name, _ in told(findings)} >= {"dead-units", "extreme-value"}


# -- the axis --------------------------------------------------------------------------------------


def conv1d(dead_outputs: int = 0, dead_inputs: int = 0) -> dict[str, Array]:
    """An MLP as GPT-2 stores it: [in, out]."""
    up, down = gaussian(64, 256), gaussian(256, 64, seed=1)
    up[:, :dead_outputs] = 0
    down[:dead_inputs] = 0
    return {
        "mlp.c_fc.weight": up, "mlp.c_fc.bias": gaussian(256, seed=2),
        "mlp.c_proj.weight": down, "mlp.c_proj.bias": gaussian(64, seed=3),
    }  # fmt: skip


def test_dead_outputs_of_conv1d_are_columns(tmp_path: Path) -> None:
    findings, tensors = examined(tmp_path, conv1d(dead_outputs=100))
    assert told(findings) == [("high", "dead-units", "mlp.c_fc.weight")]
    assert "100 of 256 columns are dead (39.1%): 0, 1, 2" in findings[0].message
    units = tensors["mlp.c_fc.weight"].units
    assert units is not None
    assert (units.axis, units.rows) == (1, 256)


def test_zero_inputs_of_conv1d_are_no_dead_units(tmp_path: Path) -> None:
    findings, _ = examined(tmp_path, conv1d(dead_inputs=120))
    assert told(findings, "dead-units", "high-sparsity") == []


@pytest.mark.parametrize("form", ["linear", "conv1d", "flax"])
def test_a_layer_is_judged_alike_in_every_form(form: str, tmp_path: Path) -> None:
    x, bias = gaussian(96, 48), gaussian(96, seed=1)
    x[:30] = 0
    x[50:70] = x[40]
    names = {"linear": ("l.weight", x), "conv1d": ("l.weight", x.T), "flax": ("l.kernel", x.T)}
    name, stored = names[form]
    tensors = {name: np.ascontiguousarray(stored), "l.bias": bias}
    findings, found = examined(tmp_path, tensors)
    expected = [("high", "dead-units", name), ("medium", "duplicate-units", name)]
    assert sorted(told(findings, "dead-units", "duplicate-units")) == sorted(expected)
    unit = "row" if form == "linear" else "column"
    assert any(f"{unit} 50 equals {unit} 40" in f.message for f in findings)
    units = found[name].units
    assert units is not None
    assert (units.dead_rows, units.duplicate_rows) == (30, 20)


def test_output_channels_of_a_transposed_convolution(tmp_path: Path) -> None:
    x = gaussian(32, 16, 4, 4)
    x[:, :6] = 0
    findings, _ = examined(tmp_path, {"up.weight": x, "up.bias": gaussian(16)})
    assert told(findings) == [("high", "dead-units", "up.weight")]
    assert "6 of 16 output channels are dead (37.5%)" in findings[0].message


# -- parts and heads -------------------------------------------------------------------------------


def test_a_dead_part_does_not_hide_among_parts_of_other_norms(tmp_path: Path) -> None:
    x = gaussian(384, 128)
    x[:256] *= 0.01
    x[128:180] *= 5e-4  # 41 % of the keys, 14 % of all
    findings, tensors = examined(tmp_path, {"a.in_proj_weight": x})
    assert told(findings, "dead-units") == [("high", "dead-units", "a.in_proj_weight")]
    message = next(f.message for f in findings if f.name == "dead-units")
    assert "52 of 384 rows are dead (13.5%): 52 of the 128 of k (0, 1, 2" in message
    units = tensors["a.in_proj_weight"].units
    assert units is not None
    assert units.parts is not None
    assert [(p.name, p.rows, p.dead_rows) for p in units.parts] == [
        ("q", 128, 0), ("k", 128, 52), ("v", 128, 0),
    ]  # fmt: skip


def test_parts_of_other_norms_are_healthy(tmp_path: Path) -> None:
    x = gaussian(384, 128)
    x[:256] *= 0.002
    findings, _ = examined(tmp_path, {"a.in_proj_weight": x})
    assert told(findings, "dead-units") == []


def test_dead_heads_are_named(tmp_path: Path) -> None:
    x, q = gaussian(384, 128), gaussian(128, 128, seed=1)
    x[256 + 32 : 256 + 64] = 0
    q[16:32] = q[96:112] = 0
    tensors = {"a.qkv.weight": x, "b.q_proj.weight": q}
    findings, _ = examined(tmp_path, tensors, {"num_attention_heads": 8, "hidden_size": 128})
    messages = {f.subject: f.message for f in findings if f.name == "dead-units"}
    assert messages["a.qkv.weight"].endswith("all of heads 2, 3 of 8)")
    assert messages["b.q_proj.weight"].endswith("all of heads 1, 6 of 8")


def test_a_head_with_a_living_unit_is_not_dead(tmp_path: Path) -> None:
    q = gaussian(128, 128)
    q[16:31] = 0
    config = {"num_attention_heads": 8, "hidden_size": 128}
    findings, _ = examined(tmp_path, {"b.q_proj.weight": q}, config)
    (message,) = (f.message for f in findings if f.name == "dead-units")
    assert "head" not in message


@pytest.mark.parametrize("turned", [False, True])
def test_a_dead_expert_is_as_grave_in_a_stack_as_alone(turned: bool, tmp_path: Path) -> None:
    x = gaussian(8, 96, 32)
    x[3] = 0
    down = gaussian(8, 32, 48, seed=1)
    stacks = {"mlp.experts.gate_up_proj": x, "mlp.experts.down_proj": down}
    if turned:
        stacks = {n: np.ascontiguousarray(t.transpose(0, 2, 1)) for n, t in stacks.items()}
    findings, tensors = examined(tmp_path, stacks)
    assert [t[0] for t in told(findings)] == ["high"]
    assert "expert 3" in next(f.message for f in findings if f.severity.value == "high")
    units = tensors["mlp.experts.gate_up_proj"].units
    assert units is not None
    assert units.parts is not None
    assert [part.dead_rows for part in units.parts] == [0, 0, 0, 96, 0, 0, 0, 0]
    assert units.parts[3].norm == 0
