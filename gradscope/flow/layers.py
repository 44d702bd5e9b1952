"""One row for each layer: how much gradient, how steady, in which direction."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from gradscope.flow.directions import Cosines, Window, pairwise_cosine
from gradscope.flow.limits import MIN_WINDOW
from gradscope.flow.recent import Recent
from gradscope.flow.records.layers import Basis, GradientDirection, LayerFlow
from gradscope.flow.robust import Array, nanmedian, steadiness
from gradscope.flow.series import Series
from gradscope.flow.temporal import Directions, magnitudes, stability
from gradscope.histories.history import Status

_MOST_SIGNAL = 0.999


def layer_flows(
    series: Series,
    now: Recent,
    found: Cosines | None,
    directions: Directions,
    window: int,
    shown: range,
    drawn: range,
) -> Iterator[LayerFlow]:
    """Every layer, its series cut to the records ``shown``, direction vectors to ``drawn``."""
    together = _consistency(series, window)
    steady = stability(series, np.array([len(series.steps) - 1]), window)[0]
    norms = magnitudes(series, np.array(shown, dtype=np.int64))
    steps = tuple(series.steps[shown.start : shown.stop].tolist())
    for row, layer in enumerate(series.layers):
        column = tuple(at[row] for at in norms)
        directed = together is not None and not np.isnan(together[row])
        basis: Basis = found.basis if found is not None and directed else "norm"
        signal = None if found is None else signal_of(series, found, row, window)
        yield LayerFlow(
            layer_name=layer.name,
            kind=layer.kind,
            numel=layer.numel,
            steps=steps,
            gradient_magnitudes=column,
            gradient_directions=_directions(
                series, found, row, dict(zip(shown, column, strict=True)), drawn
            ),
            flow_consistency=float(together[row])
            if directed and together is not None
            else steadiness(series.finite_log[-window:, row], series.steps[-window:].astype(float)),
            bottleneck_score=_or_none(now.bottleneck[row]),
            information_flow_rate=_rate(series, row, window, signal),
            basis=basis,
            rms=_or_none(now.rms[row]),
            deficit=_or_none(now.deficit[row]),
            update_ratio=_median(series.update_ratio, row, window),
            zero_fraction=_median(series.zero_fraction, row, window),
            flow_direction=str(directions.direction[-1, row])
            if len(directions.direction)
            else "indeterminate",  # type: ignore[arg-type]
            stability_score=_or_none(steady[row]),
            noise_scale=noise_scale(series, signal),
            records=int(series.recorded[:, row].sum()),
            missing=int((series.status[:, row] == Status.NOT_RECORDED).sum()),
        )


def _or_none(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def _median(values: Array | None, row: int, window: int) -> float | None:
    return None if values is None else _or_none(nanmedian(values[-window:, row]))


def _consistency(series: Series, window: int) -> Array | None:
    """Mean pairwise cosine of the last window's gradients, None without sketches."""
    if series.sketches is None or len(series.sketches.index) < MIN_WINDOW:
        return None
    return pairwise_cosine(Window(series.sketches.values[-window:].astype(np.float32)))


@dataclass(frozen=True, slots=True)
class Signal:
    """Share of a gradient's power that lasts, and its standard error."""

    share: float
    error: float


def signal_of(series: Series, found: Cosines, row: int, window: int) -> Signal | None:
    """Share of the gradient's power that lasts from one record to the next.

    mean <g_t, g_{t+lag}> / mean |g|^2 over the last window, the unbiased share of the squared mean
    gradient when batches are independent; its error is that of the mean over the pairs. None with
    fewer than five pairs.
    """
    cosine, before, after = (
        found.cosine[-window:, row],
        found.before[-window:],
        found.after[-window:],
    )
    known = np.isfinite(cosine)
    if known.sum() < MIN_WINDOW:
        return None
    a, b = series.norm[before, row][known], series.norm[after, row][known]
    top = max(float(a.max()), float(b.max()))
    if top == 0:
        return None
    a, b = a / top, b / top
    power = float((a**2).mean() + (b**2).mean()) / 2
    products = cosine[known] * a * b / power
    return Signal(float(products.mean()), float(products.std(ddof=1) / math.sqrt(len(products))))


def _rate(series: Series, row: int, window: int, signal: Signal | None) -> float | None:
    """Bits per step and effective dimension: 0.5 log2(1 + rho / (1 - rho)), rho the signal.

    Without directions the median absolute change of ln norm per step.
    """
    if signal is not None:
        share = min(max(signal.share, 0.0), _MOST_SIGNAL)
        return 0.5 * math.log2(1 + share / (1 - share))
    logs, steps = series.finite_log[-window:, row], series.steps[-window:]
    known = np.isfinite(logs)
    if known.sum() < MIN_WINDOW:
        return None
    return float(nanmedian(np.abs(np.diff(logs[known]) / np.diff(steps[known]))))


def noise_scale(series: Series, signal: Signal | None) -> float | None:
    """Effective gradient noise scale B (1 - rho) / rho in samples (McCandlish et al. 2018).

    From lagged products instead of micro-batches, so the motion of the parameters counts as noise;
    None when the batch size is unknown or the signal is not above its error.
    """
    batch = series.history.meta.get("batch_size")
    if signal is None or not isinstance(batch, int | float):
        return None
    if not 2 * signal.error < signal.share < 1:
        return None
    return float(batch) * (1 - signal.share) / signal.share


def _directions(
    series: Series,
    found: Cosines | None,
    row: int,
    shown: Mapping[int, float | None],
    drawn: range,
) -> tuple[GradientDirection, ...] | None:
    """One entry for each of the records ``shown``, with its norm, that has a direction."""
    if found is None and series.sketches is None:
        return None
    pair = {} if found is None else {t: i for i, t in enumerate(found.after.tolist())}
    vectors = (
        {}
        if series.sketches is None
        else {t: i for i, t in enumerate(series.sketches.index.tolist())}
    )
    return tuple(
        GradientDirection(
            step=int(series.steps[t]),
            direction_vector=_vector(series, row, vectors.get(t) if t in drawn else None),
            magnitude=norm,
            **_agreement(found, row, pair.get(t)),
        )
        for t, norm in shown.items()
        if t in pair or t in vectors
    )


def _agreement(found: Cosines | None, row: int, pair: int | None) -> dict[str, Any]:
    cosine = None if found is None or pair is None else _or_none(found.cosine[pair, row])
    if found is None or cosine is None:
        return {"consistency_score": None, "standard_error": None, "lag": None}
    error = float(found.error[pair, row])
    return {"consistency_score": cosine, "standard_error": error, "lag": found.lag}


def _vector(series: Series, row: int, at: int | None) -> tuple[float, ...] | None:
    if at is None or series.sketches is None:
        return None
    values = tuple(series.sketches.values[at, row].tolist())
    return values if any(values) else None
