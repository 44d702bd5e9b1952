"""What is measured of gradients on their device: tensors in, tensors out, no value looked at."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from gradscope.histories.sketching import WIDTH, hashed, seed_of

Tensor = torch.Tensor

#: More elements of one parameter than this are sketched by a fixed random subset.
MOST_SKETCHED = 1 << 22


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a distributed tensor, any other tensor itself."""
    found = getattr(tensor, "_local_tensor", tensor)
    return found.detach() if isinstance(found, Tensor) else tensor.detach()


def norms(tensors: Sequence[Tensor], order: float) -> Tensor:
    """The norm of each tensor, float32 [len(tensors)], accumulated in float32.

    Half-precision gradients overflow their own type beyond 65,504. Order 0 counts what is not
    zero, infinity takes the greatest magnitude.
    """
    if not tensors:
        return torch.zeros(0)
    if order == math.inf:
        # foreach refuses to take the maximum of nothing.
        return (
            torch.stack([_top(t) for t in tensors])
            if any(not t.numel() for t in tensors)
            else _foreach(tensors, order)
        )
    return _foreach(tensors, order)


def _top(tensor: Tensor) -> Tensor:
    if not tensor.numel():
        return torch.zeros((), dtype=torch.float32, device=tensor.device)
    result: Tensor = torch.linalg.vector_norm(tensor, math.inf, dtype=torch.float32)
    return result


def _foreach(tensors: Sequence[Tensor], order: float) -> Tensor:
    wide = any(t.dtype == torch.float64 for t in tensors)
    kind = torch.float64 if wide else torch.float32
    foreach = getattr(torch, "_foreach_norm", None)
    if foreach is not None and order != 0:
        return torch.stack(foreach(list(tensors), order, dtype=kind)).float()
    if order == 0:
        return torch.stack([torch.count_nonzero(t) for t in tensors]).float()
    return torch.stack([torch.linalg.vector_norm(t, order, dtype=kind) for t in tensors]).float()


def dots(first: Sequence[Tensor], second: Sequence[Tensor]) -> Tensor:
    """The inner product of each pair, float32 [len(first)]."""
    pairs = zip(first, second, strict=True)
    return torch.stack([torch.dot(a.flatten().float(), b.flatten().float()) for a, b in pairs])


class Sketcher:
    """Count-sketches of all gradients at once, by buckets hashed once.

    Holds four bytes an element: the bucket of each in a table of (row, sign, bucket), so that one
    gather and one scatter-add sketch a whole model.
    """

    def __init__(
        self, names: Sequence[str], sizes: Sequence[int], device: Any, width: int = WIDTH
    ) -> None:
        self.width, self.rows = width, len(names)
        self.chosen: list[Tensor | None] = []
        parts = []
        for row, (name, size) in enumerate(zip(names, sizes, strict=True)):
            index = self._subset(name, size)
            h = torch.from_numpy(hashed(index.numpy(), seed_of(name)))
            parts.append(row * 2 * width + (h >> 31) * width + (h & 0x7FFFFFFF) % width)
            self.chosen.append(index.to(device) if len(index) < size else None)
        self.scale = torch.tensor(
            [math.sqrt(max(1.0, n / MOST_SKETCHED)) for n in sizes], dtype=torch.float32
        ).to(device)
        self.bucket = torch.cat(parts).to(torch.int32).to(device) if parts else torch.zeros(0)

    @staticmethod
    def _subset(name: str, size: int) -> Tensor:
        """Every index, or a random choice that the name alone decides."""
        if size <= MOST_SKETCHED:
            return torch.arange(size)
        chooser = torch.Generator().manual_seed(seed_of(name))
        return torch.randint(0, size, (MOST_SKETCHED,), generator=chooser).sort().values

    def __call__(self, gradients: Sequence[Tensor], lengths: Tensor) -> Tensor:
        """Sketches of the unit gradients, float32 [L, k]; zero where a norm is zero or not finite.

        ``gradients`` are all rows', in order; ``lengths`` their norms [L].
        """
        flat = [
            g.reshape(-1) if i is None else g.reshape(-1)[i]
            for g, i in zip(gradients, self.chosen, strict=True)
        ]
        table = torch.zeros(
            self.rows * 2 * self.width, dtype=torch.float32, device=self.bucket.device
        )
        values = torch.cat([f.float() for f in flat])
        table.index_add_(0, self.bucket, values)
        usable = (lengths > 0) & torch.isfinite(lengths)
        signed = table.view(self.rows, 2, self.width)
        unit = (signed[:, 0] - signed[:, 1]) * (self.scale / lengths)[:, None]
        # A row of its own in the table: what is not finite spoils no other.
        return torch.where(usable[:, None] & torch.isfinite(unit), unit, 0.0)
