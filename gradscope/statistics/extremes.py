"""What float64 cannot square: values whose powers leave its range, and subnormals.

The one pass does not look out for them. Where it lost something, the tensor is read again in units
of a power of two, which changes no digit; an ordinary tensor never is.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from gradscope.checkpoints.tensors import TensorRef
from gradscope.checkpoints.tiles import Tile
from gradscope.statistics import codings
from gradscope.statistics.distribution import QUANTILES, Distribution
from gradscope.statistics.histogram import Histogram
from gradscope.statistics.layout import UnitLayout
from gradscope.statistics.moments import Moments
from gradscope.statistics.scan import scan
from gradscope.statistics.tally import (
    SHIFT,
    Piece,
    Tally,
    bucket_values,
    combined,
    table_size,
    tally,
)

Values = npt.NDArray[np.float64]

#: Between norms of 2^-450 and 2^511 no square that matters is lost; scaled by 2^600 or 2^-600, the
#: others are there.
_LEAST_NORM, _WINDOW = 2.0**-450, 600
#: Buckets of either sign that subnormals share with zero.
_SUBNORMAL_BUCKETS = 256
#: What makes the subnormals of each type normal float64 values.
_LIFT = {"F32": 0, "F64": 60}


def exponent_of(low: float | int, high: float | int) -> int:
    """The power of two that values between these are less than."""
    return math.frexp(max(abs(low), abs(high)))[1]


def moments(whole: Tally) -> Moments:
    """A tensor's moments, in units that keep the fourth powers of its deviations in range."""
    found = whole.moments()
    low, high = whole.extremes()
    if low is None or high is None or whole.kind != "F64" or found.hold(low, high):
        return found
    exponent = exponent_of(low, high)
    parts = (np.ldexp(values, -exponent) for values in _pieces(whole.ref))
    rows = [Moments.of(part[np.isfinite(part)]).row() for part in parts]
    return Moments.merged(np.array(rows)).in_units(exponent)


def unit_norms(whole: Tally) -> Values | None:
    """L2 norm of each unit's finite elements; None below two dimensions."""
    norms = whole.unit_norms()
    if norms is None or whole.kind != "F64":
        return norms
    with np.errstate(over="ignore", under="ignore"):
        for lost, window in ((_vanished(whole, norms), _WINDOW), (np.isinf(norms), -_WINDOW)):
            if lost.any():
                again = tally(Tile(whole.ref, 0, whole.ref.numel), _Scaled(window), whole.layout)
                found = again.unit_norms()
                assert found is not None
                norms[lost] = np.ldexp(found[lost], -window)
    return norms


def _vanished(whole: Tally, norms: Values) -> npt.NDArray[np.bool_]:
    """Units whose squares may have vanished: of small norm, where there are elements so small."""
    assert whole.table is not None
    half = (table_size("F64") or 0) // 2
    buckets = np.unique(whole.table.codes % half)
    smallest = bucket_values("F64")[buckets[buckets > 0][:1]]
    tiny = whole.subnormals() > 0 or bool((smallest < _LEAST_NORM).any())
    return (norms < _LEAST_NORM) & tiny


class _Scaled:
    """The compiled scan of a float64 tensor's elements times a power of two."""

    def __init__(self, exponent: int) -> None:
        self.exponent = exponent

    def __call__(
        self,
        ref: TensorRef,
        first: int,
        stored: npt.NDArray[np.float64],
        table: npt.NDArray[np.uint32] | None,
        layout: UnitLayout | None = None,
    ) -> Piece:
        scaled = np.ldexp(_real(ref, stored), self.exponent)
        return scan(replace(ref, dtype="F64"), first, scaled, table, layout)


def _pieces(ref: TensorRef) -> Iterator[Values]:
    """The elements piece by piece; complex ones by magnitude."""
    return (_real(ref, stored) for _, stored in Tile(ref, 0, ref.numel).pieces())


def _real(ref: TensorRef, stored: Values) -> Values:
    return codings.magnitude(stored) if ref.dtype in codings.COMPLEX else stored


# -- subnormals ------------------------------------------------------------------------------------


def among_subnormals(whole: Tally, found: Distribution) -> bool:
    """Whether what is reported of a distribution may lie among subnormals, which have few buckets.

    Zeros share one with them, but a rank that is among the zeros however many of the subnormals
    are negative is a zero.
    """
    many = whole.subnormals()
    if not many or whole.kind not in _LIFT or whole.payload() == "BF16":
        return False
    least = codings.FORMATS[whole.kind].smallest_normal
    negative = int(found.counts[found.values <= -least].sum())
    zeros = range(negative + many + 1, negative + whole.counts()[0] + 1)
    ranks = (max(1, math.ceil(q * found.n)) for q in QUANTILES)
    unsure = (rank for rank in ranks if rank not in zeros)
    near = any(abs(found.quantile((rank - 0.5) / found.n)) < least for rank in unsure)
    return near or (found.mad < least and 2 * whole.counts()[0] <= found.n)


def with_subnormals(whole: Tally) -> Distribution:
    """The distribution with buckets for subnormals that are as narrow as those of other values."""
    assert whole.table is not None
    table = whole.table.dense(table_size(whole.kind) or 0)
    half = len(table) // 2
    table[:_SUBNORMAL_BUCKETS] = table[half : half + _SUBNORMAL_BUCKETS] = 0
    table[0] = whole.counts()[0]
    rest = replace(whole, table=Histogram.of(table)).distribution()
    assert rest is not None
    tiny = _subnormal_buckets(whole)
    present = np.flatnonzero(tiny)
    values = np.ldexp(bucket_values("F64")[present], -_LIFT[whole.kind])
    both = np.concatenate([rest.values, values])
    order = np.argsort(both, kind="stable")
    counts = np.concatenate([rest.counts, tiny[present]])
    return Distribution(*combined(both[order], counts[order]))


def _subnormal_buckets(whole: Tally) -> npt.NDArray[np.int64]:
    """How many subnormals, lifted to normal values, have which top bits of float64."""
    least = codings.FORMATS[whole.kind].smallest_normal
    table = np.zeros(1 << 20, np.int64)
    for values in _pieces(whole.ref):
        tiny = values[(np.abs(values) < least) & (values != 0)].astype(np.float64)
        bits = np.ldexp(tiny, _LIFT[whole.kind]).view(np.uint64) >> np.uint64(SHIFT["F64"])
        table += np.bincount(bits.astype(np.intp), minlength=len(table))
    return table
