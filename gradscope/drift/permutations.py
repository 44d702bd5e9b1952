"""Which row of the one tensor is which of the other: by content, or by resemblance."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from gradscope.checkpoints.tensors import TensorRef
from gradscope.checkpoints.tiles import PIECE, tiles
from gradscope.drift.second_look import axes_moved
from gradscope.drift.steps import step_of
from gradscope.drift.sums import rounding_between, roundings_of
from gradscope.statistics.scan import scan
from gradscope.statistics.tally import merged, tally
from gradscope.weights.products import values

Values = npt.NDArray[np.float64]
Permutation = npt.NDArray[np.intp]

#: Elements of a row that it is told by, and the fewest.
_COLUMNS, _FEWEST = 256, 16
#: Rows that are looked for at first, and the most that are compared with one another.
_PROBES, _ROWS = 16, 1 << 14
#: The cosine of rows that are the same: of others of so many elements it is hardly above 0.8.
_ALIKE = 0.85
_LEAST = float(np.finfo(np.float64).tiny)


def permuted_exactly(base: TensorRef, new: TensorRef, axis: int) -> Permutation | None:
    """For each slice of the new tensor along a dimension, which of the base's it is, if all are."""
    if axis and (base.decoding is not None or new.decoding is not None):
        return None
    one, two = (_hashes(_first(ref, axis)) for ref in (base, new))
    here, there = np.argsort(one, kind="stable"), np.argsort(two, kind="stable")
    if not np.array_equal(one[here], two[there]):
        return None
    found = np.empty(len(one), np.intp)
    found[there] = here
    return found


def _first(ref: TensorRef, axis: int) -> TensorRef:
    """A tensor seen with a dimension in the first place; a vector as rows of one element."""
    if len(ref.shape) == 1:
        return replace(ref, shape=(*ref.shape, 1))
    if not axis:
        return ref
    return axes_moved(ref, (axis, *(a for a in range(len(ref.shape)) if a != axis)))


def _hashes(ref: TensorRef) -> npt.NDArray[np.uint64]:
    return merged(tally(tile, scan) for tile in tiles(ref)).row_hashes()


def permuted_alike(base: TensorRef, new: TensorRef, axis: int) -> Permutation | None:
    """The same, where each slice resembles one alone; None where they lie where they lay."""
    if axis and (base.decoding is not None or new.decoding is not None):
        return None
    one, two = _first(base, axis), _first(new, axis)
    if not 2 <= one.shape[0] <= _ROWS or one.row_numel < _FEWEST:
        return None
    rows = _starts(one)
    probes = np.linspace(0, len(rows) - 1, min(_PROBES, len(rows))).astype(int)
    if (_best(_starts(two, probes), rows)[1] < _ALIKE).any():
        return None
    return _order(_starts(two), rows)


def permuted_vector(base: TensorRef, new: TensorRef) -> Permutation | None:
    """The order of a vector's elements where a cast leaves but the order of their values.

    Rounding keeps that; of equal elements any may be meant, which heads are tried for first.
    """
    n = base.numel
    if len(base.shape) != 1 or not _FEWEST <= n <= PIECE:
        return None
    x, y = values(base), values(new)
    sorted_ = np.empty(n, np.intp)
    sorted_[np.argsort(y, kind="stable")] = np.argsort(x, kind="stable")
    step = np.maximum(step_of(y, base.dtype), step_of(y, new.dtype))
    if (np.abs(x[sorted_] - y) > step).any():
        return None
    return next((order for order in rotary_orders(n) if (np.abs(x[order] - y) <= step).all()),
                sorted_)  # fmt: skip


def rotary_orders(n: int) -> Iterator[Permutation]:
    """Of heads of every size, the halves of rotary positions interleaved, and no longer so."""
    for size in (d for d in range(4, n + 1, 2) if n % d == 0):
        halves = np.arange(size).reshape(2, -1).T.reshape(-1)
        for local in (halves, np.argsort(halves)):
            yield (np.arange(0, n, size)[:, None] + local).reshape(-1)


def _starts(ref: TensorRef, which: npt.NDArray[np.int_] | None = None) -> npt.NDArray[np.float32]:
    """The first elements of rows, of length one."""
    width, columns = ref.row_numel, min(ref.row_numel, _COLUMNS)
    chosen = range(ref.shape[0]) if which is None else which.tolist()
    found = np.array([values(ref, i * width, i * width + columns) for i in chosen])
    # Squares of the greatest values, and of the least, are beyond the numbers.
    found = found / np.maximum(np.abs(found).max(axis=1, keepdims=True), _LEAST)
    norms = np.linalg.norm(found, axis=1, keepdims=True)
    return np.asarray(found / np.where(norms > 0, norms, 1), np.float32)


def _best(
    wanted: npt.NDArray[np.float32], rows: npt.NDArray[np.float32]
) -> tuple[Permutation, npt.NDArray[np.float32]]:
    """The row that each resembles most, and their cosine; 1 of zeros, which resemble nothing."""
    cosines = wanted @ rows.T
    found = cosines.argmax(axis=1)
    empty = ~wanted.any(axis=1)
    return found, np.where(empty, 1, cosines[np.arange(len(wanted)), found])


def _order(wanted: npt.NDArray[np.float32], rows: npt.NDArray[np.float32]) -> Permutation | None:
    order = np.full(len(rows), -1, np.intp)
    for start in range(0, len(wanted), 1024):
        part = slice(start, start + 1024)
        order[part], cosines = _best(wanted[part], rows)
        if (cosines < _ALIKE).any():
            return None
    empty, empties = (np.flatnonzero(~side.any(axis=1)) for side in (wanted, rows))
    if len(empty) != len(empties):
        return None
    order[empty] = empties
    same = np.array_equal(order, np.arange(len(rows)))
    return None if same or len(np.unique(order)) < len(rows) else order


@dataclass(frozen=True, slots=True)
class Moved:
    """What else became of slices that lie in another order: ‖what differs‖ / ‖new‖, and how many
    elements are rounded how.
    """

    residual: float
    roundings: tuple[int, ...]


def moved(base: TensorRef, new: TensorRef, order: Permutation, axis: int) -> Moved:
    """The new slices against those of the base that they are. Raises InputError."""
    rounding = rounding_between(base.dtype, new.dtype)
    left = norm = 0.0
    counts = np.zeros(4, np.int64)
    for x, y in _pairs(_first(base, axis), _first(new, axis), order):
        left += float(np.sum((y - x) ** 2))
        norm += float(np.vdot(y, y))
        if rounding is not None:
            counts += roundings_of(x, y, rounding)
    return Moved(math.sqrt(left / norm) if norm else 0.0, tuple(map(int, counts)))


def _pairs(base: TensorRef, new: TensorRef, order: Permutation) -> Iterator[tuple[Values, Values]]:
    width = new.row_numel
    if width == 1:  # a vector
        yield values(base)[order], values(new)
        return
    for row, source in enumerate(order.tolist()):
        for start in range(0, width, PIECE):
            stop = min(start + PIECE, width)
            yield (
                values(base, source * width + start, source * width + stop),
                values(new, row * width + start, row * width + stop),
            )
