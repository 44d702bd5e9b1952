"""Norms over the whole history: their statistics, and the layers whose gradients explode."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from gradscope.compiled import kernel
from gradscope.flow.judgement import LayerVerdict, worst
from gradscope.flow.records.regions import ExplodingLayer, Explosion, Region
from gradscope.flow.robust import Array, nanmedian
from gradscope.flow.series import Series

_PIECE = 1 << 15
#: The middle of many values is looked for between two quantiles of a sample, this far apart.
_SAMPLE = 4096
_MARGIN = 0.05


def explosion(
    series: Series, regions: Sequence[Region], verdicts: Mapping[str, LayerVerdict]
) -> Explosion:
    """The analysis that seed 002 makes of one step, made of every step.

    ``verdicts`` are those of the layers that explode. Mean, standard deviation (population) and
    median are over all finite norms; ratios are of layers and of parameters.
    """
    rows = [row for row, name in enumerate(series.names) if name in verdicts]
    layers = tuple(_layer(series, row, verdicts[series.names[row]]) for row in rows)
    known = np.isfinite(series.norm)
    finite = series.norm.ravel() if known.all() else series.norm[known]
    at = _location(series)
    mean = float(finite.mean()) if len(finite) else math.nan
    part, whole = series.numel(rows), series.numel(range(len(series.layers)))
    median = middle(finite) if len(finite) else math.nan
    return Explosion(
        exploding_layers=layers,
        max_gradient_norm=float(finite.max()) if len(finite) else None,
        max_layer=None if at is None else series.names[at[1]],
        max_step=None if at is None else int(series.steps[at[0]]),
        mean_gradient_norm=mean if len(finite) else None,
        std_gradient_norm=_deviation(finite, mean) if len(finite) else None,
        median_gradient_norm=median if len(finite) else None,
        mad_gradient_norm=middle(finite, median) if len(finite) else None,
        explosion_ratio=len(rows) / len(series.layers) if series.layers else None,
        parameter_ratio=None if part is None or not whole else part / whole,
        overall_severity=worst(layer.severity for layer in layers),
        mitigation_recommendations=tuple(
            dict.fromkeys(advice for r in regions for advice in r.mitigation_suggestions)
        ),
    )


def middle(values: Array, centre: float = 0.0) -> float:
    """The median distance of very many values, none of them NaN, from a centre.

    It lies between two quantiles of a sample, or all are looked at.
    """
    sample = np.sort(np.abs(values[:: max(1, len(values) // _SAMPLE)] - centre))
    low, high = (sample[int(len(sample) * (0.5 + side * _MARGIN))] for side in (-1, 1))
    for least, most, room in ((low, high, len(values) // 4), (0.0, math.inf, len(values))):
        found = _middle(values, centre, least, most, np.empty(room))
        if found is not None:
            return found
    return math.nan


def _middle(values: Array, centre: float, low: float, high: float, room: Array) -> float | None:
    """None where it does not lie inside, or more lies there than there is room for."""
    counts = np.zeros(2, np.int64)
    _gathered(values, centre, low, high, room, counts)
    below, count = counts.tolist()
    upper = len(values) // 2 - below
    lower = upper - 1 + len(values) % 2
    if count > len(room) or lower < 0 or upper >= count:
        return None
    ordered = np.partition(room[:count], (lower, upper))
    a, b = float(ordered[lower]), float(ordered[upper])
    return a if a == b else 0.5 * (a + b)


@kernel(alone=True)
def _gathered(
    values: Array, centre: float, low: float, high: float, room: Array, counts: Array
) -> None:
    """Count the distances below a range, and those in it, which are copied."""
    below, count = 0, 0
    for value in values:
        distance = abs(value - centre)
        if distance < low:
            below += 1
        if low <= distance <= high:
            if count < len(room):
                room[count] = distance
            count += 1
    counts[0], counts[1] = below, count


def _deviation(values: Array, mean: float) -> float:
    """Population standard deviation, a piece at a time that stays in the cache."""
    squares = (
        float(((values[first : first + _PIECE] - mean) ** 2).sum())
        for first in range(0, len(values), _PIECE)
    )
    return math.sqrt(math.fsum(squares) / len(values))


def _layer(series: Series, row: int, verdict: LayerVerdict) -> ExplodingLayer:
    norms = series.norm[:, row]
    known = np.isfinite(norms).any()
    at = int(np.nanargmax(norms)) if known else 0
    median = float(nanmedian(norms)) if known else math.nan
    return ExplodingLayer(
        layer_name=series.names[row],
        gradient_norm=float(norms[at]) if known else math.nan,
        step=int(series.steps[at]) if known else None,
        severity=verdict.level,
        tests=verdict.tests,
        ratio=float(norms[at]) / median if median > 0 else None,
        numel=series.layers[row].numel,
        recommended_action=verdict.advice,
    )


def _location(series: Series) -> tuple[int, int] | None:
    greatest = np.fmax.reduce(series.norm, axis=1) if series.norm.size else np.empty(0)
    if not np.isfinite(greatest).any():
        return None
    record = int(np.nanargmax(greatest))
    row = int(np.nanargmax(series.norm[record]))
    return record, row


def above(series: Series, threshold: float | None) -> list[str]:
    """The layers whose norm ever exceeds an absolute limit; none without one."""
    if threshold is None:
        return []
    rows = np.flatnonzero((series.norm > threshold).any(axis=0)).tolist()
    return [series.names[row] for row in rows]


def usual_norm(series: Series) -> float:
    """The 90th percentile of the total gradient norm over the calmer half of the run."""
    total = series.history.total_l2
    if total is None or not np.isfinite(total).any():
        total = series.total
    total = total[np.isfinite(total)]
    half = np.sort(total)[: max(1, len(total) // 2)] if len(total) else np.array([math.nan])
    return float(np.quantile(half, 0.9))
