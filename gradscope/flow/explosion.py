"""Exploding gradients over the whole history: which layers, how far, what to do."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from gradscope.flow.result import LEVELS, ExplodingLayer, Explosion, Level, Region
from gradscope.flow.robust import nanmedian
from gradscope.flow.series import Series


def explosion(
    series: Series, regions: Sequence[Region], threshold: float | None = None
) -> Explosion:
    """The seed's analysis of one step, made for every step and free of its absolute threshold.

    A layer explodes where a region of exploding gradients has it; ``threshold`` adds an absolute
    limit on norms for those who want one, at the level "mild". Mean, standard deviation
    (population) and median are over all finite norms. Ratios are of layers and of parameters.
    """
    worst = _worst(series, regions, threshold)
    layers = tuple(_layer(series, row, *worst[row]) for row in sorted(worst))
    finite = series.norm[np.isfinite(series.norm)]
    at = _location(series)
    sizes = series.numel(worst), series.numel(range(len(series.layers)))
    return Explosion(
        exploding_layers=layers,
        max_gradient_norm=float(finite.max()) if len(finite) else None,
        max_layer=None if at is None else series.names[at[1]],
        max_step=None if at is None else int(series.steps[at[0]]),
        mean_gradient_norm=float(finite.mean()) if len(finite) else None,
        std_gradient_norm=float(finite.std()) if len(finite) else None,
        median_gradient_norm=float(np.median(finite)) if len(finite) else None,
        mad_gradient_norm=float(np.median(np.abs(finite - np.median(finite))))
        if len(finite)
        else None,
        explosion_ratio=len(worst) / len(series.layers) if series.layers else None,
        parameter_ratio=None if sizes[0] is None or not sizes[1] else sizes[0] / sizes[1],
        overall_severity=_highest(layer.severity for layer in layers),
        mitigation_recommendations=tuple(
            dict.fromkeys(a for r in regions for a in r.mitigation_suggestions)
        ),
    )


def _worst(
    series: Series, regions: Sequence[Region], threshold: float | None
) -> dict[int, tuple[Level, Sequence[str], str]]:
    place = {name: row for row, name in enumerate(series.names)}
    found: dict[int, tuple[Level, Sequence[str], str]] = {}
    for region in sorted(regions, key=lambda r: -LEVELS.index(r.severity_level)):
        for name in region.affected_layers:
            advice = region.mitigation_suggestions[0] if region.mitigation_suggestions else ""
            found.setdefault(place[name], (region.severity_level, region.tests, advice))
    if threshold is not None:
        with np.errstate(invalid="ignore"):
            above = np.flatnonzero((series.norm > threshold).any(axis=0)).tolist()
        for row in above:
            found.setdefault(
                row,
                (
                    "mild",
                    ("threshold",),
                    f"its norm exceeds the limit of {threshold:g} that was asked for",
                ),
            )
    return found


def _layer(
    series: Series, row: int, level: Level, tests: Sequence[str], advice: str
) -> ExplodingLayer:
    norms = series.norm[:, row]
    known = np.isfinite(norms).any()
    at = int(np.nanargmax(norms)) if known else 0
    median = float(nanmedian(norms)) if known else math.nan
    return ExplodingLayer(
        layer_name=series.names[row],
        gradient_norm=float(norms[at]) if known else math.nan,
        step=int(series.steps[at]) if known else None,
        severity=level,
        tests=tuple(tests),
        ratio=float(norms[at]) / median if median > 0 else None,
        numel=series.layers[row].numel,
        recommended_action=advice,
    )


def _location(series: Series) -> tuple[int, int] | None:
    if not np.isfinite(series.norm).any():
        return None
    record, row = np.unravel_index(int(np.nanargmax(series.norm)), series.norm.shape)
    return int(record), int(row)


def _highest(levels) -> Level:  # type: ignore[no-untyped-def]
    return LEVELS[max((LEVELS.index(level) for level in levels), default=0)]
