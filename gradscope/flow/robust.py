"""Robust statistics of series: functions of arrays alone, columns are series unless said."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradscope.flow.limits import MIN_TREND, MIN_WINDOW

Array = NDArray[np.float64]

#: What makes the median absolute deviation of Gaussian values their standard deviation.
GAUSSIAN = 1.4826
_PIECE = 1 << 16


def nanmedian(values: Any, axis: int | None = None, least: float = -math.inf) -> Any:
    """The median of what is not NaN, and not below ``least``; NaN where nothing is.

    A piece at a time: copies of arrays as large as a history cost more than the medians.
    """
    array = np.asarray(values, dtype=np.float64)
    moved = array.reshape(1, -1) if axis is None else np.moveaxis(array, axis, -1)
    if moved.ndim == 1:
        return _medians(moved[None], least)[0]
    out = np.empty(moved.shape[:-1])
    rows = max(1, _PIECE * len(moved) // max(1, moved.size))
    for first in range(0, len(moved), rows):
        out[first : first + rows] = _medians(moved[first : first + rows], least)
    return out[0] if axis is None else out


def _medians(values: Array, least: float) -> Array:
    """Medians over the last axis.

    NumPy's own ``nanmedian`` goes through masked arrays, ten times slower on the shapes used here,
    and its ``median`` looks for NaN by a partition at three places instead of one.
    """
    count = values.shape[-1]
    known = values >= least
    if count and known.all():
        parted = np.partition(values, count // 2, axis=-1)
        high, low = parted[..., count // 2], parted[..., : count // 2]
        return high if count % 2 else _between(low.max(axis=-1), high)
    if not count:
        return np.full(values.shape[:-1], np.nan)
    ordered = np.sort(np.where(known, values, np.nan), axis=-1)  # NaN sorts last
    counts = known.sum(axis=-1, keepdims=True)
    low = np.take_along_axis(ordered, np.maximum(counts - 1, 0) // 2, -1)
    high = np.take_along_axis(ordered, np.minimum(counts // 2, count - 1), -1)
    return np.where(counts > 0, _between(low, high), np.nan)[..., 0]


def _between(low: Array, high: Array) -> Array:
    with np.errstate(invalid="ignore"):
        return np.where(low == high, low, 0.5 * (low + high))


def spread(values: Any, axis: int | None = None) -> Any:
    """1.4826 times the median absolute deviation of what is not NaN."""
    centre = nanmedian(values, axis=axis)
    aligned = centre if axis is None else np.expand_dims(centre, axis)
    with np.errstate(invalid="ignore"):
        return GAUSSIAN * nanmedian(np.abs(values - aligned), axis=axis)


def steadiness(log_values: Array, steps: Array) -> float | None:
    """exp of minus the spread of the change per step of a logarithm: 1 steady, towards 0 erratic.

    Does not depend on the scale of the values. None with too few of them.
    """
    known = np.isfinite(log_values)
    if known.sum() < MIN_WINDOW:
        return None
    changes = np.diff(log_values[known]) / np.diff(steps[known])
    return float(np.exp(-spread(changes)))


def theil_sen(x: Array, y: Array) -> tuple[float, float] | None:
    """Slope and intercept by the median of pairwise slopes (Theil 1950, Sen 1968).

    NaN and infinite values are left out; None when fewer than two x remain.
    """
    known = np.isfinite(x) & np.isfinite(y)
    x, y = x[known], y[known]
    first, second = np.triu_indices(len(x), 1)
    run = x[second] - x[first]
    if not np.any(run != 0):
        return None
    slope = float(np.median(((y[second] - y[first])[run != 0]) / run[run != 0]))
    return slope, float(np.median(y - slope * x))


def mann_kendall(y: Array) -> float | None:
    """Two-sided p of no monotone trend (Mann 1945, Kendall 1975), ties corrected.

    None with fewer than 8 finite values, where its normal approximation is poor.
    """
    y = y[np.isfinite(y)]
    n = len(y)
    if n < MIN_TREND:
        return None
    first, second = np.triu_indices(n, 1)
    score = float(np.sign(y[second] - y[first]).sum())
    _, ties = np.unique(y, return_counts=True)
    tied = float((ties * (ties - 1) * (2 * ties + 5)).sum())
    variance = (n * (n - 1) * (2 * n + 5) - tied) / 18
    if variance <= 0:
        return 1.0
    z = max(0.0, abs(score) - 1) / math.sqrt(variance)
    return math.erfc(z / math.sqrt(2))


def column_trends(values: Array) -> tuple[Array, Array]:
    """Theil-Sen slope per record and Mann-Kendall p of every column of [W, L] at once.

    NaN values are left out; p is without the correction for ties.
    """
    first, second = np.triu_indices(len(values), 1)
    rise = values[second] - values[first]
    slope: Array = nanmedian(rise / (second - first)[:, None], axis=0)
    n = np.isfinite(values).sum(axis=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        score = np.nansum(np.sign(rise), axis=0)
        z = np.maximum(0.0, np.abs(score) - 1) / np.sqrt(n * (n - 1) * (2 * n + 5) / 18)
    p = np.array([math.erfc(each / math.sqrt(2)) for each in np.nan_to_num(z).tolist()])
    return slope, p


def detrended(values: Array) -> tuple[Array, Array]:
    """Each column of [W, L] less its least-squares line over the known, and the line's slope."""
    known = np.isfinite(values)
    count = known.sum(axis=0)
    at = np.where(known, np.arange(len(values), dtype=np.float64)[:, None], 0.0)
    filled = np.where(known, values, 0.0)
    with np.errstate(invalid="ignore", divide="ignore"):
        at = np.where(known, at - at.sum(axis=0) / count, 0.0)
        centred = np.where(known, filled - filled.sum(axis=0) / count, np.nan)
        slope: Array = np.nansum(at * centred, axis=0) / (at**2).sum(axis=0)
    return centred - slope * at, np.nan_to_num(slope)


def r_squared(x: Array, y: Array, slope: float, intercept: float) -> float:
    """Share of the variance of ``y`` that a line explains; may be negative for a robust line."""
    residual = y - (slope * x + intercept)
    total = float(((y - y.mean()) ** 2).sum())
    return 1.0 if total == 0 else 1 - float((residual**2).sum()) / total
