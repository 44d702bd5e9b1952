"""What each layer does at each record: goes on, turns back, oscillates, stands, or is noise."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradscope.flow.directions import Cosines, Window, turned
from gradscope.flow.levels import Levels
from gradscope.flow.limits import ATTENUATED, MIN_TREND, MIN_WINDOW, STANDSTILL
from gradscope.flow.records.layers import Basis, TemporalFlow
from gradscope.flow.robust import GAUSSIAN, Array, column_trends, detrended, nanmedian
from gradscope.flow.series import Mask, Series

#: Cosines averaged, and the least number of them that says anything.
WINDOW = 32
_BATCH = 4
#: A mean cosine nearer to zero than this is noise, whatever its standard error.
LEAST_COSINE = 0.1
_ERRORS = 3.0
_TREND_P = 0.01
_TREND_NATS = math.log(2)
_OSCILLATING_LAG = -0.5


@dataclass(frozen=True, eq=False)
class Directions:
    """Flow directions at some records, and the mean cosines they rest on, both [R, L]."""

    records: NDArray[np.int64]
    direction: NDArray[np.str_]
    cosine: Array
    basis: Basis


def directions(
    series: Series,
    levels: Levels,
    found: Cosines | None,
    records: NDArray[np.int64],
    window: int = WINDOW,
) -> Directions:
    """The flow direction of every layer at some records, by the window that ends there.

    By successive cosines where there are any: their mean c over the window against tau, the
    greater of 0.1 and three standard errors (of means of four, which allows for correlation).
    ``oscillating`` c < -tau: a step overshoots, as gradient descent does on a quadratic exactly
    when the learning rate times the curvature exceeds one; ``backward``: the window's mean
    direction opposes that of the window before; ``forward`` c > tau; ``stagnant``: steps below
    1e-6 of the weights, an RMS gradient below the optimizer's epsilon, or zero; otherwise
    ``indeterminate``, which is normal with small batches. Without cosines, by norms: a
    significant monotone trend that doubles (halves) the norm is forward (backward), a lag-one
    autocorrelation below -0.5 by three standard errors oscillating.
    """
    standing = _stagnant(series, levels, records, window)
    if found is None:
        named, level = _by_norm(series, records, window)
    else:
        named, level = _by_cosine(series, found, records, window)
    named = np.where(standing, "stagnant", named)
    named = np.where(series.status[records] == 0, "indeterminate", named)
    return Directions(records, named, level, found.basis if found is not None else "norm")


def _stagnant(series: Series, levels: Levels, records: NDArray[np.int64], window: int) -> Mask:
    zero = (series.norm == 0) & series.recorded
    standing: Mask = zero[records]
    if series.update_ratio is not None:
        standing = standing | (_recent(series.update_ratio, records, window) < STANDSTILL)
    elif levels.attenuation is not None:
        standing = standing | (_recent(levels.attenuation, records, window) < ATTENUATED)
    return standing


def _recent(values: Array, records: NDArray[np.int64], window: int) -> Array:
    """Median of each layer over the window that ends at each record, [R, L]."""
    return (
        np.stack(
            [nanmedian(values[max(0, r - window + 1) : r + 1], axis=0) for r in records.tolist()]
        )
        if len(records)
        else np.empty((0, values.shape[1]))
    )


def _by_cosine(
    series: Series, found: Cosines, records: NDArray[np.int64], window: int
) -> tuple[NDArray[np.str_], Array]:
    named = np.full((len(records), len(series.layers)), "indeterminate", dtype="<U13")
    level = np.full(named.shape, np.nan)
    ends = np.searchsorted(found.after, records, side="right")
    for end in np.unique(ends).tolist():
        if end < MIN_TREND:
            continue
        here = ends == end
        inside = found.cosine[max(0, end - window) : end]
        mean, limit = _mean_and_limit(inside)
        with np.errstate(invalid="ignore"):
            labels = np.where(
                mean < -limit, "oscillating", np.where(mean > limit, "forward", "indeterminate")
            )
            back = _turned_back(series, int(found.after[end - 1]), window)
            labels = np.where((mean >= -limit) & back, "backward", labels)
        named[here], level[here] = labels, mean
    return named, level


def _mean_and_limit(inside: Array) -> tuple[Array, Array]:
    """Mean cosine of each layer and tau; tau is infinite where too few are known."""
    known = np.isfinite(inside).sum(axis=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = np.nansum(inside, axis=0) / known
        whole = inside[len(inside) % _BATCH :].reshape(-1, _BATCH, inside.shape[1])
        means = np.nansum(whole, axis=1) / np.isfinite(whole).sum(axis=1)
        count = np.isfinite(means).sum(axis=0)
        centre = np.nansum(means, axis=0) / count
        variance = np.nansum((means - centre) ** 2, axis=0) / (count - 1)
        error = np.sqrt(variance / count)
    limit = np.maximum(LEAST_COSINE, _ERRORS * error)
    enough = (known >= MIN_TREND) & (count >= 2)
    return np.where(enough, mean, np.nan), np.where(enough & np.isfinite(limit), limit, np.inf)


def _turned_back(series: Series, record: int, window: int) -> Mask:
    """Where the mean direction opposes that of the window before, by three standard errors."""
    sketches = series.sketches
    if sketches is None:
        return np.zeros(len(series.layers), bool)
    end = int(np.searchsorted(sketches.index, record, side="right"))
    if end < 2 * window:
        return np.zeros(len(series.layers), bool)
    now = Window(sketches.values[end - window : end].astype(np.float32))
    before = Window(sketches.values[end - 2 * window : end - window].astype(np.float32))
    with np.errstate(invalid="ignore"):
        flags: Mask = turned(now, before) < -max(LEAST_COSINE, _ERRORS / math.sqrt(sketches.width))
    return flags


def _by_norm(
    series: Series, records: NDArray[np.int64], window: int
) -> tuple[NDArray[np.str_], Array]:
    named = np.full((len(records), len(series.layers)), "indeterminate", dtype="<U13")
    for i, record in enumerate(records.tolist()):
        inside = series.finite_log[max(0, record - window + 1) : record + 1]
        if len(inside) >= MIN_TREND:
            named[i] = _norm_directions(inside)
    return named, np.full(named.shape, np.nan)


def _norm_directions(log_norms: Array) -> NDArray[np.str_]:
    """One window, [W, L], by trend and lag-one autocorrelation of what the trend leaves."""
    known = np.isfinite(log_norms).sum(axis=0)
    residual, drift = detrended(log_norms)
    slope, p = np.zeros(len(known)), np.ones(len(known))
    # A necessary sign first: pairwise slopes of every layer would take most of the time.
    rows = np.flatnonzero(np.abs(drift) * (len(log_norms) - 1) > 0.5 * _TREND_NATS)
    if len(rows):
        slope[rows], p[rows] = column_trends(log_norms[:, rows])
    with np.errstate(invalid="ignore", divide="ignore"):
        repeat = np.nansum(residual[1:] * residual[:-1], axis=0) / np.nansum(residual**2, axis=0)
        error = (1 - repeat**2) / np.sqrt(known)
        significant = (p < _TREND_P) & (np.abs(slope) * (len(log_norms) - 1) > _TREND_NATS)
        swings = repeat < _OSCILLATING_LAG - _ERRORS * error
    named = np.where(swings, "oscillating", "indeterminate")
    named = np.where(significant, np.where(slope > 0, "forward", "backward"), named)
    return np.where(known >= MIN_TREND, named, "indeterminate")


def stability(series: Series, records: NDArray[np.int64], window: int = WINDOW) -> Array:
    """exp(-spread of the change of ln norm per step) over the window before each record, [R, L].

    1 is steady; it does not depend on the scale of the loss. NaN with fewer than five changes.
    """
    out = np.full((len(records), len(series.layers)), np.nan)
    start = max(0, int(records.min(initial=len(series.steps))) - window)
    gaps = np.diff(series.steps[start:]).astype(np.float64)[:, None]
    changes = np.diff(series.finite_log[start:], axis=0) / gaps
    for i, record in enumerate((records - start).tolist()):
        inside = changes[max(0, record - window) : record]
        if len(inside) >= MIN_WINDOW:
            centre = nanmedian(inside, axis=0)
            out[i] = np.exp(-GAUSSIAN * nanmedian(np.abs(inside - centre), axis=0))
            out[i, np.isfinite(inside).sum(axis=0) < MIN_WINDOW] = np.nan
    return out


def temporal(series: Series, flows: Directions, window: int = WINDOW) -> Iterator[TemporalFlow]:
    """One row for each record of some flow directions and layer that was recorded, by time."""
    records = flows.records
    steady = known_or_none(stability(series, records, window))
    norms = magnitudes(series, records)
    directions, there = flows.direction.tolist(), (series.status[records] != 0).tolist()
    for i, step in enumerate(series.steps[records].tolist()):
        rows = zip(series.names, norms[i], directions[i], steady[i], there[i], strict=True)
        for name, norm, direction, score, recorded in rows:
            if recorded:
                yield TemporalFlow(step, name, norm, direction, score)


def known_or_none(values: Array) -> list[Any]:
    """An array as lists, None where it is NaN."""
    unknown = np.isnan(values)
    found: Any = values.astype(object) if unknown.any() else values
    if unknown.any():
        found[unknown] = None
    return found.tolist()  # type: ignore[no-any-return]


def magnitudes(series: Series, records: NDArray[np.int64]) -> list[list[float | None]]:
    """Norms by record and layer: NaN for a gradient that is not finite, None where unknown."""
    found = known_or_none(series.norm[records])
    for i, row in np.argwhere(series.nonfinite[records]).tolist():
        found[i][row] = math.nan
    return found


def recent_records(series: Series, most_rows: int) -> Sequence[int]:
    """The last records whose rows, over all layers, are at most ``most_rows``."""
    count = max(1, most_rows // max(1, len(series.layers)))
    return range(max(0, len(series.steps) - count), len(series.steps))
