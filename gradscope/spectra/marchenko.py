"""Where the spectrum of a random matrix would end (Marchenko and Pastur 1967), and what is beyond.

The scale of the bulk is that of the median eigenvalue, which spikes cannot move (Gavish and Donoho
2014); the margin is that of the Tracy-Widom law (Johnstone 2001).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

Values = npt.NDArray[np.float64]

#: The 99 % quantile of the Tracy-Widom law of real matrices.
_TRACY_WIDOM = 2.02
_POINTS = 4096


@dataclass(frozen=True, slots=True)
class Bulk:
    """The bulk of a spectrum: the deviation of its elements, its edge as a singular value."""

    scale: float
    edge: float
    #: Singular values beyond the edge and its margin.
    spikes: int
    #: Greatest difference between the distributions of the eigenvalues and of a random matrix of
    #: the same norm.
    distance: float


def bulk(eigenvalues: Values, rows: int, columns: int) -> Bulk | None:
    """The bulk of the squared singular values of a matrix; None where half of them are zero."""
    short, long = sorted((rows, columns))
    if len(eigenvalues) != short or short < 2:
        return None
    median, mean = float(np.median(eigenvalues)), float(eigenvalues.mean())
    if not median > 1e-12 * mean:
        return None
    variance = median / (long * _quantiles(short / long).median)
    root = math.sqrt(long) + math.sqrt(short)
    margin = root * (1 / math.sqrt(long) + 1 / math.sqrt(short)) ** (1 / 3)
    beyond = eigenvalues > variance * (root**2 + _TRACY_WIDOM * margin)
    law = _quantiles(short / long)
    return Bulk(
        math.sqrt(variance), math.sqrt(variance) * root, int(beyond.sum()),
        law.distance(eigenvalues / mean),
    )  # fmt: skip


def random_rank(rows: int, columns: int) -> float:
    """The effective rank that a random matrix of that shape has: exp of the entropy of its law."""
    short, long = sorted((rows, columns))
    law = _quantiles(short / long)
    sigma = np.sqrt(np.interp((np.arange(short) + 0.5) / short, law.cumulative, law.values))
    shares = sigma / sigma.sum()
    return float(np.exp(-(shares * np.log(shares)).sum()))


@dataclass(frozen=True, slots=True)
class _Law:
    """The law of the eigenvalues of a random matrix, in units of their mean."""

    values: Values
    cumulative: Values

    @property
    def median(self) -> float:
        return float(np.interp(0.5, self.cumulative, self.values))

    def distance(self, found: Values) -> float:
        """Of Kolmogorov and Smirnov, between some values and the law."""
        ordered = np.sort(found)
        law = np.interp(ordered, self.values, self.cumulative)
        ranks = np.arange(len(ordered)) / len(ordered)
        return float(np.maximum(law - ranks, ranks + 1 / len(ordered) - law).max())


@lru_cache(maxsize=256)
def _quantiles(ratio: float) -> _Law:
    """For a ratio of the sides up to 1. In the angle of x = a + (b - a)(1 - cos t) / 2 the density
    has no singularity.
    """
    a, b = (1 - math.sqrt(ratio)) ** 2, (1 + math.sqrt(ratio)) ** 2
    angles = (np.arange(_POINTS) + 0.5) * (math.pi / _POINTS)
    values = a + (b - a) * (1 - np.cos(angles)) / 2
    density = ((b - a) / 2 * np.sin(angles)) ** 2 / (2 * math.pi * ratio * values)
    steps = density * (math.pi / _POINTS)
    cumulative = np.cumsum(steps) - steps / 2
    return _Law(values, cumulative / steps.sum())
