"""Steps that overshoot: where successive gradients oppose each other, and what that says."""

from __future__ import annotations

import math

import numpy as np

from gradscope.flow.directions import Cosines
from gradscope.flow.regions import onset
from gradscope.flow.result import LearningRateAdvice, Oscillation
from gradscope.flow.robust import MIN_TREND, Array, nanmedian, theil_sen
from gradscope.flow.series import Series
from gradscope.flow.temporal import Directions, directions


def oscillations(series: Series, found: Cosines | None, window: int) -> list[Oscillation]:
    """The stretches of windows in which layers oscillate, each with all its layers.

    Windows follow each other without overlap, so that a stretch is evidence and not an echo.
    """
    ends = _window_ends(series, window)
    if not len(ends):
        return []
    judged = directions(series, found, ends, window)
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


def learning_rate_advice(series: Series, found: list[Oscillation]) -> LearningRateAdvice | None:
    """What the last stretch says of the learning rate.

    For plain gradient descent on a quadratic g' = (1 - eta h) g: opposed gradients that grow by
    e^gamma a step have eta h = 1 + e^gamma, so dividing the rate by that reaches eta h = 1, where
    the sharpest direction is solved in one step. With momentum, Adam or noise only the sign holds.
    """
    last = next(
        (o for o in reversed(found) if o.cosine is not None and o.growth_per_step is not None), None
    )
    if last is None or last.cosine is None or last.growth_per_step is None:
        return None
    if last.cosine > -0.5:
        return None
    exact = series.plain_descent and last.cosine < -0.9 and series.gap == 1
    factor = 1 + math.exp(last.growth_per_step) if exact else None
    current = _current_rate(series)
    return LearningRateAdvice(
        divide_by=factor,
        current=current,
        suggested=current / factor if current is not None and factor else None,
        growth_per_step=last.growth_per_step,
        cosine=last.cosine,
        why=_why(factor, last.growth_per_step),
    )


def _why(factor: float | None, growth: float) -> str:
    if factor is None:
        return (
            "steps overshoot; with momentum, an adaptive optimizer or noisy batches no "
            "factor follows"
        )
    state = "diverges" if growth > 0 else "still converges"
    return (
        f"plain gradient descent at {factor:.3g} times the rate that would not "
        f"overshoot; it {state}"
    )


def _current_rate(series: Series) -> float | None:
    rates = series.history.lr
    if rates is None or not rates.size:
        return None
    known = np.asarray(rates, dtype=np.float64)
    known = known[np.isfinite(known).all(axis=1)]
    return float(known[-1].max()) if len(known) else None
