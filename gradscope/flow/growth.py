"""Norms that grow steadily: what no spike detector sees."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from gradscope.flow.limits import GROWTH_FACTOR, MIN_TREND, SPREAD_FLOOR
from gradscope.flow.robust import Array, mann_kendall, nanmedian, spread, theil_sen
from gradscope.flow.series import Mask, Series

_WINDOWS = (64, 32, 16)
_P = 0.01
_SPREADS = 3.0


def growing(series: Series, logs: Array) -> Mask:
    """Records of windows in which a layer's ln norm climbs steadily out of its earlier range."""
    flags = np.zeros(logs.shape, bool)
    total = len(logs)
    window = next((w for w in _WINDOWS if total >= w + series.warm_up or total == w), None)
    if window is None:
        return flags
    ends = [*range(series.warm_up + window, total, window // 4), total]
    for end in ends:
        for row in _climbing(logs[end - window : end]):
            if _grows(series, logs, row, end - window, end):
                flags[_begun(logs[end - window : end, row]) + end - window : end, row] = True
    return flags


def _climbing(inside: Array) -> Sequence[int]:
    """Rows whose last quarter of a window lies well above the first: a cheap necessary sign."""
    quarter = len(inside) // 4
    rise = nanmedian(inside[-quarter:], axis=0) - nanmedian(inside[:quarter], axis=0)
    rows: list[int] = np.flatnonzero(rise > 0.5 * math.log(GROWTH_FACTOR)).tolist()
    return rows


def _grows(series: Series, logs: Array, row: int, first: int, end: int) -> bool:
    """By slope, by significance, and above everything between warm-up and the window."""
    inside = logs[first:end, row]
    steps = series.steps[first:end].astype(np.float64)
    line = theil_sen(steps, inside)
    if line is None or line[0] * (steps[-1] - steps[0]) <= math.log(GROWTH_FACTOR):
        return False
    p = mann_kendall(inside)
    earlier = logs[min(series.warm_up, first) : first, row]
    earlier = earlier[np.isfinite(earlier)]
    escaped = len(earlier) < MIN_TREND or np.nanmax(inside) > earlier.max()
    return p is not None and p < _P and bool(escaped)


def _begun(inside: Array) -> int:
    """The record after the last one within the range that a window begins with."""
    quarter = inside[: len(inside) // 4]
    ceiling = nanmedian(quarter) + max(_SPREADS * spread(quarter), SPREAD_FLOOR)
    below = np.flatnonzero(inside <= ceiling)
    return int(below[-1]) + 1 if len(below) else 0


def growth_rate(series: Series, row: int, first: int, end: int) -> float | None:
    """Slope of ln RMS per step over some records, at most the last window of them, in nats."""
    window = slice(max(first, end - _WINDOWS[0]), end)
    steps = series.steps[window].astype(np.float64)
    line = theil_sen(steps, series.finite_log[window, row])
    return None if line is None else line[0]
