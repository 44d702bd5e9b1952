"""The network of a run as a page draws it: what gradients flow through, and the weakest links."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from gradscope.flow.records.network import FlowEdge, FlowNode
from gradscope.flow.result import FlowResult
from gradscope.report.panels import Chart, inline

#: Nodes that are drawn; of a larger network the ways that matter are.
_NODES = 90
#: Nodes up to which each is named; of more only those that are out of the ordinary, and so many.
_NAMED, _NAMES = 16, 14
#: What a node is painted as.
_COLOURS = {"bottleneck": "@@high", "amplifier": "@@medium", "source": "@@line3",
            "sink": "@@line2"}  # fmt: skip
#: Points of an edge that goes around the nodes between its ends.
_POINTS = 13

Place = tuple[float, float]
Link = tuple[str, str]


def network(result: FlowResult) -> Chart:
    """Layers from the input to the loss, edges as wide as what they carry."""
    import altair as alt

    nodes = _chosen(result)
    place = _places(nodes)
    edges = [e for e in result.network.edges if e.from_layer in place and e.to_layer in place]
    weakest = {path.weakest_link for path in result.critical_paths if path.weakest_link}
    axis = alt.Axis(labels=False, ticks=False, grid=False, domain=False, titlePadding=24)
    x = alt.X("x:Q", axis=axis, title="input → loss", scale=alt.Scale(nice=False))
    y = alt.Y("y:Q", axis=axis, title=None, scale=alt.Scale(nice=False, zero=False))
    lines = (
        alt.Chart(inline([p for i, e in enumerate(edges) for p in _line(i, e, place, weakest)]))
        .mark_line(interpolate="basis")
        .encode(
            x=x, y=y, detail="edge:N", order="at:Q",
            strokeWidth=alt.StrokeWidth("width:Q", scale=None),
            strokeDash=alt.StrokeDash(
                "dash:N", legend=None, scale=alt.Scale(domain=["no", "yes"], range=[[1, 0], [4, 3]])
            ),
            color=alt.Color("colour:N", scale=None),
            tooltip=[alt.Tooltip("from:N"), alt.Tooltip("to:N"), alt.Tooltip("type:N"),
                     alt.Tooltip("flow:Q", format=".3g", title="flow of the median edge")],
        )
    )  # fmt: skip
    drawn = alt.Chart(inline(list(_points(nodes, place, {name for w in weakest for name in w}))))
    points = drawn.mark_circle(opacity=1).encode(
        x=x, y=y, size=alt.Size("size:Q", scale=None), color=alt.Color("colour:N", scale=None),
        tooltip=[alt.Tooltip("layer:N"), alt.Tooltip("type:N"),
                 alt.Tooltip("strength:Q", format=".3g", title="RMS gradient")],
    )  # fmt: skip
    names = drawn.mark_text(
        align="left", baseline="middle", dx=7, dy=9, angle=35, fontSize=11, limit=150,
        color="@@dim",
    ).encode(x=x, y=y, text="name:N")  # fmt: skip
    rows = max(len(level) for level in _levels(nodes).values())
    around = any(_span(e, place) > 1 for e in edges)
    tall = min(420, 70 + 34 * rows + 70 * around)
    chart = alt.layer(lines, points, names).properties(width=820, height=tall)
    assumed = " No topology was recorded: a chain is assumed." if (
        result.topology == "assumed-chain") else ""  # fmt: skip
    fewer = len(result.network.nodes) - len(nodes)
    left = f" {fewer:,} layers off the ways that matter are left out." if fewer else ""
    return Chart(
        "The network",
        "Line width is how much of the gradient an edge carries; what stands out is the weakest "
        "link of a way from the loss to the input, dashed is blocked or comes and goes. Large "
        "dots are bottlenecks, amplifiers and ends; point at one for its name."
        f"{assumed}{left}",
        chart.to_dict(),
    )


def _chosen(result: FlowResult) -> list[FlowNode]:
    nodes = result.network.nodes
    if len(nodes) <= _NODES:
        return list(nodes)
    paths = sorted(result.critical_paths, key=lambda p: p.total_flow_strength or 0.0)
    wanted: dict[str, None] = {}
    for path in paths:
        if len(wanted.keys() | set(path.layers)) <= _NODES or not wanted:
            wanted |= dict.fromkeys(path.layers)
    kept = [n for n in nodes if n.layer_name in wanted]
    return kept[:: -(-len(kept) // (2 * _NODES))]


def _levels(nodes: Sequence[FlowNode]) -> dict[int, list[FlowNode]]:
    """Nodes by distance from the loss; in order where it is not known."""
    found: dict[int, list[FlowNode]] = defaultdict(list)
    for at, node in enumerate(nodes):
        found[-(node.depth if node.depth is not None else len(nodes) - at)].append(node)
    return found


def _places(nodes: Sequence[FlowNode]) -> dict[str, Place]:
    levels = _levels(nodes)
    return {
        node.layer_name: (float(x), at - (len(level) - 1) / 2)
        for x, (_, level) in enumerate(sorted(levels.items()))
        for at, node in enumerate(level)
    }


# --- edges ----------------------------------------------------------------------------------------


def _line(
    number: int, edge: FlowEdge, place: Mapping[str, Place], weakest: set[Link]
) -> Iterator[Mapping[str, Any]]:
    flow = edge.flow_strength
    width = 1.0 if not flow else min(9.0, max(0.6, 3 + 1.2 * math.log10(flow)))
    weak = {(edge.from_layer, edge.to_layer), (edge.to_layer, edge.from_layer)} & weakest
    said = {
        "edge": number, "from": edge.from_layer, "to": edge.to_layer, "type": edge.edge_type,
        "flow": flow, "width": round(width + (1.5 if weak else 0), 2),
        "dash": "yes" if edge.edge_type in ("blocked", "intermittent") else "no",
        "colour": "@@critical" if weak else "@@info",
    }  # fmt: skip
    for at, (x, y) in enumerate(_way(place[edge.from_layer], place[edge.to_layer])):
        yield {"at": at, "x": round(x, 3), "y": round(y, 3), **said}


def _span(edge: FlowEdge, place: Mapping[str, Place]) -> float:
    return abs(place[edge.from_layer][0] - place[edge.to_layer][0])


def _way(one: Place, other: Place) -> Iterator[Place]:
    """A straight line between neighbours; an arc, on the side where it begins, around others."""
    (x, y), (x2, y2) = one, other
    span = abs(x2 - x)
    rise = 0.0 if span <= 1 else 0.5 + 0.2 * math.sqrt(span)
    side = -1 if y + y2 < 0 else 1
    count = 2 if rise == 0 else _POINTS
    for at in range(count):
        share = at / (count - 1)
        arc = side * rise * 4 * share * (1 - share)
        yield x + share * (x2 - x), y + share * (y2 - y) + arc


# --- nodes ----------------------------------------------------------------------------------------


def _points(
    nodes: Sequence[FlowNode], place: Mapping[str, Place], ends: set[str]
) -> Iterator[Mapping[str, Any]]:
    notable = [n for n in nodes if n.node_type != "normal" or n.layer_name in ends]
    named = {n.layer_name for n in (nodes if len(nodes) <= _NAMED else notable[:_NAMES])}
    for node in nodes:
        x, y = place[node.layer_name]
        yield {
            "x": x, "y": y, "layer": node.layer_name, "type": node.node_type,
            "strength": node.gradient_strength, "size": 60 if node.node_type == "normal" else 130,
            "colour": _COLOURS.get(node.node_type, "@@line1"),
            "name": node.layer_name if node.layer_name in named else "",
        }  # fmt: skip
