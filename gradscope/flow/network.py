"""The network as nodes and edges: which layers starve or amplify, and what each edge carries."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from gradscope.flow.graph import LOSS, Graph
from gradscope.flow.limits import BOTTLENECK_DECADES, BOTTLENECK_FROM, MIN_WINDOW, SPREAD_FLOOR
from gradscope.flow.paths import Edge, widest
from gradscope.flow.recent import Recent, kin
from gradscope.flow.records.network import (
    Condition,
    EdgeType,
    FlowEdge,
    FlowNetwork,
    FlowNode,
    NetworkMetrics,
    NodeType,
)
from gradscope.flow.records.regions import Depth
from gradscope.flow.robust import Array, nanmedian, spread
from gradscope.flow.series import Series

#: Of the median edge that carries anything: below the first an edge carries nothing at that
#: record, below the second little.
BLOCKED_FLOW = 1e-3
WEAK_FLOW = 0.1
_BLOCKED_SHARE = 0.1
_STEADY_SHARE = 0.9
_LEAST_FLOW = float(np.nextafter(0, 1))
AMPLIFIER_GAIN = 10.0
_AMPLIFIER_Z = 3.5


@dataclass(frozen=True, eq=False)
class Flows:
    """What every edge carries: RMS by record, [E, T], and its median of the last window."""

    edges: tuple[Edge, ...]
    rms: Array
    capacity: Mapping[Edge, float]
    recorded: bool


def flows(series: Series, graph: Graph, window: int) -> Flows:
    """The recorded contribution of each edge; without records of it the smaller RMS of its ends.

    The latter says which layers are starved, not how much flows.
    """
    rms = series.rms.T if series.recorded.all() else np.where(series.recorded, series.rms, np.nan).T
    edges, known = tuple(graph.edges), _recorded(series, graph)
    every = np.empty((len(edges), len(series.steps)))
    for i, (u, v) in enumerate(edges):
        every[i] = known[u, v] if (u, v) in known else np.minimum(rms[u], rms[v])
    recent = np.nan_to_num(nanmedian(every[:, -window:], axis=1)).tolist()
    capacity = dict(zip(edges, recent, strict=True))
    for row in graph.exits:
        capacity[row, LOSS] = float(np.nan_to_num(nanmedian(rms[row, -window:])))
    return Flows(edges, every, capacity, bool(known))


def _recorded(series: Series, graph: Graph) -> dict[Edge, Array]:
    """Recorded flows, where the file has them and no rows were joined into the same edge."""
    history = series.history
    if history.edge_flow is None or history.edges is None or series.edges is None:
        return {}
    if len(series.edges) != len(history.edges):
        return {}
    pairs = zip(series.edges.tolist(), history.edge_flow.T, strict=True)
    inside = set(graph.edges)
    return {(u, v): flow.astype(np.float64) for (u, v), flow in pairs if (u, v) in inside}


def network(
    series: Series, graph: Graph, now: Recent, found: Flows, depth: Depth | None, window: int
) -> FlowNetwork:
    """Nodes in order, edges in order, and the metrics of the whole."""
    nodes = tuple(_nodes(series, graph, now))
    edges = tuple(_edges(series, found, window))
    return FlowNetwork(
        nodes=nodes, edges=edges, metrics=_metrics(series, graph, found, nodes, edges, depth)
    )


def _nodes(series: Series, graph: Graph, now: Recent) -> Iterator[FlowNode]:
    chain = graph.topology == "assumed-chain"
    total = series.numel(graph.rows)
    gains = _gains(series, graph, now)
    usual = _usual(series, graph, gains)
    influence = (
        {} if chain else {row: series.numel(behind) for row, behind in graph.dominated.items()}
    )
    for row in graph.order:
        role = _role(graph, row)
        condition = _condition(now, gains, usual[series.group(row)], row)
        share = influence.get(row)
        yield FlowNode(
            layer_name=series.names[row],
            node_type=_type(role, condition),
            role=role,  # type: ignore[arg-type]
            condition=condition,
            gradient_strength=None if np.isnan(now.rms[row]) else float(now.rms[row]),
            connectivity=len(graph.before(row)) + len(graph.after(row)),
            influence_score=None if share is None or not total else share / total,
            depth=graph.depth.get(row),
        )


def _role(graph: Graph, row: int) -> str:
    if row not in graph.connected:
        return "isolated"
    if graph.graph.has_edge(row, LOSS):
        return "source"
    return "interior" if graph.before(row) else "sink"


def _type(role: str, condition: Condition) -> NodeType:
    """One name by precedence: bottleneck, amplifier, source, sink, normal."""
    if condition != "normal":
        return condition
    return role if role in ("source", "sink") else "normal"  # type: ignore[return-value]


def _gains(series: Series, graph: Graph, now: Recent) -> Array:
    """ln of each layer's RMS over the median of its kind's next layers towards the loss."""
    out = np.full(len(graph.rows), np.nan)
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.log(now.rms)
        for row in graph.rows:
            ahead = kin(series, row, graph.after)
            if ahead:
                out[row] = logs[row] - nanmedian(logs[ahead])
    return out


def _condition(now: Recent, gains: Array, usual: tuple[float, float], row: int) -> Condition:
    """A tenth of both neighbours is a bottleneck; ten times the next layer, alone, an amplifier."""
    if now.bottleneck[row] > BOTTLENECK_FROM / BOTTLENECK_DECADES:
        return "bottleneck"
    centre, wide = usual
    with np.errstate(invalid="ignore"):
        unusual = gains[row] - centre > _AMPLIFIER_Z * max(wide, SPREAD_FLOOR)
    return "amplifier" if gains[row] > math.log(AMPLIFIER_GAIN) and unusual else "normal"


def _usual(series: Series, graph: Graph, gains: Array) -> dict[str, tuple[float, float]]:
    """Median and spread of the gains of each kind; NaN with fewer than three."""
    found: dict[str, list[float]] = {}
    for row in graph.rows:
        found.setdefault(series.group(row), []).extend(gains[[row]][np.isfinite(gains[[row]])])
    return {
        kind: (float(np.median(g)), float(spread(np.array(g)))) if len(g) >= 3 else (np.nan, np.nan)
        for kind, g in found.items()
    }


def _edges(series: Series, found: Flows, window: int) -> Iterator[FlowEdge]:
    # Of those that carry something: with most of a network cut off the median edge carries nothing.
    typical = nanmedian(found.rms, axis=0, least=_LEAST_FLOW)
    for (u, v), flow in zip(found.edges, found.rms, strict=True):
        with np.errstate(divide="ignore", invalid="ignore"):
            relative = np.where(flow == 0, 0.0, flow / typical)
        recent, shares = relative[-window:], relative[np.isfinite(relative)]
        known = recent[np.isfinite(recent)]
        yield FlowEdge(
            from_layer=series.names[u],
            to_layer=series.names[v],
            flow_strength=float(nanmedian(known)) if len(known) else None,
            flow_consistency=_steady(shares),
            edge_type=edge_type(shares),
            basis="recorded" if found.recorded else "proxy",
        )


def _steady(shares: Array) -> float | None:
    """exp of minus the spread of an edge's ln share over all records: 1 where it never changes.

    None with fewer than five records that carry something.
    """
    logs = np.log(shares[shares > 0])
    if len(logs) < MIN_WINDOW:
        return None
    return math.exp(-float(spread(logs)))


def edge_type(relative: Array) -> EdgeType:
    """By how often an edge carries a thousandth of the median edge, and how much: a partition.

    blocked below 10 % of the records, intermittent below 90 %, else weak under a tenth of the
    median edge, else strong; unknown with fewer than five records.
    """
    if len(relative) < MIN_WINDOW:
        return "unknown"
    share = float((relative > BLOCKED_FLOW).mean())
    if share < _BLOCKED_SHARE:
        return "blocked"
    if share < _STEADY_SHARE:
        return "intermittent"
    few = 2 * np.count_nonzero(relative < WEAK_FLOW) < len(relative)
    return "strong" if few or float(nanmedian(relative)) >= WEAK_FLOW else "weak"


def _metrics(
    series: Series,
    graph: Graph,
    found: Flows,
    nodes: tuple[FlowNode, ...],
    edges: tuple[FlowEdge, ...],
    depth: Depth | None,
) -> NetworkMetrics:
    steady = [edge.flow_consistency for edge in edges if edge.flow_consistency is not None]
    bottlenecks = sum(node.condition == "bottleneck" for node in nodes)
    return NetworkMetrics(
        overall_flow_efficiency=_efficiency(graph, found),
        network_connectivity=_reached(series, graph, edges),
        bottleneck_density=bottlenecks / len(nodes) if nodes else None,
        flow_stability=float(np.median(steady)) if steady else None,
        information_propagation_speed=None if depth is None else math.exp(-depth.nats_per_layer),
    )


def _efficiency(graph: Graph, found: Flows) -> float | None:
    width, onward = widest(graph, found.capacity)
    at_loss = max((width[row] for row in graph.exits if row in width), default=0.0)
    ends = [width[row] for row in graph.entries if row in onward]
    if not ends or at_loss <= 0:
        return None
    if min(ends) <= 0:
        return 0.0
    return math.exp(float(np.mean([math.log(min(1.0, wide / at_loss)) for wide in ends])))


def _reached(series: Series, graph: Graph, edges: tuple[FlowEdge, ...]) -> float | None:
    """Share of the parameters that the loss reaches over edges that carry something."""
    total = series.numel(graph.rows)
    if graph.topology == "assumed-chain" or not total:
        return None
    open_ = {(e.from_layer, e.to_layer) for e in edges if e.edge_type != "blocked"}
    reached = set(graph.exits)
    for row in reversed(graph.order):
        ahead = [v for v in graph.after(row) if v in reached]
        if any((series.names[row], series.names[v]) in open_ for v in ahead):
            reached.add(row)
    return (series.numel(reached) or 0) / total
