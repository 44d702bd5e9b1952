"""What follows from a distribution: ascending values and how often each occurs.

For types of 16 bits and fewer these are the stored values themselves and everything is exact; for
wider floats they are the buckets of the top-bits histogram (relative width 2^-8, represented by
their middle), so quantiles and what rests on them are within 0.2 %.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from gradscope.statistics.moments import Moments

QUANTILES = (0.001, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 0.999)
#: Robust scores above which elements are counted.
SCORES = (4, 6, 8, 10, 20, 50, 100)
#: The median absolute deviation of a Gaussian is its standard deviation over this.
GAUSSIAN_MAD = 1.482602218505602
#: Share of elements that trimmed moments leave out.
TRIMMED = 0.001


@dataclass(frozen=True)
class Distribution:
    """Distinct finite values, ascending, and their counts (all positive)."""

    values: npt.NDArray[np.float64]
    counts: npt.NDArray[np.int64]

    @cached_property
    def n(self) -> int:
        """Number of elements."""
        return int(self.counts.sum())

    @cached_property
    def _cumulative(self) -> npt.NDArray[np.int64]:
        return np.cumsum(self.counts)

    def quantile(self, q: float) -> float:
        """The smallest value whose cumulative share reaches q (NumPy's ``inverted_cdf``)."""
        rank = max(1, math.ceil(q * self.n))
        return float(self.values[np.searchsorted(self._cumulative, rank)])

    def quantiles(self) -> dict[str, float]:
        """The quantiles every tensor is reported with."""
        return {str(q): self.quantile(q) for q in QUANTILES}

    @cached_property
    def median(self) -> float:
        """The lower median."""
        return self.quantile(0.5)

    @cached_property
    def _by_distance(self) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.intp]]:
        with np.errstate(over="ignore"):
            distance = np.abs(self.values - self.median)
        order = np.argsort(distance, kind="stable")
        return distance[order], order

    @cached_property
    def mad(self) -> float:
        """Median absolute deviation from the median, unscaled."""
        distance, order = self._by_distance
        cumulative = np.cumsum(self.counts[order])
        return float(distance[np.searchsorted(cumulative, (self.n + 1) // 2)])

    def trimmed(self) -> Moments:
        """Moments, in some unit, without the 0.1 % of elements farthest from the median."""
        return self._of_nearest(self.n - int(self.n * TRIMMED))

    def scaled(self) -> Moments:
        """Moments of all elements, from the median in a unit that keeps fourth powers in range."""
        return self._of_nearest(self.n)

    def _of_nearest(self, keep: int) -> Moments:
        distance, order = self._by_distance
        counts = self.counts[order]
        before = np.cumsum(counts) - counts
        kept = np.clip(keep - before, 0, counts)
        used = kept > 0
        unit = _unit(distance[used].max())
        deviations = self.values[order][used] * unit - self.median * unit
        _, exponent = np.frexp(np.abs(deviations).max())
        return Moments.of(np.ldexp(deviations, -exponent), kept[used])

    @cached_property
    def robust_scale(self) -> float:
        """A standard deviation outliers cannot inflate; 0 when nearly all values are equal.

        1.4826 MAD, or where more than half of the elements are equal the width that holds 99.8 %.
        Also 0 where that is beyond float64.
        """
        scale = GAUSSIAN_MAD * self.mad
        if not scale > 0:
            scale = (self.quantile(0.999) - self.quantile(0.001)) / 6.180464612335626
        return scale if math.isfinite(scale) else 0.0

    def counts_above(self) -> dict[str, int]:
        """Elements whose robust score |x - median| / scale exceeds each of SCORES."""
        if not self.robust_scale > 0:
            return dict.fromkeys(map(str, SCORES), 0)
        distance, order = self._by_distance
        first = np.searchsorted(distance, np.array(SCORES) * self.robust_scale, side="right")
        above = self.n - np.concatenate([[0], np.cumsum(self.counts[order])])[first]
        return {str(s): int(count) for s, count in zip(SCORES, above, strict=True)}

    def peak_ratio(self, farthest: float) -> float | None:
        """The greatest robust score over the one expected of n Gaussian values, sqrt(2 ln n)."""
        if self.n < 2 or not self.robust_scale > 0:
            return None
        return farthest / self.robust_scale / math.sqrt(2 * math.log(self.n))

    def entropy_bits(self) -> float:
        """Shannon entropy of the values, in bits an element."""
        p = self.counts / self.n
        return max(0.0, float(-(p * np.log2(p)).sum()))

    def negentropy_bits(self, moments: Moments, least: int = 1000) -> float | None:
        """How far from Gaussian: entropy of a Gaussian of the same variance minus this one's.

        The differential entropy is that of a histogram of bins a 32nd of a standard deviation
        wide, with Miller and Madow's (1955) bias correction; 0 for a Gaussian, 0.105 for a
        Laplace, 0.25 for a uniform distribution. None below ``least`` elements or without spread.
        """
        std = moments.std
        if std is None or moments.n < least or not std > 0:
            return None
        _, exponent = math.frexp(std)  # lest a tiny std has no inverse, a huge value no difference
        values, mean = np.ldexp(self.values, -exponent), math.ldexp(moments.mean, -exponent)
        bins = np.floor((values - mean) * (32 / math.ldexp(std, -exponent)) + 0.5)
        starts = np.flatnonzero(np.diff(bins, prepend=-np.inf))
        p = np.add.reduceat(self.counts, starts) / self.n
        entropy = -(p * np.log2(p)).sum() + (len(p) - 1) / (2 * self.n * math.log(2))
        gaussian = 0.5 * math.log2(2 * math.pi * math.e) + 5
        return float(gaussian - entropy)

    def sparkline(self, bins: int = 24) -> list[int]:
        """Counts in equal bins from the 0.1 % to the 99.9 % quantile, for a small drawing."""
        low, high = self.quantile(0.001), self.quantile(0.999)
        if not high > low:
            return [self.n]
        inside = (self.values >= low) & (self.values <= high)
        unit = _unit(high - low)
        place = (self.values[inside] * unit - low * unit) / (high * unit - low * unit) * bins
        counts = np.bincount(
            np.minimum(place.astype(np.int64), bins - 1), self.counts[inside], bins
        )
        return [int(c) for c in counts]


def _unit(width: float) -> float:
    """What to multiply float64 values by, lest a difference of them overflow."""
    return 0.5 if math.isinf(width) else 1.0
