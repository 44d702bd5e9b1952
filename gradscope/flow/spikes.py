"""Norms that jump: each record against those before it, and the jumps that are over soon."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gradscope.flow.limits import SHORTEST, SPIKE_RATIO, SPIKE_Z, SPREAD_FLOOR
from gradscope.flow.result import Region, Spike
from gradscope.flow.robust import Array
from gradscope.flow.series import Mask, Series
from gradscope.flow.trailing import trailing

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
    just_before, _ = trailing(logs, _JUST_BEFORE, 1)
    sudden = logs - just_before > math.log(SPIKE_RATIO)
    rows = np.flatnonzero(sudden.any(axis=0))
    median, wide = trailing(logs[:, rows], _TRAILING, _LEAST_TRAILING)
    above = logs[:, rows] - median
    ratio, z = np.full(logs.shape, np.nan), np.full(logs.shape, np.nan)
    ratio[:, rows], z[:, rows] = np.exp(above), above / np.maximum(wide, SPREAD_FLOOR)
    return Jumps((z > SPIKE_Z) & (ratio > SPIKE_RATIO) & sudden, ratio, z)


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
