"""Norms that jump: each record against those before it, and the jumps that are over soon."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gradscope.flow.limits import SEVERE_RATIO, SHORTEST, SPIKE_RATIO, SPIKE_Z, SPREAD_FLOOR
from gradscope.flow.records.events import Spike
from gradscope.flow.records.regions import Region
from gradscope.flow.robust import Array, nanmedian, spread
from gradscope.flow.series import Mask, Series
from gradscope.flow.trailing import following, leaps, trailing

_TRAILING = 128
_LEAST_TRAILING = 16
#: Steady growth leaves a long window behind too; a spike also jumps from the last few records.
_JUST_BEFORE = 8
_LEAST_BEFORE = 4
#: How many records, at most, tell whether it came back.
_JUST_AFTER = 8
_LEAP = math.log(SPIKE_RATIO)
#: A window spreads so many times as much as its records do around those just before them: it
#: holds two levels.
_UNEVEN = 1.5


@dataclass(frozen=True, eq=False)
class Jumps:
    """Where norms spike, [T, L], and how far; layers that never jump are left out of the latter."""

    spike: Mask
    #: The R layers that jump.
    rows: NDArray[np.int64]
    #: Norm over the median of the records before, and its modified z, [T, R].
    ratio: Array
    z: Array
    #: Where the records after lie far below again, or there are none, [T, R].
    back: Mask


@dataclass(frozen=True, eq=False)
class _Before:
    """What each ln norm is compared with, [T, L]: a level, its spread, and the least ratio."""

    level: Array
    spread: Array
    least: Array


def jumps(logs: Array) -> Jumps:
    """Each ln norm against the median and spread of the records before.

    The long window is walked only for layers that rise fourfold within a few records.
    """
    sudden = leaps(logs, _JUST_BEFORE, _LEAP)
    rows = np.flatnonzero(sudden.any(axis=0))
    some, leapt = logs[:, rows], sudden[:, rows]
    before = _before(some, leapt)
    over = _over(some, leapt, before)
    before = _since_it_moved(some, over, before)
    above = some - before.level
    ratio, z = np.exp(above), above / before.spread
    spike = np.zeros(logs.shape, bool)
    spike[:, rows] = leapt & (z > SPIKE_Z) & (ratio > before.least)
    return Jumps(spike, rows, ratio, z, over)


def _before(logs: Array, leapt: Mask) -> _Before:
    """The last 128 records; for the first ones all the others at the start, also those after.

    Too few precede them, and gradients often fall from the first step on: the limit is higher.
    """
    level, wide = trailing(logs, _TRAILING, _LEAST_TRAILING, leapt)
    least = np.full(logs.shape, SPIKE_RATIO)
    start = logs[: 2 * _LEAST_TRAILING]
    first = slice(0, _LEAST_TRAILING + 1)
    young = np.isnan(level[first])
    level[first] = np.where(young, nanmedian(start, axis=0), level[first])
    wide[first] = np.where(young, spread(start, axis=0), wide[first])
    least[first][young] = SEVERE_RATIO
    return _Before(level, np.maximum(wide, SPREAD_FLOOR), least)


def _over(logs: Array, leapt: Mask, before: _Before) -> Mask:
    """Jumps after which the next records lie far below again, or half of the way at least."""
    half = np.fmax((logs - before.level) / 2, _LEAP / 2)
    return leapt & ~(logs - following(logs, leapt, _JUST_AFTER) <= np.fmin(half, _LEAP))


def _since_it_moved(logs: Array, over: Mask, usual: _Before) -> _Before:
    """The same, but for jumps that come back the last few records where the level is another.

    A lasting change hides what happens beside it from a window that holds both of its levels.
    """
    rows = np.flatnonzero(over.any(axis=0))
    near, _ = trailing(logs[:, rows], _JUST_BEFORE, _LEAST_BEFORE)
    noise = _before(logs[:, rows] - near, over[:, rows]).spread
    moved = np.abs(near - usual.level[:, rows]) > _LEAP
    moved |= usual.spread[:, rows] > _UNEVEN * noise
    moved &= over[:, rows] & np.isfinite(near)
    level, wide = usual.level.copy(), usual.spread.copy()
    level[:, rows] = np.where(moved, near, level[:, rows])
    wide[:, rows] = np.where(moved, noise, wide[:, rows])
    return _Before(level, wide, usual.least)


def spikes(series: Series, found: Jumps, lasting: Sequence[Region]) -> list[Spike]:
    """Spikes by the record at which they begin, the tallest layer of each named.

    One that falls into a ``lasting`` region left a trace.
    """
    records = np.flatnonzero(found.spike.any(axis=1))
    if not len(records):
        return []
    events = np.split(records, np.flatnonzero(np.diff(records) > SHORTEST) + 1)
    return [_spike(series, found, event, lasting) for event in events]


def _spike(series: Series, found: Jumps, event: np.ndarray, lasting: Sequence[Region]) -> Spike:
    spiked = found.spike[event][:, found.rows]
    over = spiked & found.back[event]
    inside = np.where(over if over.any() else spiked, found.ratio[event], -np.inf)
    at, column = np.unravel_index(int(np.argmax(inside)), inside.shape)
    step = int(series.steps[event[at]])
    return Spike(
        step=step,
        layer_name=series.names[found.rows[column]],
        layers=int(spiked.any(axis=0).sum()),
        ratio=float(inside[at, column]),
        z=float(found.z[event[at], column]),
        left_a_trace=any((r.extent.onset[0] or -1) <= step <= r.extent.end for r in lasting),
        stayed=not over.any(),
    )
