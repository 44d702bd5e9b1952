"""What a finished tally says of its tensor, and several tensors' elements pooled."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from gradscope.checkpoints.tensors import TensorRef
from gradscope.checkpoints.tiles import PIECE, read_range
from gradscope.statistics import codings, extremes
from gradscope.statistics.distribution import Distribution
from gradscope.statistics.infinity import Design, design_of_infinity
from gradscope.statistics.kernels import BLOCK
from gradscope.statistics.moments import Moments
from gradscope.statistics.records import (
    Element,
    Numerics,
    Outliers,
    Statistics,
    TensorProfile,
)
from gradscope.statistics.tally import SHIFT, Tally
from gradscope.statistics.units import LISTED, units


@dataclass(frozen=True, slots=True)
class Finished:
    """A tensor's profile with the little that pooling needs of its distribution."""

    profile: TensorProfile
    moments: Moments
    buckets: npt.NDArray[np.uint32]
    counts: npt.NDArray[np.int64]


def finish(whole: Tally) -> Finished:
    """Reduce a complete tally to the tensor's profile."""
    ref = whole.ref
    moments = extremes.moments(whole)
    distribution = _distribution(whole)
    statistics = _statistics(whole, moments, distribution)
    buckets, counts = _coarse(distribution)
    if not (codings.is_float(ref.dtype) or ref.dtype in codings.COMPLEX) or distribution is None:
        return Finished(TensorProfile(ref, statistics), moments, buckets, counts)
    described = distribution.n > 0
    result = TensorProfile(
        ref,
        statistics,
        units=units(whole),
        outliers=_outliers(whole, distribution) if described else None,
        numerics=_numerics(whole, statistics),
        nonfinite=_nonfinite(whole),
        infinity=_infinity(whole, statistics),
        sparkline=tuple(distribution.sparkline()) if described else (),
        content_hash=whole.content_hash(),
    )
    return Finished(result, moments, buckets, counts)


def _distribution(whole: Tally) -> Distribution | None:
    """The tally's distribution; of few values close together (norm gains) from a second read.

    Buckets are 2^-8 wide beside the value, so a spread below sixteen of them would be lost; those
    of subnormals are wider than that.
    """
    found = whole.distribution()
    if found is None or not found.n or whole.kind in codings.CODED:
        return found
    if whole.ref.numel > PIECE:
        near = extremes.among_subnormals(whole, found)
        return extremes.with_subnormals(whole) if near else found
    low, high = whole.extremes()
    if low == high:
        return found
    if found.mad >= abs(found.median) / 16 and not extremes.among_subnormals(whole, found):
        return found
    values = codings.decoded(whole.ref.dtype, read_range(whole.ref, 0, whole.ref.numel))
    return Distribution(*np.unique(values[np.isfinite(values)], return_counts=True))


def _statistics(whole: Tally, moments: Moments, distribution: Distribution | None) -> Statistics:
    zero, nan, posinf, neginf = whole.counts()
    low, high = whole.extremes()
    basic = Statistics(
        count=whole.ref.numel,
        nan_count=nan,
        posinf_count=posinf,
        neginf_count=neginf,
        zero_count=zero,
        zero_fraction=zero / whole.ref.numel,
        subnormal_count=whole.subnormals(),
        min=low,
        max=high,
        abs_max=None if low is None or high is None else max(abs(low), abs(high)),
        mean=moments.mean + 0.0 if moments.n and math.isfinite(moments.mean) else None,
        std=moments.std,
        rms=moments.rms,
        l2_norm=moments.l2_norm,
        entropy_bits=whole.code_entropy(),
    )
    if whole.ref.dtype in codings.INTEGERS:
        return basic
    return _described(basic, distribution, moments)


def _described(
    basic: Statistics, distribution: Distribution | None, moments: Moments
) -> Statistics:
    """``basic`` with what the shape of the distribution gives."""
    if distribution is None or distribution.n == 0:
        return basic
    trimmed = distribution.trimmed()
    shape = moments if moments.in_range else distribution.scaled()
    return replace(
        basic,
        skewness=shape.skewness,
        kurtosis=shape.kurtosis,
        trimmed_kurtosis=trimmed.kurtosis,
        trimmed_skewness=trimmed.skewness,
        median=distribution.median,
        mad=distribution.mad,
        negentropy_bits=distribution.negentropy_bits(moments),
        quantiles=distribution.quantiles(),
    )


def _numerics(whole: Tally, statistics: Statistics) -> Numerics:
    greatest = codings.greatest_finite(whole.kind)
    peak = statistics.abs_max
    headroom = math.log2(greatest) - math.log2(peak) if peak else None
    if whole.kind not in codings.CODED or whole.table is None:
        return Numerics(headroom, None, whole.payload(), None)
    at_limit = whole.counted(np.abs(whole.code_values) == greatest)
    return Numerics(headroom, at_limit / statistics.count, None, len(whole.table.codes))


def _outliers(whole: Tally, distribution: Distribution) -> Outliers:
    scale = distribution.robust_scale
    with np.errstate(over="ignore"):  # distances between the ends of float64
        top = _farthest(whole, distribution.median, scale) if scale > 0 else ()
        counts = distribution.counts_above()
    farthest = abs(top[0].value - distribution.median) if top else 0.0
    return Outliers(counts, distribution.peak_ratio(farthest), scale, top)


def _farthest(whole: Tally, median: float, scale: float) -> tuple[Element, ...]:
    """The elements farthest from the median, found by reading again the few blocks they are in.

    Each of the k farthest lies in one of the k blocks whose extremes are farthest, ties going to
    the earlier block as they go to the earlier element.
    """
    low, high = whole.block_extremes()
    reach = np.where(low <= high, np.maximum(np.abs(low - median), np.abs(high - median)), -1.0)
    limit = np.partition(reach, -LISTED)[-LISTED] if len(reach) > LISTED else -1.0
    blocks = np.flatnonzero(reach > limit)
    ties = np.flatnonzero(reach == limit)[: LISTED - len(blocks)]
    # Each of the blocks has an element at its reach, so none of the farthest is nearer than limit.
    found = [
        _beyond(whole.ref, int(block), median, max(limit, 0.0))
        for block in np.sort(np.concatenate([blocks, ties]))
    ]
    flat, values = (np.concatenate(parts) for parts in zip(*found, strict=True))
    distance = np.abs(values - median)
    nearest = np.partition(distance, -LISTED)[-LISTED] if len(distance) > LISTED else 0.0
    candidates = np.flatnonzero(distance >= nearest)
    order = candidates[np.argsort(-distance[candidates], kind="stable")[:LISTED]]
    return tuple(
        Element(_index(whole.ref, flat[i]), float(values[i]), float(distance[i] / scale))
        for i in order
    )


def _beyond(ref: TensorRef, block: int, median: float, limit: float) -> tuple[Any, Any]:
    """Flat indices and values of a block's finite elements at least so far from the median."""
    values = _block(ref, block)
    with np.errstate(invalid="ignore"):  # signalling NaNs
        far = np.abs(values - median) >= limit
    at = np.flatnonzero(far & np.isfinite(values))
    return at + block * BLOCK, values[at]


def _nonfinite(whole: Tally) -> tuple[Element, ...]:
    """The first elements that are NaN or infinite."""
    found: list[Element] = []
    for block in whole.dirty_blocks():
        values = _block(whole.ref, int(block))
        bad = np.flatnonzero(~np.isfinite(values))[: LISTED - len(found)]
        found += [Element(_index(whole.ref, block * BLOCK + i), float(values[i])) for i in bad]
        if len(found) == LISTED:
            break
    return tuple(found)


def _infinity(whole: Tally, statistics: Statistics) -> Design | None:
    """Why it holds infinities on purpose, found by reading again what holds nothing worse."""
    ref = whole.ref
    if statistics.nan_count or not statistics.posinf_count + statistics.neginf_count:
        return None
    read = lambda start, stop: codings.decoded(ref.dtype, read_range(ref, start, stop))  # noqa: E731
    return design_of_infinity(ref.shape, read, PIECE)


def _block(ref: TensorRef, block: int) -> npt.NDArray[np.float64]:
    """The values of one block."""
    start = block * BLOCK
    return codings.decoded(ref.dtype, read_range(ref, start, min(start + BLOCK, ref.numel)))


def _index(ref: TensorRef, flat: int) -> tuple[int, ...]:
    index: list[int] = []
    rest = int(flat)
    for length in reversed(ref.shape):
        rest, at = divmod(rest, length)
        index.append(at)
    return tuple(reversed(index))


def _coarse(
    distribution: Distribution | None,
) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.int64]]:
    """A distribution on the buckets that all dtypes share: the top 20 bits of float64."""
    if distribution is None:
        return np.empty(0, np.uint32), np.empty(0, np.int64)
    buckets = distribution.values.view(np.uint64) >> np.uint64(SHIFT["F64"])
    return buckets.astype(np.uint32), distribution.counts


def _pooled(parts: Sequence[Moments], low: float | int, high: float | int) -> Moments:
    """All parts' moments, in units of the greatest magnitude where float64 would not hold them."""
    if all(part.exponent == 0 for part in parts):
        found = Moments.pooled(parts, 0)
        if found.hold(low, high):
            return found
    return Moments.pooled(parts, extremes.exponent_of(low, high))


class Member(NamedTuple):
    """What a pool keeps of each of its tensors, in their order: moments merge on a tree."""

    name: str
    statistics: Statistics
    moments: Moments


class Pool:
    """Several tensors' elements as one: exact counts and moments, quantiles within 0.4 %."""

    def __init__(self, members: Iterable[Member] = ()) -> None:
        self.members = list(members)
        self.histogram = BucketCounts()

    @property
    def tensors(self) -> int:
        """How many there are."""
        return len(self.members)

    def add(self, part: Finished) -> None:
        """Take in one tensor."""
        measured = part.profile
        self.members.append(Member(measured.ref.name, measured.statistics, part.moments))
        self.histogram.add(part.buckets, part.counts)

    def merge(self, other: Pool) -> Pool:
        """Both pools' elements, as a new pool."""
        both = Pool(self.members + other.members)
        for part in (self, other):
            both.histogram.add(*part.histogram.counted())
        return both

    def statistics(self) -> Statistics:
        """The statistics of all elements together."""
        each = [member.statistics for member in self.members]
        total = {name: sum(getattr(s, name) for s in each) for name in _COUNTERS}
        lows = [s.min for s in each if s.min is not None]
        highs = [s.max for s in each if s.max is not None]
        parts = [member.moments for member in self.members]
        moments = _pooled(parts, min(lows, default=0), max(highs, default=0))
        basic = Statistics(
            **total,
            zero_fraction=total["zero_count"] / total["count"] if total["count"] else None,
            min=min(lows, default=None),
            max=max(highs, default=None),
            abs_max=max((abs(v) for v in lows + highs), default=None),
            mean=moments.mean + 0.0 if moments.n and math.isfinite(moments.mean) else None,
            std=moments.std,
            rms=moments.rms,
            l2_norm=moments.l2_norm,
        )
        return _described(basic, self._distribution(basic), moments)

    def _distribution(self, basic: Statistics) -> Distribution | None:
        buckets, counts = self.histogram.counted()
        if not len(buckets) or basic.min is None or basic.max is None:
            return None
        shift = SHIFT["F64"]
        middle = (buckets.astype(np.uint64) << np.uint64(shift)) | np.uint64(1 << (shift - 1))
        values = middle.view(np.float64)
        values[(buckets == 0) | (buckets == 1 << 19)] = 0.0
        values = np.clip(values, basic.min, basic.max)
        order = np.argsort(values, kind="stable")
        return Distribution(values[order], counts[order])


class BucketCounts:
    """Counts by bucket, of many tensors; a pool of few never pays for all buckets there are."""

    #: Entries that may wait to be added up.
    _WAITING = 1 << 16

    def __init__(self) -> None:
        self._parts: list[tuple[npt.NDArray[np.uint32], npt.NDArray[np.int64]]] = []
        self._waiting = 0

    def add(self, buckets: npt.NDArray[np.uint32], counts: npt.NDArray[np.int64]) -> None:
        """Take in the counts of some buckets."""
        self._parts.append((buckets, counts))
        self._waiting += len(buckets)
        if self._waiting > self._WAITING:
            self._parts = [self.counted()]
            self._waiting = 0

    def counted(self) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.int64]]:
        """The buckets that hold anything, ascending, and their counts."""
        if not self._parts:
            return np.empty(0, np.uint32), np.empty(0, np.int64)
        buckets, counts = map(np.concatenate, zip(*self._parts, strict=True))
        order = np.argsort(buckets, kind="stable")  # which merges what is in order already
        buckets = buckets[order]
        starts = np.flatnonzero(np.diff(buckets, prepend=~buckets[:1]))
        return buckets[starts], np.add.reduceat(counts[order], starts)


_COUNTERS = ("count", "nan_count", "posinf_count", "neginf_count", "zero_count", "subnormal_count")
