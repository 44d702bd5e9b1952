"""Medians of the last window: what layers and the network are compared by at the end."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from gradscope.flow.graph import Graph
from gradscope.flow.levels import DECADE, Levels
from gradscope.flow.limits import BOTTLENECK_DECADES
from gradscope.flow.robust import Array, nanmedian
from gradscope.flow.series import Series


@dataclass(frozen=True, eq=False)
class Recent:
    """Medians over the last window, [L] each; NaN where unknown."""

    rms: Array
    #: How many of three decades a layer lies below both its neighbours, 0 to 1.
    bottleneck: Array
    #: Decades below the loss side.
    deficit: Array


def recent(series: Series, graph: Graph, levels: Levels, window: int) -> Recent:
    """Medians over the last ``window`` records.

    The bottleneck score is clip(log10(min(median before, median after) / RMS) / 3, 0, 1), by
    neighbours of the same kind; NaN for a layer that has none on one side.
    """
    last = slice(-window, None)
    rms: Array = nanmedian(series.rms[last], axis=0)
    below = levels.below_loss[last]
    deficit: Array = nanmedian(np.where(np.isfinite(below), below, np.nan), axis=0)
    logs = np.log10(rms)
    score = np.array([_bottleneck(series, graph, logs, row) for row in graph.rows])
    return Recent(rms, score, deficit / DECADE)


def _bottleneck(series: Series, graph: Graph, logs: Array, row: int) -> float:
    before = [logs[r] for r in kin(series, row, graph.before)]
    after = [logs[r] for r in kin(series, row, graph.after)]
    if not before or not after or np.isnan(logs[row]):
        return math.nan
    lower = min(float(nanmedian(before)), float(nanmedian(after)))
    return float(np.clip((lower - logs[row]) / BOTTLENECK_DECADES, 0, 1))


def kin(series: Series, row: int, neighbours: Callable[[int], list[int]]) -> list[int]:
    """The nearest layers of the same kind on one side, other kinds passed over."""
    seen: set[int] = set()
    found: list[int] = []
    front = list(neighbours(row))
    while front:
        at = front.pop(0)
        if at in seen:
            continue
        seen.add(at)
        if series.group(at) == series.group(row):
            found.append(at)
        else:
            front.extend(neighbours(at))
    return found
