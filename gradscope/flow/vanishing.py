"""Where gradients vanish: four tests, each free of the loss's scale.

depth
    The RMS gradient lies three decades or more below the loss side's of its kind (the ratio of
    AutoTrainer, Zhang et al. 2021).
update
    The step changes the weights by less than 1e-6 of their norm while the network's median layer
    moves ten times that; for Adam-like optimizers without recorded updates, epsilon halves the
    step: RMS below epsilon.
time
    It fell three decades below the layer's own level after warm-up while the network's median fell
    less than one. A network that falls together converges.
numeric
    Half-precision gradients that underflow: half of them zero, or an RMS within ten times the
    type's smallest normal number.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from gradscope.flow.graph import Graph, reference
from gradscope.flow.regions import (
    Grid,
    Run,
    extent,
    fired,
    hysteresis,
    joined,
    median_update,
    named,
    rows_of,
    runs,
    sustained,
)
from gradscope.flow.result import LEVELS, Depth, Level, Peak, Region
from gradscope.flow.robust import Array, nanmedian
from gradscope.flow.series import Mask, Series, own_level, own_records

_DECADE = math.log(10)
DEPTH_DECADES = 3.0
UPDATE_FLOOR = 1e-6
UPDATE_ALIVE = 1e-5
FALL_DECADES = 3.0
TOGETHER_DECADES = 1.0
_LEAVE = 0.5
_HALF_SMALLEST = 6.103515625e-05


@dataclass(frozen=True, eq=False)
class Vanishing:
    """What the tests say of every cell: flags by test, decades lost, and their level 0 to 4."""

    tests: Mapping[str, Mask]
    decades: Array
    levels: Grid

    @property
    def flags(self) -> Mask:
        """Any test."""
        result: Mask = np.logical_or.reduce(list(self.tests.values()))
        return result


def vanishing(series: Series, graph: Graph) -> Vanishing:
    """Every cell judged by every test that the history allows."""
    deficit = (reference(series, graph) - series.log_rms) / _DECADE
    fall = _own_fall(series)
    with np.errstate(invalid="ignore"):
        by_depth = hysteresis(deficit >= DEPTH_DECADES, deficit >= DEPTH_DECADES - _LEAVE)
        together = _network_fall(series)[:, None] >= TOGETHER_DECADES
        by_time = hysteresis(fall >= FALL_DECADES, fall >= FALL_DECADES - _LEAVE) & ~together
    tests = {
        "depth": by_depth,
        "time": by_time,
        "update": _stalled(series),
        "numeric": _underflow(series),
    }
    usable = series.recorded & ~series.nonfinite & ~series.skipped[:, None]
    tests = {name: flags & usable for name, flags in tests.items()}
    decades = np.fmax(
        np.where(tests["depth"], deficit, -np.inf), np.where(tests["time"], fall, -np.inf)
    )
    return Vanishing(tests, decades, _levels(tests, decades, attenuation(series)))


def _levels(tests: Mapping[str, Mask], decades: Array, kept: Array | None) -> Grid:
    levels = np.zeros(decades.shape, np.int8)
    lost = tests["depth"] | tests["time"]
    levels[lost] = np.digitize(decades[lost], [DEPTH_DECADES - _LEAVE, 4, 5, 6])
    if kept is not None:
        levels[tests["update"] & (kept < 0.01)] = 4
    for name, least in (("update", 2), ("numeric", 2)):
        levels[tests[name]] = np.maximum(levels[tests[name]], least)
    return levels


def _own_fall(series: Series) -> Array:
    """Decades below the layer's own reference, NaN before it is complete."""
    fall: Array = (own_level(series) - series.log_rms) / _DECADE
    fall[: own_records(series).stop] = np.nan
    return fall


def _network_fall(series: Series) -> Array:
    """Decades that the median layer is below its reference, [T]."""
    if not len(series.layers):
        return np.zeros(len(series.steps))
    fall: Array = nanmedian(
        np.where(np.isfinite(series.log_rms), _own_fall(series), np.nan), axis=1
    )
    return np.nan_to_num(fall)


def attenuation(series: Series) -> Array | None:
    """Share of its full step that epsilon leaves an Adam-like optimizer, RMS / (RMS + eps).

    None for other optimizers and where sizes are unknown.
    """
    eps = series.adaptive_epsilon
    return None if eps is None or not series.per_element else series.rms / (series.rms + eps)


def _stalled(series: Series) -> Mask:
    ratio = series.update_ratio
    if ratio is not None:
        with np.errstate(invalid="ignore"):
            network = nanmedian(ratio, axis=1)[:, None]
            stalled: Mask = (ratio < UPDATE_FLOOR) & (network > UPDATE_ALIVE) & (series.norm > 0)
            return stalled
    kept = attenuation(series)
    if kept is None:
        return np.zeros(series.rms.shape, bool)
    with np.errstate(invalid="ignore"):
        result: Mask = (kept < 0.5) & (nanmedian(kept, axis=1)[:, None] > 0.5)
        return result


def _underflow(series: Series) -> Mask:
    precision = series.history.meta.get("precision")
    kind = precision.get("grad") if isinstance(precision, Mapping) else None
    if str(kind).removeprefix("torch.") not in ("float16", "half", "fp16"):
        return np.zeros(series.rms.shape, bool)
    with np.errstate(invalid="ignore"):
        low = (
            series.rms < 10 * _HALF_SMALLEST
            if series.per_element
            else np.zeros_like(series.nonfinite)
        )
        zeros = series.zero_fraction
        return low if zeros is None else low | ((zeros > 0.5) & (zeros < 0.999))


def vanishing_regions(
    series: Series, graph: Graph, found: Vanishing, dead: Mask, depth: Depth | None
) -> list[Region]:
    """The regions in time and over the graph; what is dead is no region here."""
    parts = joined(runs(found.flags & ~dead), graph)
    return [
        _region(series, graph, found, part, depth, name)
        for name, part in named("vanishing", parts, series, graph)
    ]


def _region(
    series: Series,
    graph: Graph,
    found: Vanishing,
    part: Sequence[Run],
    depth: Depth | None,
    name: str,
) -> Region:
    rows = rows_of(part, graph)
    tests = fired(found.tests, part)
    systemic = "depth" in tests and depth is not None and depth.systemic == "vanishing"
    ratio = median_update(series, part)
    level = _judged(
        sustained(found.levels, part), tests, systemic, ratio, attenuation(series), part
    )
    cause, advice = _cause(series, tests, systemic, depth, ratio)
    if all(series.group(row) == "bias" for row in rows):
        # Before a normalisation a bias has no effect: its gradient is what rounding leaves.
        level = LEVELS[min(LEVELS.index(level), 1)]
        advice = (*advice, "a bias before a normalisation has no effect: leave it out (bias=False)")
    return Region(
        region_id=name,
        affected_layers=tuple(series.names[row] for row in rows),
        severity_level=level,
        extent=extent(part, series, graph),
        tests=tests,
        systemic=systemic,
        peak=_peak(series, found.decades, part),
        update_ratio=ratio,
        cause=cause,
        mitigation_suggestions=advice,
    )


def _judged(
    level: int,
    tests: Sequence[str],
    systemic: bool,
    ratio: float | None,
    kept: Array | None,
    part: Sequence[Run],
) -> Level:
    """The consequence decides: a small gradient whose layer still learns is at most moderate."""
    if systemic:
        return LEVELS[max(level, 3)]
    learns = ratio is not None and ratio > UPDATE_ALIVE
    if ratio is None and kept is not None:
        inside = np.concatenate([kept[r.first : r.end, r.row] for r in part])
        learns = float(np.nanmedian(inside)) > 0.5
    return LEVELS[min(level, 2) if learns and "numeric" not in tests else level]


def _peak(series: Series, decades: Array, part: Sequence[Run]) -> Peak | None:
    best: tuple[float, Run, int] | None = None
    for run in part:
        inside = np.where(
            np.isfinite(decades[run.first : run.end, run.row]),
            decades[run.first : run.end, run.row],
            -np.inf,
        )
        at = int(np.argmax(inside))
        if np.isfinite(inside[at]) and (best is None or inside[at] > best[0]):
            best = (float(inside[at]), run, run.first + at)
    if best is None:
        return None
    value, run, record = best
    return Peak(value=value, layer_name=series.names[run.row], step=int(series.steps[record]))


def _cause(
    series: Series, tests: Sequence[str], systemic: bool, depth: Depth | None, ratio: float | None
) -> tuple[str, tuple[str, ...]]:
    """What the evidence points at, and what to do about that; never clipping."""
    causes, advice = [], []
    if systemic and depth is not None:
        causes.append(
            f"every layer on the way back from the loss divides the gradient by "
            f"{math.exp(depth.nats_per_layer):.1f}"
        )
        advice += [
            "use an activation that does not saturate (ReLU, GELU) or an initialisation that keeps "
            "the variance (He, Xavier, orthogonal)",
            "add normalisation or residual connections",
        ]
    elif "depth" in tests:
        causes.append("the gradient drops at this place, not along the whole stack")
        advice.append(
            "look at what these layers feed: a saturated activation, a detach(), a tiny gain or "
            "initial scale"
        )
    if "time" in tests:
        causes.append("the layers fell far below their own earlier level while the rest did not")
        advice.append(
            "compare activations and weights before and after the onset: saturation, a "
            "schedule that froze them, a collapsed norm gain"
        )
    if "numeric" in tests:
        causes.append("float16 cannot represent gradients this small")
        advice.append("use a gradient scaler (larger loss scale) or bfloat16")
    if "update" in tests:
        causes.append(_update_cause(series, ratio))
        advice.append(_update_advice(series))
    return "; ".join(causes), tuple(dict.fromkeys(advice))


def _update_cause(series: Series, ratio: float | None) -> str:
    if ratio is not None:
        return f"steps change the weights by {ratio:.1g} of their norm"
    return f"the optimizer's epsilon ({series.adaptive_epsilon:g}) outweighs the gradient"


def _update_advice(series: Series) -> str:
    if series.adaptive_epsilon is not None:
        return (
            f"lower the optimizer's epsilon below {series.adaptive_epsilon:g}, or scale the loss up"
        )
    return "check the parameter group's learning rate"
