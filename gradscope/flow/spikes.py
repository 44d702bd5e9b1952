"""Norms that jump: each record against those before it, and the jumps that are over soon."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gradscope.flow.limits import SEVERE_RATIO, SHORTEST, SPIKE_RATIO, SPIKE_Z, SPREAD_FLOOR
from gradscope.flow.result import Region, Spike
from gradscope.flow.robust import Array, nanmedian, spread
from gradscope.flow.series import Mask, Series
from gradscope.flow.trailing import leaps, trailing

_TRAILING = 128
_LEAST_TRAILING = 16
#: Steady growth leaves a long window behind too; a spike also jumps from the last few records.
_JUST_BEFORE = 8


@dataclass(frozen=True, eq=False)
class Jumps:
    """Where norms spike, [T, L], and how far: NaN for layers that never jump."""

    spike: Mask
    #: Norm over the median of the records before, and its modified z.
    ratio: Array
    z: Array


def jumps(logs: Array) -> Jumps:
    """Each ln norm against the median and spread of the records before.

    The long window is walked only for layers that rise fourfold within a few records.
    """
    sudden = leaps(logs, _JUST_BEFORE, math.log(SPIKE_RATIO))
    rows = np.flatnonzero(sudden.any(axis=0))
    median, wide = trailing(logs[:, rows], _TRAILING, _LEAST_TRAILING)
    above = logs[:, rows] - median
    ratio, z = np.full(logs.shape, np.nan), np.full(logs.shape, np.nan)
    ratio[:, rows], z[:, rows] = np.exp(above), above / np.maximum(wide, SPREAD_FLOOR)
    first = slice(0, _LEAST_TRAILING + 1)
    early_ratio, early_z = _early(logs[: 2 * _LEAST_TRAILING, rows])
    young = np.isnan(ratio[first][:, rows])
    ratio[first, rows] = np.where(young, early_ratio, ratio[first, rows])
    z[first, rows] = np.where(young, early_z, z[first, rows])
    least = np.full((len(logs), 1), SPIKE_RATIO)
    least[first][young.all(axis=1) if young.size else ()] = SEVERE_RATIO
    spike = np.zeros(logs.shape, bool)
    spike[:, rows] = (z[:, rows] > SPIKE_Z) & (ratio[:, rows] > least) & sudden[:, rows]
    return Jumps(spike, ratio, z)


def _early(logs: Array) -> tuple[Array, Array]:
    """Ratio and z of the first records against all the others at the start, also those after.

    Too few precede them, and gradients often fall from the first step on: the limit is higher.
    """
    above = logs[: _LEAST_TRAILING + 1] - nanmedian(logs, axis=0)
    return np.exp(above), above / np.maximum(spread(logs, axis=0), SPREAD_FLOOR)


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
    inside = np.where(found.spike[event], found.ratio[event], -np.inf)
    at, row = np.unravel_index(int(np.argmax(inside)), inside.shape)
    step = int(series.steps[event[at]])
    return Spike(
        step=step,
        layer_name=series.names[row],
        layers=int(found.spike[event].any(axis=0).sum()),
        ratio=float(inside[at, row]),
        z=float(found.z[event[at], row]),
        left_a_trace=any((r.extent.onset[0] or -1) <= step <= r.extent.end for r in lasting),
    )
