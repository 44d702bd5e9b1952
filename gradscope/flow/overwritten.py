"""Whether weights became others between two records without the optimizer: they were overwritten.

The norm of weights cannot change by more than the step that was made (the triangle inequality).
What changed it further is a checkpoint or an average that was loaded, a second initialisation, or
code that writes into parameters.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from gradscope.flow.limits import MIN_TREND, SHORTEST
from gradscope.flow.records.steps import Overwritten
from gradscope.flow.robust import Array, nanmedian, spread
from gradscope.flow.series import Mask, Series

#: Share of their norm that weights change by where they are others, beyond the steps made.
_LEAST = 0.05
#: How far steps that were not recorded may exceed those recorded around them.
_MARGIN = 2.0
#: Steps between two records over which a run does not blow up and come back unseen.
_LONGEST = 10
#: Losses before and after that are compared.
_BEFORE = 32
#: Places that are looked at closely: those where the loss rose most from one record to the next.
_CLOSELY = 64


def overwritten(series: Series) -> Overwritten | None:
    """Where most weights changed by more than the optimizer's steps explain; None if nowhere.

    Between successive steps the recorded step is the bound. Over a short gap it is the greater of
    the steps before and after, times those between, of an optimizer whose steps do not follow the
    gradient's size (Adam); of any other nothing is claimed. Of several places the one is told where
    the loss rose most.
    """
    norms, steps_made = series.history.param_l2, series.history.update_l2
    if norms is None or steps_made is None or len(norms) < 2:
        return None
    weights: Array = np.asarray(norms)
    beyond = _beyond(series, weights, np.asarray(steps_made))
    # By elements: half of a network's tensors are biases, which an initialisation may leave.
    sizes = np.array([layer.numel or 1 for layer in series.history.layers], np.float64)
    known = (np.isfinite(weights[1:]) & np.isfinite(weights[:-1])) @ sizes
    places = np.flatnonzero((2 * (beyond @ sizes) > known) & (known > 0)) + 1
    if not len(places):
        return None
    record, factor = _worst(series, places)
    rows = np.flatnonzero(beyond[record - 1])
    change = np.abs(weights[record, rows] / weights[record - 1, rows] - 1)
    return Overwritten(
        onset=(int(series.steps[record - 1]), int(series.steps[record])),
        layers=tuple(_names(series, set(rows.tolist()))),
        change=float(np.median(change)),
        loss_factor=factor if np.isfinite(factor) else None,
        times=len(places),
    )


def _beyond(series: Series, weights: Array, made: Array) -> Mask:
    """Cells [T - 1, L] whose weights changed by more than the steps since the record before."""
    gaps = np.diff(series.steps)[:, None]
    bound = np.where(gaps == 1, made[:-1], np.nan)
    unknown = ~np.isfinite(bound)
    if series.adaptive_epsilon is not None and (unknown & (gaps <= _LONGEST)).any():
        around = np.maximum(_last_known(made)[:-1], _last_known(made[::-1])[::-1][1:])
        bound = np.where(unknown & (gaps <= _LONGEST), _MARGIN * gaps * around, bound)
    greater = np.fmax(weights[1:], weights[:-1])
    found: Mask = np.abs(np.diff(weights, axis=0)) > bound + _LEAST * greater
    return found


def _last_known(values: Array) -> Array:
    """Each value, or the last one before that is known; NaN where none is."""
    rows = np.where(np.isfinite(values), np.arange(len(values))[:, None], 0)
    filled: Array = np.take_along_axis(values, np.maximum.accumulate(rows, axis=0), axis=0)
    return filled


def _worst(series: Series, places: NDArray[np.intp]) -> tuple[int, float]:
    """The place at which the loss rose most, and how many times as high it is after it."""
    loss = series.history.loss
    if loss is not None and len(places) > _CLOSELY:
        with np.errstate(invalid="ignore", over="ignore"):
            rises = np.nan_to_num(loss[places] - loss[places - 1], nan=-np.inf)
        places = np.sort(places[np.argsort(-rises, kind="stable")[:_CLOSELY]])
    factors = np.array([_loss_factor(series, record) for record in places.tolist()])
    worst = int(np.argmax(np.nan_to_num(factors, nan=-1.0)))
    return int(places[worst]), float(factors[worst])


def _loss_factor(series: Series, record: int) -> float:
    """How many times as high the loss is just after as before, if that is beyond its noise."""
    loss = series.history.loss
    if loss is None:
        return np.nan
    before, after = loss[max(0, record - _BEFORE) : record], loss[record : record + SHORTEST]
    before, after = before[np.isfinite(before)], after[np.isfinite(after)]
    if len(before) < MIN_TREND or not len(after) or not nanmedian(before) > 0:
        return np.nan
    rise = float(np.median(after)) - nanmedian(before)
    return float(np.median(after) / nanmedian(before)) if rise > 3 * spread(before) else 1.0


def _names(series: Series, rows: set[int]) -> list[str]:
    joined = zip(series.names, series.parts, strict=True)
    return [name for name, parts in joined if rows.intersection(parts)]
