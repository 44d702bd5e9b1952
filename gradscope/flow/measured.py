"""A history measured and judged: arrays in, the result out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gradscope.flow import judgement
from gradscope.flow.curves import curves
from gradscope.flow.dead_zones import covered, dead, dead_candidates, dead_stretches
from gradscope.flow.depth import depth_of
from gradscope.flow.directions import Cosines, cosines
from gradscope.flow.exploding import exploding, exploding_candidates
from gradscope.flow.graph import Graph, graph_of
from gradscope.flow.joining import By, series
from gradscope.flow.layers import layer_flows
from gradscope.flow.levels import Levels, levels
from gradscope.flow.limits import MIN_TREND
from gradscope.flow.loss import loss_level
from gradscope.flow.motion import convergence, leap, missing, stagnation, update_ratios
from gradscope.flow.network import flows, network
from gradscope.flow.nonfinite import nonfinite
from gradscope.flow.norms import above, explosion
from gradscope.flow.optimizer import accumulation, captures, clipping, damping, unoptimized
from gradscope.flow.oscillation import current_rate, oscillations
from gradscope.flow.overwritten import overwritten
from gradscope.flow.paths import critical_paths
from gradscope.flow.recent import Recent, recent
from gradscope.flow.records.regions import Depth
from gradscope.flow.result import FlowResult, Need
from gradscope.flow.rules.dead import dead_zone
from gradscope.flow.rules.exploding import exploding_gradient
from gradscope.flow.rules.motion import oscillation as oscillation_rule
from gradscope.flow.rules.vanishing import vanishing_gradient
from gradscope.flow.series import Series
from gradscope.flow.spikes import spikes
from gradscope.flow.temporal import WINDOW, directions, recent_records, temporal
from gradscope.flow.vanishing import vanishing, vanishing_candidates
from gradscope.histories.history import History

#: Rows of (layer, record) that the report holds unless all are asked for.
SERIES_ROWS = 100_000
#: Direction vectors, of 128 numbers each, that it holds of gradients which the file has whole.
VECTORS = 4096


@dataclass(frozen=True, eq=False)
class _Ground:
    """What every measurement stands on."""

    series: Series
    graph: Graph
    levels: Levels
    compared: Cosines | None
    depth: Depth | None
    now: Recent
    window: int


def analyze(
    history: History,
    *,
    by: By = "layer",
    window: int = WINDOW,
    all_series: bool = False,
    threshold: float | None = None,
) -> FlowResult:
    """Every measurement of one history, judged by the rules' own limits: arrays in, result out."""
    # NaN and infinity are data here, and what is divided by zero is undefined, not an accident.
    with np.errstate(all="ignore"):
        return _analyzed(history, by, window, all_series, threshold)


def _analyzed(
    history: History, by: By, window: int, all_series: bool, threshold: float | None
) -> FlowResult:
    g = _ground(history, by, window)
    return FlowResult(
        **_layers(g, all_series),
        **_network(g),
        **_regions(g, threshold),
        **_steps(g),
        **_optimizer(g),
        **_run(g),
    )


def _ground(history: History, by: By, window: int) -> _Ground:
    s = series(history, by)
    graph = graph_of(s)
    against = levels(s, graph)
    now = recent(s, graph, against, window)
    return _Ground(s, graph, against, cosines(s), depth_of(s, graph), now, window)


def _layers(g: _Ground, all_series: bool) -> dict[str, Any]:
    """Layers and their series: all records, or the most recent ones."""
    s, window, total = g.series, g.window, len(g.series.steps)
    shown = range(total) if all_series else range(*_span(recent_records(s, SERIES_ROWS), total))
    drawn = shown if all_series else shown[-_drawn(s, window) :]
    turns = directions(s, g.levels, g.compared, np.array(shown, dtype=np.int64), window)
    flowing = layer_flows(s, g.now, g.compared, turns, window, shown, drawn)
    return {
        "layers": tuple(flowing) if total else (),
        "temporal": tuple(temporal(s, turns, window)),
        "curves": curves(s, shown),
        "rows_omitted": (total - len(shown)) * len(s.layers),
    }


def _network(g: _Ground) -> dict[str, Any]:
    s, graph = g.series, g.graph
    edges = flows(s, graph, g.window)
    net = network(s, graph, g.now, edges, g.depth, g.window)
    nodes = zip(graph.order, net.nodes, strict=True)
    narrow = frozenset(row for row, node in nodes if node.condition == "bottleneck")
    return {
        "network": net,
        "critical_paths": tuple(critical_paths(s.names, graph, edges.capacity, g.now.rms, narrow)),
        "topology": graph.topology,
        "depth": g.depth,
    }


def _regions(g: _Ground, threshold: float | None) -> dict[str, Any]:
    """Where gradients vanish, explode, spike or are dead, judged by the limits of the rules."""
    s, graph = g.series, g.graph
    flat = dead(s)
    zones = dead_stretches(flat)
    small, large = vanishing(s, g.levels), exploding(s, g.levels)
    starved = vanishing_candidates(s, graph, g.levels, small, covered(zones, flat.shape), g.depth)
    blown = exploding_candidates(s, graph, large, g.depth)
    exploded = judgement.exploding(blown, **judgement.limits(exploding_gradient))
    verdicts = judgement.exploding_layers(exploded, above(s, threshold), threshold)
    lifeless = dead_candidates(s, graph, flat, zones)
    return {
        "vanishing_regions": judgement.vanishing(starved, **judgement.limits(vanishing_gradient)),
        "exploding_regions": exploded,
        "dead_zones": judgement.dead_zones(lifeless, **judgement.limits(dead_zone)),
        "explosion": explosion(s, exploded, verdicts),
        "spikes": tuple(spikes(s, large.jumps, judgement.lasting(exploded))),
        "nonfinite": tuple(nonfinite(s, graph)),
    }


def _steps(g: _Ground) -> dict[str, Any]:
    """How the network moves, and whether it overshoots."""
    s = g.series
    waves = oscillations(s, g.levels, g.compared, g.window)
    fell = convergence(s)
    opposed = judgement.limits(oscillation_rule)["opposed"]
    plain = s.plain_descent and s.gap == 1
    return {
        "oscillation": tuple(waves),
        "stagnation": stagnation(s, g.levels, fell),
        "learning_rate": judgement.learning_rate(waves, plain, current_rate(s), opposed=opposed),
        "update_ratios": tuple(update_ratios(s)),
        "leap": leap(s),
        "overwritten": overwritten(s),
        "missing": tuple(missing(s)),
        "convergence": fell,
    }


def _optimizer(g: _Ground) -> dict[str, Any]:
    """What the optimizer makes of the gradients."""
    s = g.series
    alone = unoptimized(s)
    return {
        "unoptimized": alone,
        "damping": damping(s, g.levels, g.window),
        "clipping": clipping(s),
        "accumulation": accumulation(s, g.compared, alone),
        "captures": captures(s),
    }


def _run(g: _Ground) -> dict[str, Any]:
    """The run as a whole, and what the history has to tell of it."""
    s, total = g.series, len(g.series.steps)
    return {
        "steps": total,
        "first_step": int(s.steps[0]) if total else None,
        "last_step": int(s.steps[-1]) if total else None,
        "skipped_steps": int(s.skipped.sum()),
        "loss": loss_level(s),
        "measured": tuple(_measured(s, g.graph, g.compared)),
        "notes": tuple(_notes(s)),
    }


def _drawn(s: Series, window: int) -> int:
    """How many of the last records come with direction vectors: a window, more of raw gradients."""
    return window if s.exact is None else max(window, VECTORS // max(1, len(s.layers)))


def _span(recent: Sequence[int], total: int) -> tuple[int, int]:
    return (recent[0], total) if total and recent else (0, total)


def _measured(s: Series, graph: Graph, compared: Cosines | None) -> Iterator[Need]:
    """The kinds of facts that the history has."""
    if s.layers:
        yield Need.NORMS
    if s.layers and len(s.steps) >= MIN_TREND:
        yield Need.RECORDS
    if len([r for r in graph.rows if s.group(r) == "weight"]) >= 2:
        yield Need.COMPARABLE
    if compared is not None:
        yield Need.DIRECTIONS
    if s.update_ratio is not None:
        yield Need.UPDATES
    if graph.topology != "assumed-chain":
        yield Need.TOPOLOGY
    if s.zero_fraction is not None:
        yield Need.ZEROS
    loss = s.history.loss
    if loss is not None and np.isfinite(loss).sum() >= MIN_TREND:
        yield Need.LOSS
    if any(layer.group is not None for layer in s.layers):
        yield Need.GROUPS


def _notes(s: Series) -> list[str]:
    notes = [*s.history.notes]
    notes += [f"{name} are approximate: {why}" for name, why in s.history.approximate.items()]
    if not s.per_element and s.layers:
        notes.append("the layers' sizes are unknown: norms are compared instead of RMS gradients")
    if s.history.meta.get("stage") == "pre_step":
        notes.append("recorded in the optimizer's pre-step hook: norms are those after clipping")
    return notes
