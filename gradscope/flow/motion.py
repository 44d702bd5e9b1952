"""Whether the network moves at all: update ratios, standstill, convergence, missing gradients."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from gradscope.flow.levels import DECADE, Levels, own_records
from gradscope.flow.limits import (
    ATTENUATED,
    FALL_DECADES,
    MIN_TREND,
    RATE_GONE,
    SHORTEST,
    STANDSTILL,
    TOGETHER_DECADES,
    UPDATE_WARN,
)
from gradscope.flow.loss import learnt
from gradscope.flow.optimizer import captures
from gradscope.flow.records.events import Absence, Missing
from gradscope.flow.records.steps import Convergence, Leap, Stagnation, Standstill, UpdateRatio
from gradscope.flow.regions import onset
from gradscope.flow.robust import Array, nanmedian
from gradscope.flow.series import Mask, Series
from gradscope.histories.history import Status

_LATE_RECORDS = 32
#: Share of updates that are exactly zero from which they were rounded away.
_ROUNDED = 0.25


def update_ratios(series: Series) -> Iterator[UpdateRatio]:
    """The layers whose median step after warm-up is above a twentieth of their weights."""
    if series.update_ratio is None:
        return
    inside = series.update_ratio[series.warm_up :]
    # A necessary sign first: half of what is known lies above the limit.
    large, count = (inside > UPDATE_WARN).sum(axis=0), np.isfinite(inside).sum(axis=0)
    for row in np.flatnonzero(2 * large >= count).tolist():
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


def leap(series: Series) -> Leap | None:
    """The step that changed the median layer most; None without update norms."""
    medians = series.median_update
    if medians is None:
        return None
    if not np.isfinite(medians).any():
        return None
    at = int(np.nanargmax(medians))
    step = int(series.steps[at])
    return Leap(ratio=float(medians[at]), step=step, first=at < max(series.warm_up, 1))


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
        first = _last_stretch(flags)
        if first is not None:
            return Stagnation(
                onset=onset(series, first),
                update_ratio=_recent_ratio(series, first),
                reason=_reason(series, first) if reason == "update" else reason,
                converged=(converged is not None and converged.loss_fell is not False)
                or learnt(series),
                fastest=_fastest(series, first) if reason == "update" else None,
            )
    return None


def _last_stretch(flags: Array) -> int | None:
    """The record at which the stretch begins that lasts to the end; None without one.

    ``flags`` are 1, 0, and NaN at records that do not tell: those neither end it nor count. It has
    eight known records, or a quarter of them where there are few.
    """
    known = np.flatnonzero(np.isfinite(flags))
    shortest = min(MIN_TREND, max(SHORTEST, len(known) // 4))
    standing = flags[known] == 1
    length = len(known) if standing.all() else int(np.argmin(standing[::-1]))
    return int(known[-length]) if length >= shortest else None


def _reason(series: Series, first: int) -> Standstill:
    """Why steps no longer change the weights: the rate, the weights' type, or the gradients."""
    rates = series.history.lr
    if rates is not None and rates.size:
        rate = np.asarray(rates, np.float64).max(axis=1)
        if not np.nanmax(rate, initial=0.0) > 0 and np.isfinite(rate).any():
            return "rate"
        if nanmedian(rate[first:]) < RATE_GONE * np.nanmax(rate[: first + 1]):
            return "schedule"
    total = series.total
    if nanmedian(total[first:]) < 10**-FALL_DECADES * np.max(total[: max(first, SHORTEST)]):
        return "starved"
    zero = _unchanged(series, first)
    if _half_weights(series):
        return "rounded" if zero >= _ROUNDED else "update"
    return "unmoved" if zero == 1 else "update"


def _unchanged(series: Series, first: int) -> float:
    """Share of the steps that do not change a layer at all though it has a gradient."""
    assert series.update_ratio is not None
    known = np.isfinite(series.update_ratio[first:]) & (series.norm[first:] > 0)
    still = series.update_ratio[first:][known] == 0
    return float(still.mean()) if still.size else 0.0


def _half_weights(series: Series) -> bool:
    precision = series.history.meta.get("precision")
    kind = str(precision.get("param") if isinstance(precision, Mapping) else None)
    return kind.removeprefix("torch.") in ("bfloat16", "float16", "half", "bf16", "fp16")


def _fastest(series: Series, first: int) -> float | None:
    """The greatest of the median update ratios that are below the limit."""
    if series.median_update is None:
        return None
    medians = series.median_update[first:]
    return float(medians[medians < STANDSTILL].max())


def _standing(series: Series, levels: Levels) -> Iterator[tuple[Standstill, Array]]:
    """Whether the median layer stands still at each record, by each sign there is."""
    if _never_stepped(series):
        yield "unstepped", np.ones(len(series.steps))
    if series.median_update is not None:
        yield "update", _told(series.median_update, STANDSTILL)
    elif levels.attenuation is not None:
        yield "epsilon", _told(nanmedian(levels.attenuation, axis=1), ATTENUATED)
    yield "repeats", _repeats(series).astype(np.float64)


def _never_stepped(series: Series) -> bool:
    """Whether no step followed any capture, and no norm of the weights ever changed."""
    counted, norms = captures(series), series.history.param_l2
    if counted is None or counted.steps or norms is None or not np.isfinite(norms).any():
        return False
    if counted.calls * (1 - counted.skipped) < MIN_TREND:  # mixed precision skipped them all
        return False
    return bool((np.nanmin(norms, axis=0) == np.nanmax(norms, axis=0)).all())


def _told(values: Array, limit: float) -> Array:
    return np.where(np.isfinite(values), values < limit, np.nan)


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
