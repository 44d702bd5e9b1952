"""Small networks and their training, with what plain autograd says of every step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from gradscope import GradientRecorder


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4), nn.Tanh(), nn.Linear(4, 3))


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(64, 3)
    )


def transformer() -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    return nn.Sequential(
        nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(8, 3)
    )


INPUTS = {mlp: (16, 6), cnn: (16, 1, 6, 6), transformer: (4, 5, 8)}


def norm(tensor: torch.Tensor) -> float:
    return float(tensor.detach().double().norm())


def run(
    make: Any, folder: Path, steps: int = 12, record: bool = True, **options: Any
) -> tuple[nn.Module, list[dict[str, Any]]]:
    """Train, and keep what plain autograd says of every step."""
    torch.manual_seed(0)
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    recorder = GradientRecorder(model, optimizer, folder, **options) if record else None
    seen = []
    for step in range(steps):
        inputs = torch.randn(INPUTS[make])
        loss = (model(inputs) ** 2).mean()
        loss.backward()
        if recorder is not None:
            recorder.capture(step, loss=loss)
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        facts = {
            n: {
                "l2": norm(p.grad),
                "max_abs": float(p.grad.abs().max()),
                "zero": float((p.grad == 0).double().mean()),
                "param": norm(p),
                "grad": p.grad.double().numpy().copy(),
            }
            for n, p in model.named_parameters()
        }
        optimizer.step()
        for n, p in model.named_parameters():
            change = p.detach() - before[n]
            facts[n]["update"] = norm(change)
            facts[n]["grad_cos"] = float(
                -(change.double().flatten() @ torch.tensor(facts[n]["grad"]).flatten())
            ) / max(1e-300, facts[n]["update"] * facts[n]["l2"])
        optimizer.zero_grad()
        seen.append({"loss": float(loss.detach()), "rows": facts})
    if recorder is not None:
        recorder.close()
    return model, seen
