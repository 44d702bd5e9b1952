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


def elements(gradient: Tensor) -> Tensor:
    """The stored elements of a gradient, as real numbers, each place once.

    Of a sparse one the rows that were touched, duplicates summed; of a complex one the real and
    imaginary parts, whose norm is that of the complex numbers.
    """
    if gradient.is_sparse:
        gradient = gradient.coalesce().values()
    elif gradient.layout != torch.strided:
        gradient = gradient.to_dense()
    return torch.view_as_real(gradient.resolve_conj()) if gradient.is_complex() else gradient


def magnitudes(gradient: Tensor) -> Tensor:
    """What ``elements`` are for the greatest magnitude and the count of zeros."""
    if gradient.is_complex():
        gradient = gradient.coalesce().values() if gradient.is_sparse else gradient
        return gradient.abs()
    return elements(gradient)


def places(gradient: Tensor) -> Tensor:
    """The row-major place of each of a sparse gradient's ``elements``, int64 [elements]."""
    gradient = gradient.coalesce()
    index, inner = gradient.indices(), math.prod(gradient.shape[gradient.sparse_dim() :])
    flat = torch.zeros(index.shape[1], dtype=torch.long, device=index.device)
    for row, size in zip(index, gradient.shape, strict=False):
        flat = flat * size + row
    inner *= 2 if gradient.is_complex() else 1
    return (flat[:, None] * inner + torch.arange(inner, device=flat.device)).reshape(-1)


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


def subset(name: str, size: int) -> Tensor | None:
    """The elements of a parameter that are sketched, ascending; None when all of them are.

    Drawn without replacement by what the name alone decides, so that sketches of one parameter
    agree between runs. Takes memory for a few times the subset, whatever ``size`` is.
    """
    if size <= MOST_SKETCHED:
        return None
    chooser = torch.Generator().manual_seed(seed_of(name))
    if size >= 2 * MOST_SKETCHED:
        return _drawn(size, MOST_SKETCHED, chooser)
    kept = torch.ones(size, dtype=torch.bool)
    kept[_drawn(size, size - MOST_SKETCHED, chooser)] = False
    return kept.nonzero().reshape(-1)


def _drawn(size: int, count: int, chooser: torch.Generator) -> Tensor:
    """``count`` different numbers below ``size``, of which they are at most half; ascending."""
    found = torch.empty(0, dtype=torch.long)
    while len(found) < count:
        more = torch.randint(0, size, (2 * (count - len(found)),), generator=chooser)
        found = torch.unique(torch.cat([found, more]))
    spare = torch.randperm(len(found), generator=chooser)[:count]
    return found[spare].sort().values


def buckets(index: Any, seed: int, width: int = WIDTH) -> Any:
    """Where each element goes: its bucket, and ``width`` more for a minus. Tensors or arrays."""
    h = hashed(index, seed)
    return (h >> 31) * width + (h & 0x7FFFFFFF) % width


class Sketcher:
    """Count-sketches of many gradients at once, by buckets hashed once.

    Holds four bytes an element: the bucket of each in a table of (row, sign, bucket), so that one
    gather and one scatter-add sketch a whole model. Sparse gradients are hashed as they come.
    """

    def __init__(
        self, names: Sequence[str], sizes: Sequence[int], device: Any, width: int = WIDTH
    ) -> None:
        self.width, self.rows = width, len(names)
        self.chosen: list[Tensor | None] = []
        self._seeds = [seed_of(name) for name in names]
        self._places: list[Tensor | None] = [None] * len(names)
        self._names, self._sizes, self._device = list(names), list(sizes), device
        for name, size in zip(names, sizes, strict=True):
            index = subset(name, size)
            self.chosen.append(None if index is None else index.to(device))
        share = [math.sqrt(max(1.0, n / MOST_SKETCHED)) for n in sizes]
        self._share = torch.tensor(share, dtype=torch.float32).to(device)

    def __call__(self, gradients: Sequence[Tensor], lengths: Tensor, rows: Sequence[int]) -> Tensor:
        """Sketches of some rows' unit gradients, float32 [len(rows), k].

        Zero where a norm is zero or not finite. ``lengths`` are their norms.
        """
        size = 2 * self.width
        table = torch.zeros(len(rows) * size, dtype=torch.float32, device=self._device)
        found = [self._placed(g, row) for g, row in zip(gradients, rows, strict=True)]
        index = torch.cat([at + i * size for i, (_, at) in enumerate(found)])
        table.index_add_(0, index, torch.cat([values for values, _ in found]))
        usable = (lengths > 0) & torch.isfinite(lengths)
        signed = table.view(len(rows), 2, self.width)
        factor = self._scale(gradients, rows) / lengths
        unit = (signed[:, 0] - signed[:, 1]) * factor[:, None]
        # A row of its own in the table: what is not finite spoils no other.
        return torch.where(usable[:, None] & torch.isfinite(unit), unit, 0.0)

    def _placed(self, gradient: Tensor, row: int) -> tuple[Tensor, Tensor]:
        """The elements of a gradient that are sketched, float32, and their buckets, int32."""
        values = elements(gradient).reshape(-1).float()
        if gradient.is_sparse:
            return values, buckets(places(gradient), self._seeds[row], self.width).to(torch.int32)
        chosen = self.chosen[row]
        at = self._places[row]
        if at is None:
            index = torch.arange(self._sizes[row]) if chosen is None else chosen.cpu()
            at = torch.from_numpy(buckets(index.numpy(), self._seeds[row], self.width))
            at = at.to(torch.int32).to(self._device)
            self._places[row] = at
        return (values if chosen is None else values[chosen]), at

    def _scale(self, gradients: Sequence[Tensor], rows: Sequence[int]) -> Tensor:
        """What a subset's sketch is multiplied by; all of a sparse gradient is sketched."""
        share = self._share if len(rows) == self.rows else self._share[list(rows)]
        if any(g.is_sparse for g in gradients):
            whole = torch.tensor([g.is_sparse for g in gradients]).to(share.device)
            share = torch.where(whole, 1.0, share)
        return share
