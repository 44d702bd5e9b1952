"""Where gradients vanish: four tests, none of which depends on the scale of the loss.

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

from gradscope.flow.facts import Candidate, VanishingFacts
from gradscope.flow.graph import Graph
from gradscope.flow.levels import DECADE, Levels
from gradscope.flow.limits import (
    ATTENUATED,
    DEPTH_DECADES,
    FALL_DECADES,
    LEAVE_DECADES,
    MOVING,
    STANDSTILL,
    TOGETHER_DECADES,
    ZERO_SHARE,
)
from gradscope.flow.regions import (
    Stretch,
    extent,
    fired,
    held,
    held_tests,
    hysteresis,
    joined,
    median_update,
    named,
    rows_of,
    stretches,
)
from gradscope.flow.result import Depth, Peak
from gradscope.flow.robust import Array, nanmedian
from gradscope.flow.series import Mask, Series

_HALF_SMALLEST = 6.103515625e-05
_UNDERFLOW_MARGIN = 10.0
_UNDERFLOW_ZEROS = 0.5


@dataclass(frozen=True, eq=False)
class Vanishing:
    """What the tests say of every cell: flags by test, and decades lost by depth or time."""

    tests: Mapping[str, Mask]
    #: Minus infinity where neither test fires.
    decades: Array

    @property
    def flags(self) -> Mask:
        """Any test."""
        result: Mask = np.logical_or.reduce(list(self.tests.values()))
        return result


def vanishing(series: Series, levels: Levels) -> Vanishing:
    """Every cell under every test that the history allows."""
    deficit = levels.below_loss / DECADE
    fall = levels.below_own / DECADE
    together = _network_fall(series, fall)[:, None] >= TOGETHER_DECADES
    tests = {
        "depth": hysteresis(deficit >= DEPTH_DECADES, deficit >= DEPTH_DECADES - LEAVE_DECADES),
        "time": hysteresis(fall >= FALL_DECADES, fall >= FALL_DECADES - LEAVE_DECADES) & ~together,
        "update": _stalled(series, levels),
        "numeric": _underflow(series),
    }
    usable = series.recorded & ~series.nonfinite & ~series.skipped[:, None]
    tests = {name: flags & usable for name, flags in tests.items()}
    decades = np.fmax(
        np.where(tests["depth"], deficit, -np.inf), np.where(tests["time"], fall, -np.inf)
    )
    return Vanishing(tests, decades)


def _network_fall(series: Series, fall: Array) -> Array:
    """Decades that the median layer is below its own level, [T]; layers at zero do not count."""
    if not len(series.layers):
        return np.zeros(len(series.steps))
    known: Array = nanmedian(np.where(np.isfinite(series.log_rms), fall, np.nan), axis=1)
    return np.nan_to_num(known)


def _stalled(series: Series, levels: Levels) -> Mask:
    """Layers that stand still while the median layer moves."""
    ratio, kept = series.update_ratio, levels.attenuation
    if ratio is not None:
        network = nanmedian(ratio, axis=1)[:, None]
        stalled: Mask = (ratio < STANDSTILL) & (network > MOVING) & (series.norm > 0)
        return stalled
    if kept is None:
        return np.zeros(series.rms.shape, bool)
    held_back: Mask = (kept < ATTENUATED) & (nanmedian(kept, axis=1)[:, None] > ATTENUATED)
    return held_back


def _underflow(series: Series) -> Mask:
    """Half-precision gradients near the smallest numbers of their type."""
    precision = series.history.meta.get("precision")
    kind = precision.get("grad") if isinstance(precision, Mapping) else None
    if str(kind).removeprefix("torch.") not in ("float16", "half", "fp16"):
        return np.zeros(series.rms.shape, bool)
    low: Mask = np.zeros(series.rms.shape, bool)
    if series.per_element:
        low = series.rms < _UNDERFLOW_MARGIN * _HALF_SMALLEST
    zeros = series.zero_fraction
    return low if zeros is None else low | ((zeros > _UNDERFLOW_ZEROS) & (zeros < ZERO_SHARE))


def vanishing_candidates(
    series: Series,
    graph: Graph,
    levels: Levels,
    found: Vanishing,
    dead: Mask,
    depth: Depth | None,
) -> list[Candidate[VanishingFacts]]:
    """The regions in time and over the graph, not judged yet; dead cells are not part of them."""
    parts = joined(stretches(found.flags & ~dead), graph)
    return [
        Candidate(
            region_id=name,
            affected_layers=tuple(series.names[row] for row in rows_of(part, graph)),
            extent=extent(part, series, graph),
            peak=_peak(series, found.decades, part),
            update_ratio=median_update(series, part),
            facts=_facts(series, levels, found, part, depth),
        )
        for name, part in named("vanishing", parts, series, graph)
    ]


def _facts(
    series: Series,
    levels: Levels,
    found: Vanishing,
    part: Sequence[Stretch],
    depth: Depth | None,
) -> VanishingFacts:
    tests, kept = fired(found.tests, part), levels.attenuation
    systemic = "depth" in tests and depth is not None and depth.systemic == "vanishing"
    faintest, typical = math.inf, None
    if kept is not None:
        faintest = -held(np.where(found.tests["update"], -kept, -np.inf), part)
        typical = float(nanmedian(np.concatenate([kept[r.first : r.end, r.row] for r in part])))
    return VanishingFacts(
        tests=tests,
        held_tests=held_tests(found.tests, part),
        systemic=systemic,
        nats_per_layer=None if depth is None else depth.nats_per_layer,
        decades=held(found.decades, part),
        attenuation_held=faintest,
        attenuation=typical,
        update_ratio=median_update(series, part),
        epsilon=series.adaptive_epsilon,
        only_biases=all(series.group(run.row) == "bias" for run in part),
    )


def _peak(series: Series, decades: Array, part: Sequence[Stretch]) -> Peak | None:
    """Where most decades are lost; None when no test counts them, or all are infinite."""
    best: tuple[float, Stretch, int] | None = None
    for run in part:
        inside = decades[run.first : run.end, run.row]
        inside = np.where(np.isfinite(inside), inside, -np.inf)
        at = int(np.argmax(inside))
        if np.isfinite(inside[at]) and (best is None or inside[at] > best[0]):
            best = (float(inside[at]), run, run.first + at)
    if best is None:
        return None
    value, run, record = best
    return Peak(value=value, layer_name=series.names[run.row], step=int(series.steps[record]))
