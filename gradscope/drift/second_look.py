"""What is read again of the few tensors whose sums do not say why they changed."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import permutations
from typing import Any

import numpy as np

from gradscope.checkpoints.tensors import TensorRef
from gradscope.checkpoints.tiles import Tile, read_range, tiles
from gradscope.drift.measures import Measures, measures
from gradscope.drift.steps import step_of
from gradscope.drift.sums import Rounding, compared, floats

#: Elements of a first impression.
_START = 4096


def compare_all(base: TensorRef, new: TensorRef, rounding: Rounding | None = None) -> Measures:
    """The measures of two tensors of one shape."""
    pairs = zip(tiles(base), tiles(new), strict=True)
    return measures(base.numel, [p for a, b in pairs for p in compared(a, b, rounding)])


def compare_start(base: TensorRef, new: TensorRef, rounding: Rounding | None = None) -> Measures:
    """The same of their first elements, to rule out at once what the whole would disprove."""
    stop = min(_START, base.numel)
    return measures(stop, compared(Tile(base, 0, stop), Tile(new, 0, stop), rounding))


def same(base: TensorRef, new: TensorRef) -> bool:
    """Whether two tensors of one shape hold the same elements."""
    return compare_start(base, new).identical and compare_all(base, new).identical


def axes_moved(ref: TensorRef, axes: tuple[int, ...]) -> TensorRef:
    """A stored tensor seen with its dimensions in another order."""
    shape = tuple(ref.shape[axis] for axis in axes)
    strides = ref.strides or tuple(
        math.prod(ref.shape[axis + 1 :]) for axis in range(len(ref.shape))
    )
    return replace(ref, shape=shape, strides=tuple(strides[axis] for axis in axes))


def transpositions(base: TensorRef, new: TensorRef) -> Iterator[tuple[int, ...]]:
    """The orders of dimensions in which the new tensor holds the base's elements."""
    if new.decoding is not None or not 2 <= len(new.shape) <= 5:
        return
    for axes in permutations(range(len(new.shape))):
        moved = axes_moved(new, axes)
        if axes != tuple(sorted(axes)) and moved.shape == base.shape and same(base, moved):
            yield axes


def scale_residual(base: TensorRef, new: TensorRef, factor: float) -> float:
    """‖new − factor · base‖ / ‖new‖."""
    squares = left = 0.0
    for (_, a), (_, b) in _both(base, new):
        x = floats(base, a, 1).astype(np.float64)
        y = floats(new, b, 0).astype(np.float64)
        kept = np.isfinite(x) & np.isfinite(y)
        squares += float(np.sum(y[kept] ** 2))
        left += float(np.sum((y[kept] - factor * x[kept]) ** 2))
    return math.sqrt(left / squares) if squares else math.nan


def within_roundings(base: TensorRef, new: TensorRef) -> bool:
    """Whether no element differs by more than half a step of either type, as roundings of one value
    do; of what was trained, however little, some would.
    """
    for (_, a), (_, b) in _both(base, new):
        x = floats(base, a, 1).astype(np.float64)
        y = floats(new, b, 0).astype(np.float64)
        if (np.abs(x - y) > (step_of(x, base.dtype) + step_of(y, new.dtype)) / 2).any():
            return False
    return True


def _both(base: TensorRef, new: TensorRef) -> Iterator[tuple[Any, Any]]:
    for one, two in zip(tiles(base), tiles(new), strict=True):
        yield from zip(one.pieces(1), two.pieces(0), strict=True)


def codes_at(ref: TensorRef, place: int) -> int:
    """The code of one element."""
    start = place // 4 * 4  # a byte may hold several codes
    stored = read_range(ref, start, min(start + 4, ref.numel))
    return int(stored.view(f"u{stored.itemsize}")[place - start])


def first_difference(base: TensorRef, new: TensorRef) -> int:
    """The flat index of the first element whose codes differ; -1 if none does."""
    for (first, a), (_, b) in _both(base, new):
        differing = np.flatnonzero(a.view(np.uint8) != b.view(np.uint8))
        if len(differing):
            return int(first) + int(differing[0]) // int(a.itemsize)
    return -1
