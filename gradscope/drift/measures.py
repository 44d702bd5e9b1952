"""What is known of two tensors of one shape, from the sums of their pieces."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from gradscope.drift import kernels
from gradscope.drift.sums import LARGEST, Array, Sums


@dataclass(frozen=True)
class Change:
    """One element that changed: its flat index, and from what to what."""

    place: int
    base: float
    new: float


#: The greatest distance in units in the last place, and counts by the bits that distances take.
Ulps = tuple[int, tuple[int, ...]]


@dataclass(frozen=True)
class Measures:
    """What is known of two tensors of one shape; None where it is undefined."""

    numel: int
    #: Elements that differ: codes of one type, values of two.
    changed: int
    sums: tuple[float, ...]
    counts: tuple[int, ...]
    octaves: tuple[int, ...]
    ulps: Ulps | None = None
    roundings: tuple[int, ...] | None = None
    #: By row: norm of the base, norm of the change, changed elements.
    row_norms: Array = field(default_factory=lambda: np.zeros(0))
    row_changes: Array = field(default_factory=lambda: np.zeros(0))
    row_changed: Array = field(default_factory=lambda: np.zeros(0, np.int64))
    largest: tuple[Change, ...] = ()

    @property
    def identical(self) -> bool:
        """Whether nothing differs."""
        return self.changed == 0

    @property
    def base_norm(self) -> float:
        """‖base‖ over the pairs that are finite."""
        return math.sqrt(self.sums[kernels.SQUARES_BASE])

    @property
    def new_norm(self) -> float:
        """‖new‖ over the pairs that are finite."""
        return math.sqrt(self.sums[kernels.SQUARES_NEW])

    @property
    def distance(self) -> float:
        """‖new − base‖ over the pairs that are finite."""
        return math.sqrt(self.sums[kernels.SQUARES_CHANGE])

    @property
    def relative_drift(self) -> float | None:
        """‖new − base‖ / ‖base‖."""
        return _ratio(self.distance, self.base_norm) if self.numel else None

    @property
    def cosine(self) -> float | None:
        """⟨base, new⟩ / ‖base‖‖new‖."""
        if self.identical and self.base_norm > 0:
            return 1.0
        # One root of a quotient: the product of the norms may be beyond the numbers.
        found = _ratio(_ratio(self.sums[kernels.PRODUCTS], self.base_norm) or 0.0, self.new_norm)
        return None if found is None or not self.base_norm else max(-1.0, min(1.0, found))

    @property
    def norm_ratio(self) -> float | None:
        """‖new‖ / ‖base‖."""
        return _ratio(self.new_norm, self.base_norm)

    @property
    def changed_fraction(self) -> float | None:
        """The share of elements that differ."""
        return self.changed / self.numel if self.numel else None

    @property
    def sign_flip_fraction(self) -> float | None:
        """The share of elements that crossed zero."""
        return self.counts[kernels.FLIPPED] / self.numel if self.numel else None

    @property
    def finite(self) -> bool:
        """Whether every element of both is finite."""
        return self.counts[kernels.ODD_BASE] == self.counts[kernels.ODD_NEW] == 0


def _ratio(a: float, b: float) -> float | None:
    found = a / b if b else math.nan
    return found if math.isfinite(found) else None


def measures(numel: int, pieces: Sequence[Sums]) -> Measures:
    """The measures of ``numel`` elements from their pieces, in order."""
    if not pieces:
        return Measures(0, 0, (0.0,) * 5, (0,) * 5, (0,) * (kernels.OCTAVES + 1))
    counts = _total([p.counts for p in pieces])
    changed, ulps = _units([p.distances for p in pieces if p.distances is not None])
    roundings = [p.roundings for p in pieces if p.roundings is not None]
    squares, changes, row_changed = _rows(pieces)
    return Measures(
        numel,
        counts[kernels.CHANGED] if changed is None else changed,
        tuple(map(math.fsum, zip(*(p.sums.tolist() for p in pieces), strict=True))),
        counts,
        _total([p.octaves for p in pieces]),
        ulps,
        _total(roundings) if roundings else None,
        np.sqrt(squares),
        np.sqrt(changes),
        row_changed,
        tuple(_largest(pieces)),
    )


def _total(found: Sequence[Array]) -> tuple[int, ...]:
    return tuple(map(int, np.sum(found, axis=0)))


def _units(found: Sequence[tuple[Array, Array]]) -> tuple[int | None, Ulps | None]:
    if not found:
        return None, None
    table = np.array(_total([table for table, _ in found]))
    changed = sum(int(counts[0]) for _, counts in found)
    if not np.any(table):
        return changed, None
    most = max(int(counts[1]) for _, counts in found)
    return changed, (most, tuple(map(int, np.trim_zeros(table, "b"))))


def _rows(pieces: Sequence[Sums]) -> tuple[Array, Array, Array]:
    """The rows of all pieces; those that pieces share are summed in order."""
    count = pieces[-1].first_row + len(pieces[-1].rows[0])
    whole = np.zeros(count), np.zeros(count), np.zeros(count, np.int64)
    for piece in pieces:
        for total, part in zip(whole, piece.rows, strict=True):
            total[piece.first_row : piece.first_row + len(part)] += part
    return whole


def _largest(pieces: Sequence[Sums]) -> Iterator[Change]:
    values = np.concatenate([p.values for p in pieces])
    places = np.concatenate([p.places for p in pieces])
    ends = np.concatenate([p.ends for p in pieces], axis=1)
    for at in np.lexsort((places, -values))[:LARGEST]:
        if places[at] >= 0:
            yield Change(int(places[at]), float(ends[0, at]), float(ends[1, at]))
