"""Whether a change is of low rank, as that of a merged adapter is, but for what rounding added."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gradscope.checkpoints.tensors import TensorRef
from gradscope.checkpoints.tiles import PIECE
from gradscope.drift.steps import step_of
from gradscope.weights.products import values

Values = npt.NDArray[np.float64]

#: Sides of the corners that are looked at first; any part of a matrix has at most its rank. Of the
#: smaller one nearly all ranks are low, but for those that fill it.
_GLANCE, _CORNER = 96, 256
_FILLED = 0.55
#: A rank above this share of the shorter side is not low.
_SHARE = 0.25
#: The energy that the rank must hold, and how far what is left may exceed that of rounding.
_ENERGY, _ROUNDING = 0.99, 1.5
#: Columns of the sketch beyond the rank (Halko, Martinsson and Tropp 2011).
_OVERSAMPLED = 8


@dataclass(frozen=True, slots=True)
class LowRank:
    """A change that a matrix of a low rank explains."""

    rank: int
    #: Its share of the change's squared norm.
    energy: float
    #: ‖what it leaves‖ / ‖new‖.
    residual: float


def low_rank(base: TensorRef, new: TensorRef) -> LowRank | None:
    """The rank of new − base at 99 % of its energy, or above what rounding to the type adds.

    None where it is above a quarter of the shorter side. Both have one shape; beyond two
    dimensions they are matrices of their rows. Raises InputError.
    """
    rows, width = base.shape[0], base.numel // base.shape[0]
    side = min(rows, width)
    if side < 4:
        return None
    rank = 0
    for most, share in ((_GLANCE, _FILLED), (_CORNER, _SHARE)):
        corner = min(most, rows), min(most, width)
        change, noise = _corner(base, new, *corner)
        found = _rank(_spectrum(change) ** 2, noise)
        if found is None or found > share * min(corner):
            return None
        rank = found
    return _confirmed(base, new, rank)


def _spectrum(change: Values) -> Values:
    """Singular values, greatest first, by the smaller Gram matrix: small ones need no precision."""
    gram = change @ change.T if len(change) <= change.shape[1] else change.T @ change
    return np.asarray(np.sqrt(np.maximum(np.linalg.eigvalsh(gram)[::-1], 0)))


def _rank(energies: Values, noise: float) -> int | None:
    """How many of the squared singular values leave no more than rounding, or 1 %."""
    total = float(energies.sum())
    if not total > 4 * noise or not math.isfinite(total):
        return None
    left = total - np.cumsum(energies)
    allowed = max((1 - _ENERGY) * total, _ROUNDING * noise)
    return int(np.argmax(left <= allowed)) + 1


def _corner(base: TensorRef, new: TensorRef, rows: int, columns: int) -> tuple[Values, float]:
    one, two = (_start(ref, rows, columns) for ref in (base, new))
    return two - one, float(np.sum(step_of(two, new.dtype) ** 2) / 12)


def _start(ref: TensorRef, rows: int, columns: int) -> Values:
    """The first elements of the first rows; whole rows at once where that is no piece too long."""
    width = ref.numel // ref.shape[0]
    if rows * width <= PIECE:
        return values(ref, 0, rows * width).reshape(rows, width)[:, :columns]
    return np.array([values(ref, i * width, i * width + columns) for i in range(rows)])


def _confirmed(base: TensorRef, new: TensorRef, rank: int) -> LowRank | None:
    """The same of the whole, by two reads: the range of the change, then what lies in it."""
    width = base.numel // base.shape[0]
    many = min(rank + _OVERSAMPLED, width, base.shape[0])
    omega = np.random.Generator(np.random.PCG64(0)).standard_normal((width, many))
    basis = np.linalg.qr(np.concatenate([d @ omega for d, _ in _changes(base, new)]))[0]
    inside = np.zeros((basis.shape[1], width))
    total = noise = norm = 0.0
    first = 0
    for change, stored in _changes(base, new):
        inside += basis[first : first + len(change)].T @ change
        total += float(np.vdot(change, change))
        noise += float(np.sum(step_of(stored, new.dtype) ** 2) / 12)
        norm += float(np.vdot(stored, stored))
        first += len(change)
    energies = _spectrum(inside) ** 2
    found = _rank(np.append(energies, max(total - float(energies.sum()), 0.0)), noise)
    if found is None or found > len(energies) or found > _SHARE * min(base.shape[0], width):
        return None
    held = float(energies[:found].sum())
    return LowRank(found, held / total, math.sqrt(max(total - held, 0.0) / norm))


def _changes(base: TensorRef, new: TensorRef) -> Iterator[tuple[Values, Values]]:
    """new − base and new, some rows at a time."""
    rows, width = base.shape[0], base.numel // base.shape[0]
    step = max(1, PIECE // width)
    for first in range(0, rows, step):
        last = min(first + step, rows)
        one, two = (
            values(ref, first * width, last * width).reshape(-1, width) for ref in (base, new)
        )
        yield two - one, two
