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


#: Slow growth is looked for in medians of four records, in those of four of them, and so on.
_COARSER = 4


def growing(series: Series, logs: Array) -> Mask:
    """Records of windows in which a layer's ln norm climbs steadily out of its earlier range.

    Windows of several lengths, so that what is found does not depend on how often was recorded.
    """
    steps = series.steps.astype(np.float64)
    flags, size, warm_up = _growing(steps, logs, series.warm_up), 1, series.warm_up
    while len(logs) // _COARSER >= _WINDOWS[1]:
        steps, logs = _blocks(steps[:, None])[:, 0], _blocks(logs)
        size, warm_up = size * _COARSER, -(-warm_up // _COARSER)
        coarse = _growing(steps, logs, warm_up).repeat(size, axis=0)
        flags[len(flags) - len(coarse) :] |= coarse
    return flags


def _blocks(values: Array) -> Array:
    """Medians of every four records; the first few that fill none are left out."""
    whole = values[len(values) % _COARSER :].reshape(-1, _COARSER, values.shape[1])
    medians: Array = nanmedian(whole, axis=1)
    return medians


def _growing(steps: Array, logs: Array, warm_up: int) -> Mask:
    flags = np.zeros(logs.shape, bool)
    total = len(logs)
    window = next((w for w in _WINDOWS if total >= w + warm_up or total == w), None)
    if window is None:
        return flags
    ends = [*range(warm_up + window, total, window // 4), total]
    for end in ends:
        for row in _climbing(logs[end - window : end]):
            if _grows(steps, logs[:, row], warm_up, end - window, end):
                flags[_begun(logs[end - window : end, row]) + end - window : end, row] = True
    return flags


def _climbing(inside: Array) -> Sequence[int]:
    """Rows whose last quarter of a window lies well above the first: a cheap necessary sign."""
    quarter = len(inside) // 4
    rise = nanmedian(inside[-quarter:], axis=0) - nanmedian(inside[:quarter], axis=0)
    rows: list[int] = np.flatnonzero(rise > 0.5 * math.log(GROWTH_FACTOR)).tolist()
    return rows


def _grows(steps: Array, logs: Array, warm_up: int, first: int, end: int) -> bool:
    """By slope, by significance, and above everything between warm-up and the window."""
    inside, during = logs[first:end], steps[first:end]
    line = theil_sen(during, inside)
    if line is None or line[0] * (during[-1] - during[0]) <= math.log(GROWTH_FACTOR):
        return False
    p = mann_kendall(inside)
    earlier = logs[min(warm_up, first) : first]
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
