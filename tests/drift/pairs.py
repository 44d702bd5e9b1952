"""Pairs of checkpoints made for tests: a small healthy model, and what became of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

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


def of_layers(*sources: int) -> State:
    """The model whose layers are those of the base."""
    base = model()
    kept = {n: t for n, t in base.items() if not n.startswith("layers.")}
    for layer, source in enumerate(sources):
        start = f"layers.{source}."
        of_source = {n.removeprefix(start): t for n, t in base.items() if n.startswith(start)}
        kept |= {f"layers.{layer}.{n}": t.clone() for n, t in of_source.items()}
    return kept


def walk(steps: int = 6) -> list[State]:
    """Checkpoints of a model that moves by a little noise each time."""
    states = [model()]
    for n in range(steps):
        states.append({k: t + 0.01 * t.std() * drawn(*t.shape, seed=100 + n)
                       for k, t in states[-1].items()})  # fmt: skip
    return states


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


# -- adapters ------------------------------------------------------------------------------------

TARGETS = ("q_proj", "mlp")
RANK = 4


def adapter(folder: Path, changed: Mapping[str, torch.Tensor] | None = None, **config: Any) -> str:
    """A LoRA of two modules of each layer, as PEFT writes it."""
    path = folder / "adapter"
    path.mkdir(exist_ok=True)
    state: State = {}
    for n in range(3):
        for at, name in enumerate(TARGETS):
            start = f"base_model.model.layers.{n}.{name}"
            state[f"{start}.lora_A.weight"] = 0.1 * drawn(RANK, 32, seed=10 * n + at)
            state[f"{start}.lora_B.weight"] = 0.1 * drawn(32, RANK, seed=99 + 10 * n + at)
    written(path / "adapter_model.safetensors", state | dict(changed or {}))
    document = {"peft_type": "LORA", "r": RANK, "lora_alpha": 8, "target_modules": list(TARGETS)}
    (path / "adapter_config.json").write_text(json.dumps(document | config))
    return str(path)


def products(folder: Path) -> State:
    """B A of every module, in float64."""
    state = load_file(folder / "adapter" / "adapter_model.safetensors")
    whole: State = {}
    for name, a in state.items():
        if name.endswith("lora_A.weight"):
            b = state[name.replace("lora_A", "lora_B")]
            module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            whole[f"{module}.weight"] = b.double() @ a.double()
    return whole
