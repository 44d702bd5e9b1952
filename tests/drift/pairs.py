"""Pairs of checkpoints made for tests: a small healthy model, and what became of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from gradscope.drift.analysis import analyze_drift
from gradscope.drift.result import DriftReport, TensorDrift

State = dict[str, torch.Tensor]


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    """Standard normal numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def model(layers: int = 3, width: int = 32, seed: int = 0) -> State:
    """A stack of attention-like layers with gains and biases, and a table of tokens."""
    generator = torch.Generator().manual_seed(seed)

    def weight(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * shape[-1] ** -0.5

    state = {"embed_tokens.weight": weight(50, width)}
    for n in range(layers):
        for name in ("q_proj", "k_proj", "mlp"):
            state[f"layers.{n}.{name}.weight"] = weight(width, width)
        state[f"layers.{n}.mlp.bias"] = weight(width)
        state[f"layers.{n}.norm.weight"] = 1 + 0.1 * weight(width)
    return state


def written(path: Path, state: Mapping[str, torch.Tensor]) -> str:
    """The path of a state written as safetensors."""
    save_file({name: t.contiguous() for name, t in state.items()}, path)
    return str(path)


def drift(folder: Path, base: State, new: State, **options: Any) -> DriftReport:
    """The report of two states."""
    paths = written(folder / "base.safetensors", base), written(folder / "new.safetensors", new)
    return analyze_drift(*paths, **options)


def only(report: DriftReport, name: str) -> TensorDrift:
    """One tensor of a report."""
    assert report.result is not None
    (found,) = [t for t in report.result.tensors if t.name == name]
    return found


def found(report: DriftReport) -> dict[str, list[str]]:
    """Severities of the findings by rule."""
    names: dict[str, list[str]] = {}
    for finding in report.findings:
        names.setdefault(finding.name, []).append(str(finding.severity))
    return names
