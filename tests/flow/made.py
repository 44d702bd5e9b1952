"""Histories made for tests: from arrays, and from networks trained without gradscope's recorder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from gradscope.histories.history import History, Layer, Sketches, Status

#: The fields of a history that have a row for each recorded step.
RECORDED = (
    "l2", "status", "max_abs", "mean_abs", "mean", "zero_fraction", "n_nan", "n_inf", "param_l2",
    "update_l2", "update_cosine", "loss", "optimizer_loss", "total_l2", "clip_coefficient",
    "loss_scale", "skipped", "lr", "micro_mean_square", "micro_count", "edge_flow",
)  # fmt: skip


def made(
    l2: Any,
    *,
    names: Sequence[str] | None = None,
    numel: Sequence[int] | int | None = 100,
    kinds: Sequence[Any] | None = None,
    steps: Any = None,
    **fields: Any,
) -> History:
    """A history of norms [T, L]."""
    norms = np.asarray(l2, dtype=np.float32)
    records, count = norms.shape
    names = names or [f"layers.{i}" for i in range(count)]
    sizes = [numel] * count if numel is None or isinstance(numel, int) else numel
    kinds = kinds or ["matrix"] * count
    layers = tuple(
        Layer(name, kind, size, module=name)
        for name, kind, size in zip(names, kinds, sizes, strict=True)
    )
    status = fields.pop("status", np.full(norms.shape, Status.RECORDED, np.uint8))
    return History(
        path="run.npz",
        format="gradscope.grads",
        nbytes=norms.nbytes,
        steps=np.arange(records) if steps is None else np.asarray(steps),
        layers=layers,
        l2=norms,
        status=status,
        **fields,
    )


def noise(
    records: int, layers: int, scale: float = 0.3, seed: int = 0, level: float = 1.0
) -> np.ndarray:
    """Log-normal norms around a level."""
    return level * np.exp(np.random.default_rng(seed).normal(0, scale, (records, layers)))


def of_vectors(vectors: Sequence[Sequence[np.ndarray]], **fields: Any) -> History:
    """A history of gradients themselves, [T][L] arrays, with Gaussian sketches of 128 numbers."""
    rng = np.random.default_rng(7)
    width = 128
    maps = [rng.normal(size=(width, g.size)) / np.sqrt(width) for g in vectors[0]]
    norms = np.array([[np.linalg.norm(g) for g in step] for step in vectors])
    values = np.zeros((len(vectors), len(maps), width), np.float32)
    for t, step in enumerate(vectors):
        for row, g in enumerate(step):
            if norms[t, row] > 0:
                values[t, row] = maps[row] @ (g.ravel() / norms[t, row])
    return made(
        norms,
        numel=[g.size for g in vectors[0]],
        sketches=Sketches(values, np.arange(len(vectors))),
        **fields,
    )


def quadratic(
    rate_times_curvature: float, records: int = 80, size: int = 1, **fields: Any
) -> History:
    """Gradient descent on a quadratic: g' = (1 - eta h) g."""
    factor = 1 - rate_times_curvature
    direction = np.random.default_rng(0).normal(size=size)
    vectors = [[direction * factor**t] for t in range(records)]
    meta = {"optimizer": {"class": "SGD", "momentum": 0}}
    rate = np.full((records, 1), rate_times_curvature / 2.0)
    return of_vectors(vectors, meta=meta, lr=rate, **fields)


def trained(
    model: Any,
    loss_of: Callable[[Any, int], Any],
    *,
    optimizer: Any,
    records: int,
    edges: Sequence[tuple[int, int]] | None = None,
    updates: bool = True,
) -> History:
    """A real run, recorded by plain autograd: norms, losses, weights and updates."""
    import torch

    modules = [
        (name, m) for name, m in model.named_modules() if any(True for _ in m.parameters(False))
    ]
    rows: dict[str, list[list[float]]] = {"l2": [], "param": [], "update": []}
    losses = []
    for step in range(records):
        optimizer.zero_grad()
        loss = loss_of(model, step)
        loss.backward()
        losses.append(float(loss.detach()))
        groups = [list(m.parameters(False)) for _, m in modules]
        rows["l2"].append([_norm([p.grad for p in g]) for g in groups])
        rows["param"].append([_norm(g) for g in groups])
        before = [[p.detach().clone() for p in g] for g in groups]
        optimizer.step()
        rows["update"].append(
            [
                _norm([p - b for p, b in zip(g, old, strict=True)])
                for g, old in zip(groups, before, strict=True)
            ]
        )
    kinds = ["norm" if "Norm" in type(m).__name__ else "matrix" for _, m in modules]
    extra: dict[str, Any] = {}
    if updates:
        extra = {"param_l2": np.array(rows["param"]), "update_l2": np.array(rows["update"])}
    if edges is not None:
        extra |= {"edges": np.array(edges), "topology": "recorded"}
    assert isinstance(torch.__version__, str)
    return made(
        rows["l2"],
        names=[name for name, _ in modules],
        numel=[sum(p.numel() for p in m.parameters(False)) for _, m in modules],
        kinds=kinds,
        loss=np.array(losses),
        **extra,
    )


def _norm(tensors: Sequence[Any]) -> float:
    import torch

    with torch.no_grad():
        return float(torch.cat([t.double().flatten() for t in tensors if t is not None]).norm())
