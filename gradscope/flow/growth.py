"""Norms that grow steadily: what no spike detector sees."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from gradscope.compiled import kernel
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
    finest = logs
    while len(logs) // _COARSER >= _WINDOWS[1]:
        steps, logs = _blocks(steps[:, None])[:, 0], _blocks(logs)
        size, warm_up = size * _COARSER, -(-warm_up // _COARSER)
        coarse, covered = _growing(steps, logs, warm_up), size * len(logs)
        flags[-covered:] |= _finer(coarse, logs, finest[-covered:])
    return flags


def _finer(coarse: Mask, medians: Array, logs: Array) -> Mask:
    """Flags of blocks as those of their records; a first block begins within itself.

    At its first record that lies nearer to the block after it than to the one before.
    """
    size = len(logs) // len(coarse)
    flags = coarse.repeat(size, axis=0)
    for block, row in np.argwhere(coarse[1:-1] & ~coarse[:-2]).tolist():
        middle = (medians[block, row] + medians[block + 2, row]) / 2
        first = slice((block + 1) * size, (block + 2) * size)
        flags[first, row] = np.logical_or.accumulate(logs[first, row] > middle)
    return flags


def _blocks(values: Array) -> Array:
    """Medians of every four records; the first few that fill none are left out."""
    whole = np.ascontiguousarray(values[len(values) % _COARSER :])
    medians = np.empty((len(whole) // _COARSER, whole.shape[1]))
    _of_four(whole, medians)
    gaps = np.flatnonzero(np.isnan(medians).any(axis=0))
    if len(gaps):
        some = whole[:, gaps].reshape(-1, _COARSER, len(gaps))
        medians[:, gaps] = nanmedian(some, axis=1)
    return medians


@kernel(alone=True)
def _of_four(values: Array, medians: Array) -> None:
    """Medians of every four records of [4 N, L]; NaN where any of them is."""
    for i in range(len(medians)):
        for row in range(medians.shape[1]):
            a, b = values[4 * i, row], values[4 * i + 1, row]
            c, d = values[4 * i + 2, row], values[4 * i + 3, row]
            low = max(min(a, b), min(c, d))
            high = min(max(a, b), max(c, d))
            middle = low if low == high else 0.5 * (low + high)
            medians[i, row] = middle if a + b + c + d == a + b + c + d else np.nan


def _growing(steps: Array, logs: Array, warm_up: int) -> Mask:
    flags = np.zeros(logs.shape, bool)
    total = len(logs)
    window = next((w for w in _WINDOWS if total >= w + warm_up or total == w), None)
    if window is None:
        return flags
    for end, row in _climbing(logs, warm_up, window):
        if _grows(steps, logs[:, row], warm_up, end - window, end):
            flags[_begun(logs[end - window : end, row]) + end - window : end, row] = True
    return flags


def _climbing(logs: Array, warm_up: int, window: int) -> Iterator[tuple[int, int]]:
    """Ends of windows, and rows whose last quarter lies well above the first there.

    A cheap necessary sign. Windows follow each other at a quarter's distance, the last one ends
    with the records.
    """
    quarter, total = window // 4, len(logs)
    count = max(0, total - 1 - warm_up) // quarter
    parts = logs[warm_up : warm_up + count * quarter].reshape(count, quarter, logs.shape[1])
    middles = nanmedian(parts, axis=1)
    last = nanmedian(logs[total - quarter :], axis=0) - nanmedian(
        logs[total - window : total - window + quarter], axis=0
    )
    rises = np.vstack([middles[3:] - middles[:-3], last])
    ends = [*(warm_up + window + i * quarter for i in range(len(rises) - 1)), total]
    for i, row in np.argwhere(rises > 0.5 * math.log(GROWTH_FACTOR)).tolist():
        yield ends[i], row


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
