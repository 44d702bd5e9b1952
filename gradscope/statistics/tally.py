"""Tallies: what one pass over some of a tensor's elements leaves behind. Tallies merge exactly."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from gradscope.checkpoints.tensors import TensorRef
from gradscope.checkpoints.tiles import PIECE, Tile
from gradscope.statistics import codings, kernels
from gradscope.statistics.distribution import Distribution
from gradscope.statistics.histogram import Histogram, cleared_after
from gradscope.statistics.layout import UnitLayout
from gradscope.statistics.moments import Moments
from gradscope.statistics.unit_sums import UnitSums, UnitTree

Array = npt.NDArray[Any]

#: bits >> SHIFT leaves sign, exponent and eight bits of mantissa.
SHIFT = {"F32": 15, "F64": 44}


class Scan(Protocol):
    """Measures one piece: its first flat index, its stored elements, the table to add to."""

    def __call__(
        self,
        ref: TensorRef,
        first: int,
        stored: Array,
        table: Array | None,
        layout: UnitLayout | None = None,
    ) -> Piece:
        """``layout`` where the units are not the rows."""
        ...


@dataclass(frozen=True, slots=True)
class Piece:
    """What a kernel returns of one piece beside the histogram it adds to."""

    index: int
    moments: Array | None = None  # [n, mean, M2, M3, M4]; None where the histogram has them
    counts: tuple[int, int, int, int] = (0, 0, 0, 0)  # zero, NaN, +Inf, -Inf
    union: int = 0
    squares: Array | None = None  # float64, per row the piece touches
    hashes: Array | None = None  # uint64, likewise
    lows: Array | None = None  # per block, least finite value as ordered bits
    highs: Array | None = None
    dirty: Array | None = None  # per block, whether it holds a non-finite element
    least: int | None = None  # exact extremes of wide integers
    greatest: int | None = None
    units: UnitSums | None = None  # where the units are not the rows


@dataclass
class Tally:
    """A mergeable summary of some pieces of one tensor; ``merge`` is exact and commutes.

    Integer counters add up; what is not associative (moments, the sums of rows that several
    pieces share) stays one entry a piece until the tally is complete and is asked for results,
    which reduce it by position.
    """

    ref: TensorRef
    table: Histogram | None
    pieces: list[Piece] = field(default_factory=list)
    layout: UnitLayout | None = None
    units: UnitTree = field(default_factory=UnitTree)

    def take(self, piece: Piece) -> None:
        """Take in one piece."""
        if piece.units is not None:
            self.units.add(piece.index, piece.units)
            piece = replace(piece, units=None)
        self.pieces.append(piece)

    def merge(self, other: Tally) -> None:
        """Take in another tally of the same tensor, of other pieces."""
        if self.table is not None and other.table is not None:
            self.table = self.table.merge(other.table)
        self.pieces += other.pieces
        self.units.merge(other.units)

    def in_order(self) -> list[Piece]:
        """The pieces by position."""
        return sorted(self.pieces, key=lambda piece: piece.index)

    @property
    def kind(self) -> str:
        """The real type the elements were measured as: complex ones by magnitude."""
        return codings.MAGNITUDE.get(self.ref.dtype, self.ref.dtype)

    # -- what the whole tensor's tally gives ---------------------------------------------------

    @cached_property
    def code_values(self) -> npt.NDArray[np.float64]:
        """The values of the codes that occur; of types that are counted code by code."""
        assert self.table is not None
        return codings.code_values(self.kind)[self.table.codes]

    def counted(self, where: npt.NDArray[np.bool_]) -> int:
        """How many elements have one of the codes that occur, given by a flag for each."""
        assert self.table is not None
        return int(self.table.counts[where].sum())

    def counts(self) -> tuple[int, int, int, int]:
        """How many elements are zero, NaN, +Inf, -Inf."""
        if self.kind in codings.CODED:
            values = self.code_values
            tests = (values == 0, np.isnan(values), values == np.inf, values == -np.inf)
            zero, nan, posinf, neginf = map(self.counted, tests)
        else:
            zero, nan, posinf, neginf = (
                sum(c) for c in zip(*(p.counts for p in self.pieces), strict=True)
            )
        return zero, nan, posinf, neginf

    def extremes(self) -> tuple[float | int | None, float | int | None]:
        """Exact least and greatest finite element."""
        return self._extremes

    @cached_property
    def _extremes(self) -> tuple[float | int | None, float | int | None]:
        lows = [p.least for p in self.pieces if p.least is not None]
        if lows:
            return min(lows), max(p.greatest for p in self.pieces if p.greatest is not None)
        if self.kind in codings.CODED:
            values = self._coded_values[0]
            if not len(values):
                return None, None
            integral = self.kind in codings.INTEGERS
            return (
                (int(values[0]), int(values[-1]))
                if integral
                else (float(values[0]), float(values[-1]))
            )
        low, high = self.block_extremes()
        finite = low <= high
        return (
            (float(low[finite].min()), float(high[finite].max())) if finite.any() else (None, None)
        )

    def block_extremes(self) -> tuple[Array, Array]:
        """Least and greatest finite value of each block; +inf, -inf where it has none."""
        return self._block_extremes

    @cached_property
    def _block_extremes(self) -> tuple[Array, Array]:
        pieces = self.in_order()
        lows = _from_ordered(np.concatenate([p.lows for p in pieces if p.lows is not None]))
        highs = _from_ordered(np.concatenate([p.highs for p in pieces if p.highs is not None]))
        empty = np.isnan(lows)
        return np.where(empty, np.inf, lows), np.where(empty, -np.inf, highs)

    def dirty_blocks(self) -> npt.NDArray[np.intp]:
        """Which blocks hold a non-finite element, ascending."""
        flags = [p.dirty for p in self.in_order() if p.dirty is not None]
        return np.flatnonzero(np.concatenate(flags)) if flags else np.empty(0, np.intp)

    def distribution(self) -> Distribution | None:
        """The finite elements' distribution: exact codes, or buckets of the top bits."""
        if self.table is None:
            return None
        if self.kind in codings.CODED:
            return Distribution(*self._coded_values)
        return self._bucketed()

    def subnormals(self) -> int:
        """How many elements are smaller than the least normal value of their type."""
        if self.table is None or not codings.is_float(self.kind):
            return 0
        if not codings.FORMATS[self.kind].signed:
            return 0  # E8M0 is normal throughout
        if self.kind in codings.CODED:
            values = np.abs(self.code_values)
            return self.counted(
                (values > 0) & (values < codings.FORMATS[self.kind].smallest_normal)
            )
        half = (table_size(self.kind) or 0) // 2
        lowest = self.table.codes % half < 256  # an exponent of zero, of either sign
        return int(self.table.counts[lowest].sum()) - self.counts()[0]

    def moments(self) -> Moments:
        """Moments of the finite elements."""
        if self.kind in codings.CODED:
            return Moments.of(*self._coded_values)
        rows = [p.moments for p in self.in_order() if p.moments is not None]
        found = Moments.merged(np.array(rows)) if rows else Moments()
        low, high = self.extremes()
        if low is not None and low == high:  # rounding would give a constant a spread and a shape
            return Moments(found.n, float(low))
        return found

    def code_entropy(self) -> float | None:
        """Shannon entropy of the stored codes; None for types with too many codes to count."""
        if self.table is None or self.kind not in codings.CODED or not len(self.table.codes):
            return None
        counts = self.table.counts
        return Distribution(np.arange(len(counts), dtype=np.float64), counts).entropy_bits()

    def payload(self) -> str | None:
        """The narrower type that every finite float32 element fits without loss, if any."""
        if self.ref.dtype != "F32" or self.extremes()[0] is None:
            return None
        union = 0
        for piece in self.pieces:
            union |= piece.union
        if union & 0xFFFF == 0:
            return "BF16"
        return "F16" if union & 0x1FFF == 0 and self._in_float16_range() else None

    def _in_float16_range(self) -> bool:
        """Whether values of ten mantissa bits are within float16's exponents too.

        Its subnormals are multiples of 2^-24, which the buckets show of all but the last one or
        two bits of values from 2^-16 to 2^-14.
        """
        assert self.table is not None
        low, high = self.extremes()
        assert low is not None
        assert high is not None
        steps = bucket_values("F32", exact=True)[self.table.codes] * 2.0**24
        in_steps = bool((steps == np.floor(steps)).all()) and self.subnormals() == 0
        return in_steps and max(-low, high) <= codings.greatest_finite("F16")

    def unit_norms(self) -> npt.NDArray[np.float64] | None:
        """L2 norm of each unit's finite elements; None below two dimensions."""
        return np.sqrt(self.units.total().squares) if self.units.nodes else self.row_norms()

    def unit_hashes(self) -> npt.NDArray[np.uint64]:
        """A 64-bit hash of each unit's stored elements."""
        return self.units.total().hashes if self.units.nodes else self.row_hashes()

    def row_norms(self) -> npt.NDArray[np.float64] | None:
        """L2 norm of each row's finite elements; None below two dimensions.

        Where units are contiguous those of stacked matrices are meant.
        """
        if self.ref.rows is None:
            return None
        inner, edges = self._rows("squares", np.float64)
        for row, parts in edges.items():
            inner[row] = math.fsum(parts)
        return np.sqrt(inner)

    def row_hashes(self) -> npt.NDArray[np.uint64]:
        """A 64-bit hash of each row's stored elements; the whole tensor's below two dimensions."""
        inner, edges = self._rows("hashes", np.uint64)
        for row, parts in edges.items():
            inner[row] = sum(map(int, parts)) % 2**64
        return inner

    def content_hash(self) -> str | None:
        """A digest equal for tensors of one dtype and shape whose stored elements are equal.

        Both must be stacks of matrices, or neither.
        """
        if self.table is None or not codings.is_float(self.ref.dtype) or not self.pieces:
            return None
        digest = hashlib.blake2b(self.row_hashes().tobytes(), digest_size=16)
        digest.update(f"{self.ref.dtype}{self.ref.shape}".encode())
        return digest.hexdigest()

    def _rows(self, name: str, dtype: type[np.generic]) -> tuple[Array, dict[int, list[Any]]]:
        """Rows that lie in one piece, and the shares of those that pieces share."""
        length = row_numel(self.ref, self.layout)
        inner = np.zeros(max(self.ref.numel // length, 1), dtype)
        edges: dict[int, list[Any]] = {}
        for piece in self.in_order():
            values = getattr(piece, name)
            first = piece.index * PIECE // length
            inner[first + 1 : first + len(values) - 1] = values[1:-1]
            edges.setdefault(first, []).append(values[0])
            if len(values) > 1:
                edges.setdefault(first + len(values) - 1, []).append(values[-1])
        return inner, edges

    @cached_property
    def _coded_values(self) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
        assert self.table is not None
        found = self.table.ordered(_ranks(self.kind))
        return combined(codings.code_values(self.kind)[found.codes], found.counts)

    def _bucketed(self) -> Distribution:
        assert self.table is not None
        low, high = self.extremes()
        if low is None:
            return Distribution(np.empty(0), np.empty(0, np.int64))
        found = self.table.ordered(_ranks(self.kind))
        values = bucket_values(self.kind, exact=self.payload() == "BF16")[found.codes]
        return Distribution(*combined(np.clip(values, low, high), found.counts))


def tally(tile: Tile, scan: Scan, layout: UnitLayout | None = None) -> Tally:
    """Measure one tile with the kernels of a device; units are rows where no layout says else."""
    ref = tile.ref
    kind = codings.MAGNITUDE.get(ref.dtype, ref.dtype)
    size = table_size(kind)
    found = Tally(ref, None, layout=layout)
    apart = None if layout is None or layout.is_rows else layout
    if size is not None and tile.stop - tile.start <= _SMALL and kind == ref.dtype:
        ((first, stored),) = tile.pieces()
        codes = np.unique(_codes(kind, stored))
        with cleared_after(size, codes) as small:
            found.take(scan(ref, first, stored, small, apart))
            found.table = Histogram.among(small, codes)
        return found
    table = None if size is None else np.zeros(size, np.uint32)
    for first, stored in tile.pieces():
        found.take(scan(ref, first, stored, table, apart))
    found.table = None if table is None else Histogram.of(table)
    return found


#: Elements up to which sorting them costs less than clearing and searching a table of all codes.
_SMALL = 4096


def _codes(kind: str, stored: Array) -> Array:
    """The codes of stored elements, or their buckets: what kernels count of the finite ones."""
    bits = stored.view(f"u{stored.itemsize}")
    return bits if kind in codings.CODED else bits >> bits.dtype.type(SHIFT[kind])


def row_numel(ref: TensorRef, layout: UnitLayout | None = None) -> int:
    """Elements a row, or a unit that is as contiguous; below two dimensions all is one row."""
    if layout is not None and layout.contiguous:
        return layout.inner
    return max(ref.row_numel if ref.rows is not None else ref.numel, 1)


def table_size(kind: str) -> int | None:
    """Counters that a type's histogram has; None for integers of 32 bits and more."""
    if kind in codings.CODED:
        return len(codings.code_values(kind))
    return {"F32": 1 << 17, "F64": 1 << 20}.get(kind)


@cache
def _ranks(kind: str) -> npt.NDArray[np.intp]:
    """The place of each code (or bucket) in ascending order of value; negative of no finite one."""
    values = codings.code_values(kind) if kind in codings.CODED else bucket_values(kind)
    order = np.argsort(values, kind="stable")
    order = order[np.isfinite(values[order])]
    ranks = np.full(len(values), -1, np.intp)
    ranks[order] = np.arange(len(order))
    return ranks


_BUCKETS: dict[tuple[str, bool], npt.NDArray[np.float64]] = {}


def bucket_values(kind: str, exact: bool = False) -> npt.NDArray[np.float64]:
    """The middle (or, ``exact``, the edge nearest zero) of each bucket of the top bits."""
    if (kind, exact) not in _BUCKETS:
        shift = SHIFT[kind]
        unsigned: Any = np.uint32 if kind == "F32" else np.uint64
        size = table_size(kind)
        assert size is not None
        bits: Array = np.arange(size, dtype=unsigned) << unsigned(shift)
        if not exact:
            bits |= unsigned(1 << (shift - 1))
        with np.errstate(invalid="ignore"):  # signalling NaNs
            values = bits.view(np.float32 if kind == "F32" else np.float64).astype(np.float64)
        values[[0, size // 2]] = 0.0  # zeros, and subnormals too small to matter
        _BUCKETS[kind, exact] = values
    return _BUCKETS[kind, exact]


def combined(values: Array, counts: Array) -> tuple[Array, Array]:
    """Ascending values with equal neighbours (-0 and 0, clipped buckets) made one."""
    if len(values) < 2:
        return values + 0.0, counts
    starts = np.flatnonzero(np.concatenate([[True], values[1:] != values[:-1]]))
    return values[starts] + 0.0, np.add.reduceat(counts, starts)


def _from_ordered(ordered: Array) -> npt.NDArray[np.float64]:
    """Invert the kernels' ordered integers; NaN for a block without a finite value."""
    wide = ordered.dtype == np.uint64
    sign, ones = (kernels.ORDER64 if wide else kernels.ORDER32)[:2]
    bits = np.where(ordered >= sign, ordered ^ sign, ordered ^ ones)
    with np.errstate(invalid="ignore"):
        floats: Array = bits.view(np.float64 if wide else np.float32)
        return floats.astype(np.float64)


def merged(parts: Iterable[Tally]) -> Tally:
    """All of a tensor's tallies as one."""
    first, *rest = parts
    for part in rest:
        first.merge(part)
    return first
