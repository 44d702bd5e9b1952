"""Where gradients explode: five tests, each free of the loss's scale.

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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradscope.flow.graph import Graph, reference
from gradscope.flow.regions import (
    SHORTEST,
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
from gradscope.flow.result import LEVELS, Depth, Level, Peak, Region, Spike
from gradscope.flow.robust import MIN_TREND, Array, mann_kendall, nanmedian, spread, theil_sen
from gradscope.flow.series import Mask, Series, own_level, own_records
from gradscope.flow.trailing import trailing

TRAILING = 128
_LEAST_TRAILING = 16
#: Steady growth leaves a long window behind too; a spike also jumps from the last few records.
_JUST_BEFORE = 8
SPIKE_Z = 6.0
SPIKE_RATIO = 4.0
#: Floor of the spread, in nats: a deterministic series has none.
_SPREAD_FLOOR = 0.05
GROWTH_WINDOWS = (64, 32, 16)
GROWTH_FACTOR = 4.0
_GROWTH_P = 0.01
UPDATE_HIGH = 0.1
DEPTH_RATIO = 70.0
LEVEL_RATIO = 10.0
_LEVEL_RECORDS = 8
_RATIOS = (SPIKE_RATIO, 10.0, 50.0, 100.0)


@dataclass(frozen=True, eq=False)
class Exploding:
    """What the tests say of every cell."""

    tests: Mapping[str, Mask]
    levels: Grid
    #: Norm over the median of the records before, and its modified z.
    ratio: Array
    z: Array
    #: Norm over the layer's own level after warm-up.
    own_ratio: Array

    @property
    def flags(self) -> Mask:
        """Any test but the spike, which is a finding of its own while it leaves no trace."""
        result: Mask = np.logical_or.reduce(
            [f for name, f in self.tests.items() if name != "spike"]
        )
        return result


def exploding(series: Series, graph: Graph) -> Exploding:
    """Every cell judged by every test that the history allows."""
    usable = series.recorded & ~series.skipped[:, None]
    logs = np.where(usable, series.finite_log, np.nan)
    ratio, z, jumps = _jumps(logs)
    with np.errstate(invalid="ignore", over="ignore"):
        own = np.exp(logs - own_level(series))
        own[: own_records(series).stop] = np.nan
        above = logs - reference(series, graph)
        by_depth = hysteresis(above > math.log(DEPTH_RATIO), above > math.log(DEPTH_RATIO) - 1)
        level = hysteresis(own > LEVEL_RATIO, own > LEVEL_RATIO / 3)
    tests = {
        "non-finite": series.nonfinite & ~series.skipped[:, None],
        "spike": (z > SPIKE_Z) & (ratio > SPIKE_RATIO) & jumps,
        "growth": _growth(series, logs),
        "update": _large_updates(series),
        "depth": by_depth & usable,
        "level": _lasting(level & usable),
    }
    levels = _levels(tests, own, above, series)
    return Exploding(tests, levels, ratio, z, own)


def _jumps(logs: Array) -> tuple[Array, Array, Mask]:
    """Each norm over the median of the records before and its modified z, and where it jumps.

    The long window is walked only for layers that jump at all; the others' ratio and z are NaN.
    """
    just_before, _ = trailing(logs, _JUST_BEFORE, 1)
    with np.errstate(invalid="ignore", over="ignore"):
        jumps: Mask = logs - just_before > math.log(SPIKE_RATIO)
        rows = np.flatnonzero(jumps.any(axis=0))
        median, wide = trailing(logs[:, rows], TRAILING, _LEAST_TRAILING)
        ratio, z = np.full(logs.shape, np.nan), np.full(logs.shape, np.nan)
        above = logs[:, rows] - median
        ratio[:, rows], z[:, rows] = np.exp(above), above / np.maximum(wide, _SPREAD_FLOOR)
    return ratio, z, jumps


def _lasting(flags: Mask) -> Mask:
    out = np.zeros_like(flags)
    for run in runs(flags, shortest=_LEVEL_RECORDS):
        out[run.first : run.end, run.row] = flags[run.first : run.end, run.row]
    return out


def _large_updates(series: Series) -> Mask:
    if series.update_ratio is None:
        return np.zeros(series.rms.shape, bool)
    with np.errstate(invalid="ignore"):
        flags: Mask = series.update_ratio > UPDATE_HIGH
    flags[: series.warm_up] = False
    return flags


def _growth(series: Series, logs: Array) -> Mask:
    """Windows in which a layer's norm grows steadily and out of its earlier range."""
    flags = np.zeros(logs.shape, bool)
    total = len(logs)
    window = next((w for w in GROWTH_WINDOWS if total >= w + series.warm_up or total == w), None)
    if window is None:
        return flags
    ends = [*range(series.warm_up + window, total, window // 4), total]
    for end in ends:
        for row in _climbing(logs, end - window, end):
            if _grows(series, logs, row, end - window, end):
                flags[_begun(logs[end - window : end, row]) + end - window : end, row] = True
    return flags


def _climbing(logs: Array, first: int, end: int) -> Sequence[int]:
    """Rows whose last quarter of a window lies well above the first: a cheap necessary sign."""
    quarter = (end - first) // 4
    rise = nanmedian(logs[end - quarter : end], axis=0) - nanmedian(
        logs[first : first + quarter], axis=0
    )
    with np.errstate(invalid="ignore"):
        rows: list[int] = np.flatnonzero(rise > 0.5 * math.log(GROWTH_FACTOR)).tolist()
    return rows


def _grows(series: Series, logs: Array, row: int, first: int, end: int) -> bool:
    inside = logs[first:end, row]
    steps = series.steps[first:end].astype(np.float64)
    line = theil_sen(steps, inside)
    if line is None or line[0] * (steps[-1] - steps[0]) <= math.log(GROWTH_FACTOR):
        return False
    p = mann_kendall(inside)
    earlier = logs[min(series.warm_up, first) : first, row]
    earlier = earlier[np.isfinite(earlier)]
    escaped = len(earlier) < MIN_TREND or np.nanmax(inside) > earlier.max()
    return p is not None and p < _GROWTH_P and bool(escaped)


def _begun(inside: Array) -> int:
    """The record after the last one within the range that a window begins with."""
    quarter = inside[: len(inside) // 4]
    ceiling = nanmedian(quarter) + max(3 * spread(quarter), _SPREAD_FLOOR)
    below = np.flatnonzero(inside <= ceiling)
    return int(below[-1]) + 1 if len(below) else 0


def growth_rate(series: Series, row: int, first: int, end: int) -> float | None:
    """Slope of ln RMS per step over some records, in nats."""
    window = slice(max(first, end - GROWTH_WINDOWS[0]), end)
    steps = series.steps[window].astype(np.float64)
    line = theil_sen(steps, series.finite_log[window, row])
    return None if line is None else line[0]


def _levels(tests: Mapping[str, Mask], own: Array, above: Array, series: Series) -> Grid:
    """How bad each cell is, before consequences are weighed: mild 1 to critical 4."""
    levels = np.zeros(own.shape, np.int8)

    def raise_to(name: str, judged: Callable[[Mask], NDArray[np.integer[Any]]]) -> None:
        flags = tests[name]
        levels[flags] = np.maximum(levels[flags], judged(flags))

    # What is not known (no level of its own yet) is no degree of badness.
    raise_to("level", lambda at: np.digitize(np.nan_to_num(own[at]), _RATIOS))
    raise_to("growth", lambda at: np.maximum(np.digitize(np.nan_to_num(own[at]), _RATIOS), 1))
    raise_to("depth", lambda at: np.digitize(above[at], np.log([DEPTH_RATIO, 1e3, 1e5])))
    ratio = series.update_ratio
    if ratio is not None:
        raise_to(
            "update", lambda at: np.digitize(ratio[at], [UPDATE_HIGH, 0.5, 1.0]) + (ratio[at] > 0.5)
        )
    levels[tests["non-finite"]] = 4
    return levels


def exploding_regions(
    series: Series, graph: Graph, found: Exploding, depth: Depth | None
) -> list[Region]:
    """The regions in time and over the graph. Non-finite gradients need no three records."""
    lasting = runs(found.flags)
    brief = [
        run
        for run in runs(found.tests["non-finite"], shortest=1)
        if run.end - run.first < SHORTEST
        and not any(o.row == run.row and o.first <= run.first < o.end for o in lasting)
    ]
    parts = joined(sorted([*lasting, *brief], key=lambda r: (r.row, r.first)), graph)
    regions = [
        _region(series, graph, found, part, depth, name)
        for name, part in named("exploding", parts, series, graph)
    ]
    return [region for region in regions if region.severity_level != "none"]


def _region(
    series: Series,
    graph: Graph,
    found: Exploding,
    part: Sequence[Run],
    depth: Depth | None,
    name: str,
) -> Region:
    rows = rows_of(part, graph)
    tests = fired(found.tests, part)
    systemic = "depth" in tests and depth is not None and depth.systemic == "exploding"
    level = _judged(series, found, part, tests, systemic)
    cause, advice = _cause(series, tests, systemic, depth)
    return Region(
        region_id=name,
        affected_layers=tuple(series.names[row] for row in rows),
        severity_level=level,
        extent=extent(part, series, graph),
        tests=tests,
        systemic=systemic,
        peak=_peak(series, part),
        update_ratio=median_update(series, part),
        cause=cause,
        mitigation_suggestions=advice,
    )


def _judged(
    series: Series, found: Exploding, part: Sequence[Run], tests: Sequence[str], systemic: bool
) -> Level:
    """What follows decides: growth under a falling loss, or a tall input side, harms nobody yet."""
    if "non-finite" in tests:
        return "critical"
    level = sustained(found.levels, part)
    if "growth" in tests:
        level = max(level, _growth_level(series, part))
    if systemic:
        return LEVELS[max(level, 3)]
    first, end = min(r.first for r in part), max(r.end for r in part)
    rising = loss_rises(series, first, end)
    moving = "update" in tests and level >= 3
    if rising is False and not moving:
        return LEVELS[min(level, 1)] if {"depth", "update"} & set(tests) else "none"
    if rising is None and not moving and not {"growth", "level"} & set(tests):
        return LEVELS[min(level, 2)]
    return LEVELS[level]


def _growth_level(series: Series, part: Sequence[Run]) -> int:
    """By doubling time: below 10 steps severe, below 100 moderate."""
    rates = [growth_rate(series, run.row, run.first, run.end) for run in part]
    fastest = max((rate for rate in rates if rate), default=0.0)
    if fastest <= 0:
        return 1
    doubling = math.log(2) / fastest
    return 3 if doubling < 10 else 2 if doubling < 100 else 1


def loss_rises(series: Series, first: int, end: int) -> bool | None:
    """Whether the loss of some records lies above that of as many before; None when unknown."""
    loss = series.history.loss
    if loss is None or not np.isfinite(loss).any():
        return None
    inside = loss[max(first, end - SHORTEST * 3) : end]
    if not np.isfinite(inside).all():
        return True
    before = loss[max(0, first - 4 * SHORTEST) : max(first, SHORTEST)]
    before = before[np.isfinite(before)]
    if not len(before):
        return None
    return bool(
        np.median(inside) > np.median(before) + 2 * np.median(np.abs(before - np.median(before)))
    )


def _peak(series: Series, part: Sequence[Run]) -> Peak | None:
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


def _cause(
    series: Series, tests: Sequence[str], systemic: bool, depth: Depth | None
) -> tuple[str, tuple[str, ...]]:
    causes, advice = [], []
    if "non-finite" in tests:
        causes.append("gradients have NaN or Inf elements")
        advice.append(
            "go back to the last checkpoint before the onset; look at the batch, the loss "
            "and divisions, logs and roots at the origin"
        )
    if systemic and depth is not None:
        causes.append(
            "every layer on the way back from the loss multiplies the gradient by "
            f"{math.exp(-depth.nats_per_layer):.1f}"
        )
        advice.append(
            "use an initialisation that keeps the variance, normalisation, or residual "
            "branches scaled by 1/sqrt(depth)"
        )
    elif "depth" in tests:
        causes.append("these layers get far larger gradients than the loss side of their kind")
        advice.append(
            "look at what multiplies the gradient after them: a large gain, an unscaled "
            "branch, a sum over many positions"
        )
    if "growth" in tests or "level" in tests:
        causes.append(
            "the norm grew out of its earlier range"
            if "growth" in tests
            else "the norm stays far above its earlier level"
        )
        advice.append(
            f"lower the learning rate; clip the total norm at {clip_value(series):.3g} (the "
            "90th percentile before) as a guard"
        )
    if "update" in tests:
        causes.append("steps change the weights by more than a tenth of their norm")
        advice.append(
            "lower these layers' learning rate, or look at why their weights are so small"
        )
    return "; ".join(causes), tuple(dict.fromkeys(advice))


def clip_value(series: Series) -> float:
    """The 90th percentile of the total gradient norm over the healthier half of the run."""
    total = series.history.total_l2
    if total is None or not np.isfinite(total).any():
        total = np.sqrt(np.nansum(series.norm**2, axis=1))
    total = total[np.isfinite(total)]
    half = np.sort(total)[: max(1, len(total) // 2)] if len(total) else np.array([math.nan])
    return float(np.quantile(half, 0.9))


def spikes(series: Series, found: Exploding, regions: Sequence[Region]) -> list[Spike]:
    """Spikes by the record they begin at, the tallest layer of each named.

    ``left_a_trace`` tells those that fall into an exploding region from those that passed.
    """
    flags = found.tests["spike"]
    records = np.flatnonzero(flags.any(axis=1))
    if not len(records):
        return []
    events = np.split(records, np.flatnonzero(np.diff(records) > SHORTEST) + 1)
    return [_spike(series, found, flags, event, regions) for event in events]


def _spike(
    series: Series, found: Exploding, flags: Mask, event: np.ndarray, regions: Sequence[Region]
) -> Spike:
    inside = np.where(flags[event], found.ratio[event], -np.inf)
    at, row = np.unravel_index(int(np.argmax(inside)), inside.shape)
    step = int(series.steps[event[at]])
    trace = any(
        (r.extent.onset[0] or -1) <= step <= r.extent.end
        and r.severity_level in ("severe", "critical")
        for r in regions
    )
    return Spike(
        step=step,
        layer_name=series.names[row],
        layers=int(flags[event].any(axis=0).sum()),
        ratio=float(inside[at, row]),
        z=float(found.z[event[at], row]),
        left_a_trace=trace,
    )
