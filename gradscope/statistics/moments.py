"""Central moments that merge exactly, on a tree that is fixed by position."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Moments:
    """Count, mean and second to fourth central sums of a set of finite values, in float64.

    The sums are of deviations in units of 2^exponent, 1 but for values whose powers float64 lacks.
    """

    n: int = 0
    mean: float = 0.0
    m2: float = 0.0
    m3: float = 0.0
    m4: float = 0.0
    exponent: int = 0

    @classmethod
    def of(cls, values: Array, counts: npt.NDArray[np.int64] | None = None) -> Moments:
        """Two-pass moments of values, each ``counts`` times."""
        weights = np.ones(values.shape, np.int64) if counts is None else counts
        n = int(weights.sum())
        if n == 0:
            return cls()
        # Centred on a value that occurs, so that a constant has a mean and spread without rounding.
        origin = float(values[0])
        with np.errstate(over="ignore", invalid="ignore"):
            mean = origin + float(np.sum((values - origin) * weights)) / n
            d = values - mean
            square = d * d * weights
            m2, m3, m4 = square.sum(), (square * d).sum(), (square * d * d).sum()
        return cls(n, mean, float(m2), float(m3), float(m4))

    @classmethod
    def merged(cls, parts: Array) -> Moments:
        """Merge rows [n, mean, M2, M3, M4] pairwise, neighbours first.

        The tree depends on the rows' order alone, so neither workers nor tiles change a bit.
        """
        parts = parts[parts[:, 0] > 0]
        while len(parts) > 1:
            even = len(parts) // 2 * 2
            parts = np.concatenate([_pair(parts[0:even:2], parts[1:even:2]), parts[even:]])
        if not len(parts):
            return cls()
        n, mean, m2, m3, m4 = map(float, parts[0])
        return cls(int(n), mean, m2, m3, m4)

    @classmethod
    def pooled(cls, parts: Sequence[Moments], exponent: int) -> Moments:
        """Merge, with all deviations in units of 2^exponent."""
        rows = np.array([part.row(exponent) for part in parts]).reshape(-1, 5)
        return cls.merged(rows).in_units(exponent)

    def in_units(self, exponent: int) -> Moments:
        """The moments of values 2^exponent times as large."""
        return replace(self, mean=_scaled(self.mean, exponent), exponent=exponent)

    def row(self, exponent: int = 0) -> Array:
        """As a row that ``merged`` takes, of the values over 2^exponent."""
        apart = self.exponent - exponent
        if not exponent == apart == 0:
            sums = (_scaled(m, k * apart) for k, m in ((2, self.m2), (3, self.m3), (4, self.m4)))
            return np.array([self.n, _scaled(self.mean, -exponent), *sums])
        return np.array([self.n, self.mean, self.m2, self.m3, self.m4])

    def hold(self, low: float | int, high: float | int) -> bool:
        """Whether no power of values between these was too large or too small for float64."""
        powers = 0 < self.m2 < math.inf and self.in_range and math.isfinite(self.mean)
        return low == high or powers

    @property
    def in_range(self) -> bool:
        """Whether the fourth powers of the deviations neither overflowed nor vanished."""
        return self.m2 == 0 or 1e-290 <= self.m4 < math.inf

    @property
    def std(self) -> float | None:
        """Population standard deviation; None when there is no value or its square overflowed."""
        if not self.n or not math.isfinite(self.m2):
            return None
        return math.ldexp(math.sqrt(self.m2 / self.n), self.exponent)

    @property
    def rms(self) -> float | None:
        """Root mean square; None where ``std`` is."""
        return None if self.std is None else math.hypot(self.mean, self.std)

    @property
    def l2_norm(self) -> float | None:
        """Frobenius norm; None where it is beyond float64."""
        norm = math.inf if self.rms is None else self.rms * math.sqrt(self.n)
        return norm if math.isfinite(norm) else None

    @property
    def skewness(self) -> float | None:
        """g1 = m3 / m2^1.5; None below three values or when all are equal."""
        return self._standardised(self.m3, 3)

    @property
    def kurtosis(self) -> float | None:
        """Excess kurtosis g2 = m4 / m2^2 - 3; None below four values or when all are equal."""
        ratio = self._standardised(self.m4, 4)
        return None if ratio is None else ratio - 3

    def _standardised(self, total: float, order: int) -> float | None:
        if self.n < order or not self.m2 > 0:
            return None
        # In units of the deviation first: squares of tiny or huge spreads leave the range.
        ratio = total / self.n
        deviation = math.sqrt(self.m2 / self.n)
        for _ in range(order):
            ratio /= deviation
        return ratio if math.isfinite(ratio) else None


def _scaled(value: float, exponent: int) -> float:
    """value 2^exponent, which is infinite beyond float64's range."""
    with np.errstate(over="ignore", under="ignore"):
        return float(np.ldexp(value, exponent))


def _pair(a: Array, b: Array) -> Array:
    """Chan, Golub, LeVeque (1979) and Pébay (SAND2008-6212, eq. 2.1), on rows."""
    with np.errstate(over="ignore", invalid="ignore"):  # float64 values beyond 1e77
        return _pair_rows(a, b)


def _pair_rows(a: Array, b: Array) -> Array:
    na, nb = a[:, 0], b[:, 0]
    n = na + nb
    d = b[:, 1] - a[:, 1]
    dn = d / n
    m4 = a[:, 4] + b[:, 4] + d * dn**3 * na * nb * (na * na - na * nb + nb * nb)
    m4 += 6 * dn**2 * (na * na * b[:, 2] + nb * nb * a[:, 2]) + 4 * dn * (
        na * b[:, 3] - nb * a[:, 3]
    )
    m3 = (
        a[:, 3] + b[:, 3] + d * dn**2 * na * nb * (na - nb) + 3 * dn * (na * b[:, 2] - nb * a[:, 2])
    )
    m2 = a[:, 2] + b[:, 2] + d * dn * na * nb
    return np.stack([n, a[:, 1] + dn * nb, m2, m3, m4], axis=1)
