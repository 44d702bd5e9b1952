"""Steps that overshoot: where successive gradients oppose each other, and what that says."""

from __future__ import annotations

import numpy as np

from gradscope.flow.directions import Cosines
from gradscope.flow.levels import Levels
from gradscope.flow.limits import MIN_TREND
from gradscope.flow.records.steps import Oscillation
from gradscope.flow.regions import onset
from gradscope.flow.robust import Array, nanmedian, theil_sen
from gradscope.flow.series import Series
from gradscope.flow.temporal import Directions, directions


def oscillations(
    series: Series, levels: Levels, found: Cosines | None, window: int
) -> list[Oscillation]:
    """The stretches of windows in which layers oscillate, each with all its layers.

    Windows follow each other without overlap, so that a stretch is evidence and not an echo.
    """
    ends = _window_ends(series, window)
    if not len(ends):
        return []
    judged = directions(series, levels, found, ends, window)
    flags = judged.direction == "oscillating"
    busy = np.flatnonzero(flags.any(axis=1))
    if not len(busy):
        return []
    stretches = np.split(busy, np.flatnonzero(np.diff(busy) > 1) + 1)
    return [_stretch(series, judged, flags, stretch, window) for stretch in stretches]


def _window_ends(series: Series, window: int) -> np.ndarray:
    total = len(series.steps)
    if total < MIN_TREND:
        return np.empty(0, np.int64)
    ends = {*range(min(window, total) - 1, total, window), total - 1}
    return np.array(sorted(ends), dtype=np.int64)


def _stretch(
    series: Series, judged: Directions, flags: np.ndarray, stretch: np.ndarray, window: int
) -> Oscillation:
    rows = np.flatnonzero(flags[stretch].any(axis=0))
    first = max(0, int(judged.records[stretch[0]]) - window + 1)
    end = int(judged.records[stretch[-1]]) + 1
    with np.errstate(invalid="ignore"):
        inside = np.where(flags[stretch], judged.cosine[stretch], np.nan)
    cosine = float(nanmedian(inside)) if np.isfinite(inside).any() else None
    return Oscillation(
        layers=tuple(series.names[row] for row in rows.tolist()),
        share_of_layers=_share(series, rows),
        cosine=cosine,
        growth_per_step=_growth(series, rows, max(first, end - 2 * window), end),
        onset=onset(series, first),
        ongoing=end == len(series.steps),
        basis=judged.basis,
    )


def _share(series: Series, rows: np.ndarray) -> float:
    """Of the parameters where sizes are known, else of the layers."""
    total, part = series.numel(range(len(series.layers))), series.numel(rows.tolist())
    return part / total if total and part is not None else len(rows) / len(series.layers)


def _growth(series: Series, rows: np.ndarray, first: int, end: int) -> float | None:
    """Median over layers of the slope of ln norm per step, in nats."""
    steps = series.steps[first:end].astype(np.float64)
    slopes = [_slope(steps, series.finite_log[first:end, row]) for row in rows.tolist()]
    known = [slope for slope in slopes if slope is not None]
    return float(np.median(known)) if known else None


def _slope(steps: Array, logs: Array) -> float | None:
    if np.isfinite(logs).sum() < MIN_TREND:
        return None
    line = theil_sen(steps, logs)
    return None if line is None else line[0]


def current_rate(series: Series) -> float | None:
    """The greatest learning rate of the last record that has any."""
    rates = series.history.lr
    if rates is None or not rates.size:
        return None
    known = np.asarray(rates, dtype=np.float64)
    known = known[np.isfinite(known).all(axis=1)]
    return float(known[-1].max()) if len(known) else None
