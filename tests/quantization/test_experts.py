"""Experts of a quantised mixture are judged as those of any other, stacked or one by one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import gradscope

HELD = "layers.0.mlp.experts"


def int8(weights: list[Any]) -> dict[str, Any]:
    """bitsandbytes' layout, one by one."""
    made = {}
    for i, w in enumerate(weights):
        rows = w.abs().amax(1).clamp(min=1e-12)
        made[f"{HELD}.{i}.w1.weight"] = (w / rows[:, None] * 127).round().to(torch.int8)
        made[f"{HELD}.{i}.w1.SCB"] = rows
    return made


def fp8(weights: list[Any]) -> dict[str, Any]:
    """A scale an expert, one by one."""
    made = {}
    for i, w in enumerate(weights):
        scale = w.abs().max().clamp(min=1e-12) / 448
        made[f"{HELD}.{i}.w1.weight"] = (w / scale).to(torch.float8_e4m3fn)
        made[f"{HELD}.{i}.w1.weight_scale"] = scale.reshape(1)
    return made


def stacked_fp8(weights: list[Any]) -> dict[str, Any]:
    """A scale an expert, stacked."""
    whole = torch.stack(weights)
    scale = whole.abs().amax((1, 2)).clamp(min=1e-12) / 448
    codes = (whole / scale[:, None, None]).to(torch.float8_e4m3fn)
    return {f"{HELD}.w1": codes, f"{HELD}.w1_scale": scale}


FAULTY: dict[str, tuple[Callable[[list[Any]], object], list[tuple[str, str, str]]]] = {
    "sound": (lambda _: None, []),
    "dead": (lambda w: w[3].zero_(), [("high", "dead-expert", HELD)]),
    "copied": (lambda w: w[5].copy_(w[2]), [("medium", "dead-expert", f"{HELD}.5")]),
}


@pytest.mark.parametrize("form", [int8, fp8, stacked_fp8])
@pytest.mark.parametrize("fault", FAULTY)
def test_a_fault_of_quantised_experts_is_told_as_that_of_others(
    fault: str, form: Callable[[list[Any]], dict[str, Any]], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    weights = [torch.randn(64, 32) * 0.05 for _ in range(8)]
    spoil, expected = FAULTY[fault]
    spoil(weights)
    router = {"layers.0.mlp.gate.weight": torch.randn(8, 32)}
    save_file({**form(weights), **router}, str(tmp_path / "model.safetensors"))

    report = gradscope.analyze_weights(tmp_path / "model.safetensors")

    assert [(f.severity.value, f.name, f.subject) for f in report.findings] == expected
