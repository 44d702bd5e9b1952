"""Whether the network moves at all: update ratios, standstill, convergence, missing gradients."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from gradscope.flow.levels import DECADE, Levels, own_records
from gradscope.flow.limits import (
    ATTENUATED,
    MIN_TREND,
    SHORTEST,
    STANDSTILL,
    TOGETHER_DECADES,
    UPDATE_WARN,
)
from gradscope.flow.regions import onset, stretches
from gradscope.flow.result import (
    Absence,
    Convergence,
    Missing,
    Stagnation,
    Standstill,
    UpdateRatio,
)
from gradscope.flow.robust import nanmedian
from gradscope.flow.series import Mask, Series
from gradscope.histories.history import Status

_LATE_RECORDS = 32


def update_ratios(series: Series) -> Iterator[UpdateRatio]:
    """The layers whose median step after warm-up is above a twentieth of their weights."""
    if series.update_ratio is None:
        return
    inside = series.update_ratio[series.warm_up :]
    for row in range(len(series.layers)):
        known = np.flatnonzero(np.isfinite(inside[:, row]))
        if len(known) < SHORTEST:
            continue
        median = float(np.median(inside[known, row]))
        at = int(known[np.argmax(inside[known, row])])
        if median > UPDATE_WARN:
            yield UpdateRatio(
                layer_name=series.names[row],
                median=median,
                peak=float(inside[at, row]),
                step=int(series.steps[series.warm_up + at]),
                numel=series.layers[row].numel,
            )


def convergence(series: Series) -> Convergence | None:
    """The median layer's gradient a decade or more below its level after warm-up, at the end.

    That is what a run that converges looks like; a network whose loss did not fall with it
    saturates instead.
    """
    level = series.median_log
    early = level[own_records(series)]
    late = level[-min(_LATE_RECORDS, max(1, len(level) // 4)) :]
    if np.isfinite(early).sum() < MIN_TREND or not np.isfinite(late).any():
        return None
    decades = float(nanmedian(early) - nanmedian(late)) / DECADE
    if decades < TOGETHER_DECADES:
        return None
    return Convergence(decades=decades, loss_fell=_loss_fell(series))


def _loss_fell(series: Series) -> bool | None:
    loss = series.history.loss
    if loss is None or np.isfinite(loss).sum() < MIN_TREND:
        return None
    tenth = max(1, len(loss) // 10)
    return bool(nanmedian(loss[-tenth:]) < nanmedian(loss[:tenth]))


def stagnation(series: Series, levels: Levels, converged: Convergence | None) -> Stagnation | None:
    """A network that stands still at the end of the history, for at least eight records."""
    for reason, flags in _standing(series, levels):
        last = [s for s in stretches(flags[:, None], shortest=MIN_TREND) if s.end == len(flags)]
        if last:
            first = last[0].first
            return Stagnation(
                onset=onset(series, first),
                update_ratio=_recent_ratio(series, first),
                reason=reason,
                converged=converged is not None and converged.loss_fell is not False,
                fastest=_fastest(series, first) if reason == "update" else None,
            )
    return None


def _fastest(series: Series, first: int) -> float | None:
    """The greatest of the median update ratios that are below the limit."""
    if series.update_ratio is None:
        return None
    medians = nanmedian(series.update_ratio[first:], axis=1)
    return float(medians[medians < STANDSTILL].max())


def _standing(series: Series, levels: Levels) -> Iterator[tuple[Standstill, Mask]]:
    """Records at which the median layer does not move, by each sign there is."""
    if series.update_ratio is not None:
        yield "update", nanmedian(series.update_ratio, axis=1) < STANDSTILL
    elif levels.attenuation is not None:
        yield "epsilon", nanmedian(levels.attenuation, axis=1) < ATTENUATED
    yield "repeats", _repeats(series)


def _repeats(series: Series) -> Mask:
    """Records whose every norm equals the one before to the bit: nothing was updated."""
    same = np.zeros(len(series.steps), bool)
    known = series.norm[1:] > 0
    equal = np.where(known, series.norm[1:] == series.norm[:-1], True)
    same[1:] = equal.all(axis=1) & known.any(axis=1)
    return same


def _recent_ratio(series: Series, first: int) -> float | None:
    if series.update_ratio is None or not np.isfinite(series.update_ratio[first:]).any():
        return None
    return float(nanmedian(series.update_ratio[first:]))


def missing(series: Series) -> Iterator[Missing]:
    """Layers that have no gradient at all, or not at every record, and why.

    Frozen on purpose, None though required, and not written to the file are three things.
    """
    for row, layer in enumerate(series.layers):
        status = series.status[:, row]
        absent = status != Status.RECORDED
        if not absent.any():
            continue
        state = _state(status)
        yield Missing(
            layer_name=layer.name, state=state, records=int(absent.sum()), numel=layer.numel
        )


def _state(status: np.ndarray[Any, Any]) -> Absence:
    if (status == Status.RECORDED).any():
        return "partly"
    if (status == Status.NONE).any():
        return "unused"
    return "frozen" if (status == Status.FROZEN).any() else "not-recorded"
