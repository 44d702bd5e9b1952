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
from functools import cached_property, reduce

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
)
from gradscope.flow.records.regions import Depth, Peak
from gradscope.flow.regions import (
    Stretch,
    carried,
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
from gradscope.flow.robust import Array, nanmedian
from gradscope.flow.series import Mask, Series
from gradscope.flow.underflow import underflow
from gradscope.flow.weights import weights_of


@dataclass(frozen=True, eq=False)
class Vanishing:
    """What the tests say of every cell: flags by test, and decades lost by depth or time."""

    tests: Mapping[str, Mask]
    #: Nats below what each test compares with.
    lost: Mapping[str, Array]

    @cached_property
    def decades(self) -> Array:
        """The most of any test that fires in a cell; minus infinity where none does."""
        out = np.full(next(iter(self.tests.values())).shape, -np.inf)
        for name, lost in self.lost.items():
            np.fmax(out, lost / DECADE, out=out, where=self.tests[name])
        return out

    @property
    def flags(self) -> Mask:
        """Any test."""
        return reduce(np.logical_or, self.tests.values())


def vanishing(series: Series, levels: Levels) -> Vanishing:
    """Every cell under every test that the history allows."""
    tests = {
        "depth": _below(levels.below_loss, DEPTH_DECADES),
        "time": _apart(series, levels.below_own, _below(levels.below_own, FALL_DECADES)),
        "update": _stalled(series, levels),
        "numeric": underflow(series),
    }
    usable = series.recorded & ~series.nonfinite & ~series.skipped[:, None]
    tests = {name: flags & usable for name, flags in tests.items()}
    return Vanishing(tests, {"depth": levels.below_loss, "time": levels.below_own})


def _below(nats: Array, least: float) -> Mask:
    """So many decades below, and from there on until half a decade inside."""
    stay = least - LEAVE_DECADES
    if not nats.size or not np.fmax.reduce(nats, axis=None) > 0.5 * stay * DECADE:
        return np.zeros(nats.shape, bool)
    decades = nats / DECADE
    return hysteresis(decades >= least, decades >= stay)


def _apart(series: Series, below_own: Array, fallen: Mask) -> Mask:
    """Layers that fell at records where the network as a whole did not."""
    if fallen.any():
        fallen &= _network_fall(series, below_own / DECADE)[:, None] < TOGETHER_DECADES
    return fallen


def _network_fall(series: Series, fall: Array) -> Array:
    """Decades that the median layer is below its own level, [T]: layers at zero do not count.

    Infinite where all are: a batch whose loss is zero has no gradient anywhere.
    """
    if not len(series.layers):
        return np.zeros(len(series.steps))
    zero = np.isinf(series.log_rms)
    known: Array = nanmedian(np.where(zero, np.nan, fall) if zero.any() else fall, axis=1)
    known[zero.all(axis=1)] = np.inf
    return np.nan_to_num(known, posinf=np.inf)


def _stalled(series: Series, levels: Levels) -> Mask:
    """Layers that stand still while the median layer moves."""
    ratio, kept = series.update_ratio, levels.attenuation
    if ratio is not None:
        assert series.median_update is not None
        network = series.median_update[:, None]
        stalled: Mask = (ratio < STANDSTILL) & (network > MOVING) & (series.norm > 0)
        return _left_the_start(carried(stalled, np.isfinite(ratio)), series.warm_up)
    if kept is None:
        return np.zeros(series.rms.shape, bool)
    held_back: Mask = (kept < ATTENUATED) & (nanmedian(kept, axis=1)[:, None] > ATTENUATED)
    return held_back


def _left_the_start(flags: Mask, warm_up: int) -> Mask:
    """Flags without those of layers that stand still from the first record on and soon move.

    A branch that starts from zero passes nothing on until it has left it.
    """
    leading = np.logical_and.accumulate(flags, axis=0)
    length = leading.sum(axis=0)
    left = (length <= warm_up) & (length < len(flags))
    kept: Mask = flags & ~(leading & left)
    return kept


def vanishing_candidates(
    series: Series,
    graph: Graph,
    levels: Levels,
    found: Vanishing,
    dead: Mask,
    depth: Depth | None,
) -> list[Candidate[VanishingFacts]]:
    """The regions in time and over the graph, not judged yet; dead cells are not part of them."""
    parts = [
        part
        for part in joined(stretches(found.flags & ~dead), graph)
        if not _over_at_the_start(series, part)
    ]
    lost = None if levels.attenuation is None else -levels.attenuation
    return [
        Candidate(
            region_id=name,
            affected_layers=tuple(series.names[row] for row in rows_of(part, graph)),
            extent=extent(part, series, graph),
            peak=_peak(series, found.decades, part),
            update_ratio=median_update(series, part),
            facts=tuple(_facts(series, lost, found, [run], depth) for run in part),
        )
        for name, part in named("vanishing", parts, series, graph)
    ]


def _over_at_the_start(series: Series, part: Sequence[Stretch]) -> bool:
    """Whether a region begins with the run and ends during warm-up.

    What lies behind a branch that starts from zero gets little until that has left it.
    """
    begins = min(run.first for run in part) == 0
    end = max(run.end for run in part)
    return begins and end <= series.warm_up and end < len(series.steps)


def _facts(
    series: Series,
    lost: Array | None,
    found: Vanishing,
    part: Sequence[Stretch],
    depth: Depth | None,
) -> VanishingFacts:
    """``lost`` is minus what epsilon leaves of each step."""
    tests = fired(found.tests, part)
    systemic = "depth" in tests and depth is not None and depth.systemic == "vanishing"
    faintest, typical = math.inf, None
    if lost is not None:
        faintest = -held(lost, part, [found.tests["update"]])
        typical = -float(nanmedian(np.concatenate([lost[r.first : r.end, r.row] for r in part])))
    return VanishingFacts(
        tests=tests,
        held_tests=held_tests(found.tests, part),
        systemic=systemic,
        nats_per_layer=None if depth is None else depth.nats_per_layer,
        gradual=depth is not None and depth.gradual and depth.nats_per_layer > 0,
        decades=held(found.decades, part),
        attenuation_held=faintest,
        attenuation=typical,
        update_ratio=median_update(series, part),
        epsilon=series.adaptive_epsilon,
        only_biases=all(series.group(run.row) == "bias" for run in part),
        weights=weights_of(series, part),
        zeros=_zeros(series, part),
    )


def _zeros(series: Series, part: Sequence[Stretch]) -> float | None:
    """Median share of elements that are zero, of layers that are no embedding."""
    dense = [run for run in part if series.layers[run.row].kind != "embedding"]
    if series.zero_fraction is None or not dense:
        return None
    shares = [series.zero_fraction[run.first : run.end, run.row] for run in dense]
    middle = float(nanmedian(np.concatenate(shares)))
    return middle if math.isfinite(middle) else None


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
