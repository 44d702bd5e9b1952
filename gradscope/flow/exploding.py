"""Where gradients explode: six tests, none of which depends on the scale of the loss.

non-finite
    NaN or Inf elements on a step that was not skipped.
spike
    More than six robust standard deviations of the log norm, and four times the median, above the
    128 records before, and four times the last eight (OLMo-core's six sigma; a spike that is over
    leaves no trace).
growth
    A Theil-Sen slope of the log norm over 64 (or 32, 16) records that makes it more than four
    times as large, a Mann-Kendall p below 0.01, and a level above everything after warm-up: what
    no spike detector sees.
update
    A step changes the weights by more than a tenth of their norm.
depth
    The RMS gradient lies more than 70 times above the loss side's (AutoTrainer's ratio).
level
    Ten times and more above the layer's own level after warm-up, and it stays there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, reduce

import numpy as np

from gradscope.flow.company import rate_factor
from gradscope.flow.facts import Candidate, ExplodingFacts
from gradscope.flow.graph import Graph
from gradscope.flow.growth import growing, growth_rate
from gradscope.flow.levels import Levels
from gradscope.flow.limits import (
    DEPTH_RATIO,
    GROWTH_FACTOR,
    LEVEL_RATIO,
    MIN_TREND,
    SHORTEST,
    UPDATE_HIGH,
)
from gradscope.flow.norms import usual_norm
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
from gradscope.flow.spikes import Jumps, jumps

#: A depth ratio holds on until a nat inside, a level until a third.
_LEAVE_NATS = 1.0
_LEAVE_LEVEL = 3.0
_LEVEL_RECORDS = 8
_GROWING = ("growth", "update", "depth", "level")


@dataclass(frozen=True, eq=False)
class Exploding:
    """What the tests say of every cell."""

    tests: Mapping[str, Mask]
    jumps: Jumps
    levels: Levels
    #: Recorded, and on a step that was not skipped.
    usable: Mask

    @cached_property
    def own_ratio(self) -> Array:
        """Norm over the layer's own level after warm-up."""
        return _only(self.usable, np.exp(-self.levels.below_own))

    @cached_property
    def above_loss(self) -> Array:
        """Nats above the loss side."""
        return _only(self.usable, -self.levels.below_loss)

    @property
    def flags(self) -> Mask:
        """What grows: a spike is a finding of its own, and NaN says nothing of what led to it."""
        return reduce(np.logical_or, (self.tests[name] for name in _GROWING))


def exploding(series: Series, levels: Levels) -> Exploding:
    """Every cell under every test that the history allows."""
    usable = series.recorded & ~series.skipped[:, None]
    logs = _only(usable, series.finite_log)
    top, below = -math.log(DEPTH_RATIO), _only(usable, levels.below_loss)
    found, growth = jumps(logs), growing(series, logs)
    level = _lasting(_above_own(levels, usable))
    for flags in (growth, level):
        _spare_those_catching_up(series, flags)
    tests = {
        "non-finite": series.nonfinite & ~series.skipped[:, None],
        "spike": found.spike,
        "growth": growth,
        "update": _large_updates(series),
        "depth": hysteresis(below < top, below < top + _LEAVE_NATS) & usable,
        "level": level,
    }
    return Exploding(tests, found, levels, usable)


def _above_own(levels: Levels, usable: Mask) -> Mask:
    """Ten times above the own level, and from there on until a third of it."""
    least = np.fmin.reduce(levels.below_own, axis=None, initial=np.inf)
    if least > -0.9 * math.log(LEVEL_RATIO):
        return np.zeros_like(usable)
    own = _only(usable, np.exp(-levels.below_own))
    return hysteresis(own > LEVEL_RATIO, own > LEVEL_RATIO / _LEAVE_LEVEL) & usable


def _only(usable: Mask, values: Array) -> Array:
    """Some values, NaN elsewhere; not copied where all are usable, for these arrays are large."""
    return values if usable.all() else np.where(usable, values, np.nan)


def _lasting(flags: Mask) -> Mask:
    """The flags of stretches of eight records and more."""
    out = np.zeros_like(flags)
    for run in stretches(flags, shortest=_LEVEL_RECORDS):
        out[run.first : run.end, run.row] = flags[run.first : run.end, run.row]
    return out


def _spare_those_catching_up(series: Series, flags: Mask) -> None:
    """Clear cells of layers that began far below the network and are on their way up to it.

    A branch that starts from zero has left it when it is as tall as the others, not before.
    """
    rows = np.flatnonzero(flags.any(axis=0))
    apart = series.log_rms[:, rows] - series.median_log[:, None]
    began = nanmedian(apart[:MIN_TREND], axis=0)
    far = math.log(GROWTH_FACTOR)
    flags[:, rows] &= ~((began < -far) & (apart > began + far) & (apart < far))


def _large_updates(series: Series) -> Mask:
    if series.update_ratio is None:
        return np.zeros(series.rms.shape, bool)
    flags: Mask = series.update_ratio > UPDATE_HIGH
    flags[: series.warm_up] = False
    return carried(flags, np.isfinite(series.update_ratio))


def exploding_candidates(
    series: Series, graph: Graph, found: Exploding, depth: Depth | None
) -> list[Candidate[ExplodingFacts]]:
    """The regions in time and over the graph, not judged yet."""
    grown = joined(stretches(found.flags), graph)
    broken = joined(stretches(found.tests["non-finite"], shortest=1), graph)
    parts = sorted([*grown, *broken], key=lambda part: min((run.first, run.row) for run in part))
    usual = usual_norm(series) if parts else math.nan
    return [
        Candidate(
            region_id=name,
            affected_layers=tuple(series.names[row] for row in rows_of(part, graph)),
            extent=extent(part, series, graph),
            peak=_peak(series, part),
            update_ratio=median_update(series, part),
            facts=tuple(
                _facts(series, found, _tests(found, part in grown), run, depth, usual)
                for run in part
            ),
        )
        for name, part in named("exploding", parts, series, graph)
    ]


def _tests(found: Exploding, grown: bool) -> Mapping[str, Mask]:
    """The tests that a region is told by: of growth, or of NaN and Inf."""
    return {name: flags for name, flags in found.tests.items() if (name == "non-finite") != grown}


def _facts(
    series: Series,
    found: Exploding,
    flags: Mapping[str, Mask],
    run: Stretch,
    depth: Depth | None,
    usual: float,
) -> ExplodingFacts:
    part = [run]
    tests = fired(flags, part)
    rate = growth_rate(series, run.row, run.first, run.end) if "growth" in tests else None

    def reached(values: Array | None, name: str, *other: str) -> float:
        if name not in flags:
            return -math.inf
        masks = [flags[test] for test in (name, *other)]
        return -math.inf if values is None else held(values, part, masks)

    return ExplodingFacts(
        tests=tests,
        held_tests=held_tests(flags, part),
        systemic="depth" in tests and depth is not None and depth.systemic == "exploding",
        nats_per_layer=None if depth is None else depth.nats_per_layer,
        own_ratio=reached(found.own_ratio, "level", "growth"),
        depth_nats=reached(found.above_loss, "depth"),
        update_ratio=reached(series.update_ratio, "update"),
        growth=rate,
        loss_rises=loss_rises(series.history.loss, run.first, run.end),
        usual_norm=usual,
        rate_factor=rate_factor(series, run.first) if run.first else None,
    )


def loss_rises(loss: np.ndarray | None, first: int, end: int) -> bool | None:
    """Whether the loss of some records lies above that of as many before; None when unknown."""
    if loss is None or not np.isfinite(loss).any():
        return None
    inside = loss[max(first, end - SHORTEST * 3) : end]
    if not np.isfinite(inside).all():
        return True
    before = loss[max(0, first - 4 * SHORTEST) : max(first, SHORTEST)]
    before = before[np.isfinite(before)]
    if not len(before):
        return None
    usual = nanmedian(before)
    return bool(nanmedian(inside) > usual + 2 * nanmedian(np.abs(before - usual)))


def _peak(series: Series, part: Sequence[Stretch]) -> Peak | None:
    """The greatest norm of a region; NaN when none is finite."""
    best: tuple[float, int, int] | None = None
    for run in part:
        inside = series.norm[run.first : run.end, run.row]
        if np.isfinite(inside).any():
            at = int(np.nanargmax(inside))
            if best is None or inside[at] > best[0]:
                best = (float(inside[at]), run.row, run.first + at)
    if best is None:
        first = part[0]
        best = (math.nan, first.row, first.first)
    return Peak(value=best[0], layer_name=series.names[best[1]], step=int(series.steps[best[2]]))
