"""What gradients are measured against, computed once a run: the loss side, and their own past."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gradscope.flow.graph import Graph
from gradscope.flow.limits import LEVEL_RATIO, MIN_TREND, SEVERE_RATIO
from gradscope.flow.robust import Array, nanmedian
from gradscope.flow.series import Series
from gradscope.flow.trailing import leaps

DECADE = math.log(10)
#: Records after warm-up that a layer's own level is taken from, at most.
_OWN_RECORDS = 64
#: Nats that a layer rises by when it leaves a level for another, and within which it held it.
_RISE = math.log(LEVEL_RATIO)
_LEVEL_NATS = math.log(2)
#: Fewest records of a level that it leaves by so many nats.
_FEW = 4
_SEVERE_RISE = math.log(SEVERE_RATIO)


@dataclass(frozen=True, eq=False)
class Levels:
    """Nats that ln RMS lies below a reference, [T, L]: infinite for a gradient of zero.

    NaN where there is no reference, or no finite gradient.
    """

    #: Below the median of the loss side's layers of the same kind, at the same record.
    below_loss: Array
    #: Below the layer's own median after warm-up, for the records that follow.
    below_own: Array
    #: Share of its full step that epsilon leaves an Adam-like optimizer, RMS / (RMS + eps); None
    #: for other optimizers and where sizes are unknown.
    attenuation: Array | None


def levels(series: Series, graph: Graph) -> Levels:
    """Every layer against the loss side, its own past and the optimizer's epsilon."""
    level, since = own_level(series)
    below_own: Array = level - series.log_rms
    for first in np.unique(since).tolist():
        below_own[:first, since == first] = np.nan
    eps = series.adaptive_epsilon
    below_loss = reference(series, graph)
    return Levels(
        below_loss=np.subtract(below_loss, series.log_rms, out=below_loss),
        below_own=below_own,
        attenuation=None
        if eps is None or not series.per_element
        else series.rms / (series.rms + eps),
    )


def reference(series: Series, graph: Graph) -> Array:
    """Natural logarithm of the loss side's RMS gradient for each layer's kind, [T, L].

    NaN where the kind has no loss side, or nothing finite was recorded there.
    """
    out = np.full(series.rms.shape, np.nan)
    for group in {series.group(row) for row in graph.rows}:
        members = [row for row in graph.rows if series.group(row) == group]
        anchors = loss_side(series, graph, group)
        if anchors:
            out[:, members] = nanmedian(series.finite_log[:, anchors], axis=1)[:, None]
    return out


def loss_side(series: Series, graph: Graph, group: str) -> list[int]:
    """The layers of a kind nearest the loss, which the others are measured against.

    A quarter of them, at most three and at least one. Empty when there are fewer than two.
    """
    members = [row for row in graph.order if series.group(row) == group]
    if len(members) < 2:
        return []
    return members[-max(1, min(3, len(members) // 4)) :]


def own_records(series: Series) -> slice:
    """The records that every layer's own level is taken from; what follows is compared with it."""
    count = min(_OWN_RECORDS, len(series.steps) // 4)
    return slice(series.warm_up, series.warm_up + count)


def own_level(series: Series) -> tuple[Array, NDArray[np.int64]]:
    """Each layer's median ln RMS over those records, and the first that is compared with it, [L].

    Of a layer that rises for good before they are over, the level is that before its rise, which
    ends them. NaN with fewer than eight.
    """
    own = own_records(series)
    inside = series.finite_log[own]
    known = np.isfinite(inside).sum(axis=0)
    level = np.where(known >= MIN_TREND, nanmedian(inside, axis=0), np.nan)
    since = np.full(len(level), own.stop, dtype=np.int64)
    for row, record, before in _early_rises(series.finite_log[: own.stop + MIN_TREND], own.stop):
        level[row], since[row] = before, record
    return level, since


def _early_rises(logs: Array, stop: int) -> Iterator[tuple[int, int, float]]:
    """Layers that rise at once from one level to another: row, record, and level before."""
    leapt = leaps(logs[:stop], MIN_TREND, _RISE)
    leapt[1:] &= ~leapt[:-1]
    seen: set[int] = set()
    for record, row in np.argwhere(leapt).tolist():
        before = logs[max(0, record - 2 * MIN_TREND) : record, row]
        after = nanmedian(logs[record : record + MIN_TREND, row])
        rise = after - nanmedian(before)
        if row not in seen and _held(before, rise) and rise > _RISE:
            seen.add(row)
            yield row, record, float(nanmedian(before))


def _held(logs: Array, rise: float) -> bool:
    """Whether eight and more lie as high in their second half as in their first.

    What leaves zero, or falls since the first step, has no level yet. Before a ``rise`` of fifty
    times four are enough: as many as a coarse recording has of the first steps.
    """
    half = len(logs) // 2
    apart = abs(nanmedian(logs[half:]) - nanmedian(logs[:half]))
    enough = len(logs) >= (_FEW if rise > _SEVERE_RISE else MIN_TREND)
    return enough and bool(apart < _LEVEL_NATS)
