"""What a page shows of ``flow``: where and since when, beside the loss, and the network."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

from gradscope.flow.drawn_network import network
from gradscope.flow.page_against import against
from gradscope.flow.records.layers import LayerFlow
from gradscope.flow.records.regions import Level
from gradscope.flow.result import FlowResult
from gradscope.flow.rules.say import spikes
from gradscope.report.panels import Chart, Column, Grid, Panel, Row, inline

#: Rows and columns of the heatmap; more layers are put together by block, more records by time.
_ROWS, _COLUMNS = 72, 160
_COLOURS: Mapping[Level, str] = {
    "none": "@@info", "mild": "@@low", "moderate": "@@medium", "severe": "@@high",
    "critical": "@@critical",
}  # fmt: skip
_AMOUNT = ["@@amount0", "@@amount1", "@@amount2", "@@amount3", "@@amount4"]


def flow(result: FlowResult) -> Iterator[Panel]:
    """Gradients over layers and steps, another run, curves of this one, the network, all layers."""
    if result.layers and any(layer.steps for layer in result.layers):
        yield _heatmap(result)
    if result.against is not None:
        yield from against(result.against)
    if curves := list(_curves(result)):
        yield _drawn_curves(curves, list(_events(result)))
    if len(result.network.nodes) > 1:
        yield network(result)
    if result.layers:
        yield _layers(result)


# --- layers by steps ------------------------------------------------------------------------------


def _heatmap(result: FlowResult) -> Chart:
    import altair as alt

    groups = _groups(result.layers)
    order = list(groups)
    cells = [cell for name, layers in groups.items() for cell in _cells(name, layers)]
    known = [cell["log"] for cell in cells]
    x = alt.X("from:Q", title="step", scale=alt.Scale(zero=False, nice=False))
    y = alt.Y("layer:O", sort=None, title=None, axis=alt.Axis(labelLimit=260),
              scale=alt.Scale(domain=order))  # fmt: skip
    heat = (
        alt.Chart(inline(cells))
        .mark_rect()
        .encode(
            x=x, x2="to:Q", y=y,
            color=alt.Color(
                "log:Q", title="log₁₀ RMS",
                scale=alt.Scale(range=_AMOUNT, domain=_domain(known), clamp=True),
            ),
            tooltip=[alt.Tooltip("layer:N"), alt.Tooltip("from:Q", title="from step"),
                     alt.Tooltip("to:Q", title="to step"),
                     alt.Tooltip("value:Q", format=".3g", title="RMS gradient")],
        )
    )  # fmt: skip
    drawn = [heat]
    if regions := list(_regions(result, groups)):
        drawn.append(
            alt.Chart(inline(regions))
            .mark_rect(filled=False, strokeWidth=2)
            .encode(
                x=alt.X("from:Q"), x2="to:Q",
                y=alt.Y("layer:O", sort=None, bandPosition=0),
                y2=alt.Y2("until:O", bandPosition=1),
                stroke=alt.Stroke("colour:N", scale=None),
                tooltip=[alt.Tooltip("what:N"), alt.Tooltip("layer:N", title="from layer"),
                         alt.Tooltip("until:N", title="to layer"),
                         alt.Tooltip("from:Q", title="from step"),
                         alt.Tooltip("to:Q", title="to step")],
            )
        )  # fmt: skip
    chart = alt.layer(*drawn).properties(width=820, height={"step": 13})
    return Chart(
        "Gradients by layer and step",
        "From the input (top) to the loss (bottom). Dark is small, bright is large, empty was not "
        "recorded or is not finite; outlined is what a finding is about.",
        chart.to_dict(),
    )


def _groups(layers: Sequence[LayerFlow]) -> dict[str, list[LayerFlow]]:
    """Layers as rows: each its own, or those of a block together where they are too many."""
    if len(layers) <= _ROWS:
        return {layer.layer_name: [layer] for layer in layers}
    found: dict[str, list[LayerFlow]] = defaultdict(list)
    blocks = list(dict.fromkeys(_block(layer.layer_name) for layer in layers))
    together = -(-len(blocks) // _ROWS)
    row = {b: blocks[i // together * together] for i, b in enumerate(blocks)}
    for layer in layers:
        found[row[_block(layer.layer_name)]].append(layer)
    return dict(found)


def _block(name: str) -> str:
    """The path up to its last number: ``blocks.3`` of ``blocks.3.attn.out``."""
    parts = name.split(".")
    last = max((i for i, part in enumerate(parts) if part.isdigit()), default=len(parts) - 1)
    return ".".join(parts[: last + 1])


def _cells(name: str, layers: Sequence[LayerFlow]) -> Iterator[dict[str, Any]]:
    """The median over layers and records of each cell, of what is known and above zero."""
    steps = layers[0].steps
    each = -(-len(steps) // _COLUMNS)
    for first in range(0, len(steps), each):
        end = min(first + each, len(steps))
        values = sorted(
            v / math.sqrt(layer.numel or 1)
            for layer in layers
            for v in layer.gradient_magnitudes[first:end]
            if v is not None and 0 < v < math.inf
        )
        if values:
            middle = values[len(values) // 2]
            yield {"layer": name, "from": steps[first], "to": _end(steps, end), "value": middle,
                   "log": round(math.log10(middle), 3)}  # fmt: skip


def _end(steps: Sequence[int], record: int) -> int:
    """The step at which a record's cell ends; the last is as wide as the one before."""
    if record < len(steps):
        return steps[record]
    return 2 * steps[-1] - steps[-2] if len(steps) > 1 else steps[0] + 1


def _domain(known: Sequence[float]) -> list[float]:
    """Without the outer hundredth: one wild cell does not take the colour from all others."""
    ordered = sorted(known) or [0.0]
    low, high = ordered[len(ordered) // 100], ordered[-1 - len(ordered) // 100]
    return [low, max(high, low + 1)]


def _regions(
    result: FlowResult, groups: Mapping[str, Sequence[LayerFlow]]
) -> Iterator[dict[str, Any]]:
    row = {layer.layer_name: name for name, layers in groups.items() for layer in layers}
    names = list(groups)
    found = [
        *(("vanishing", r.severity_level, r.affected_layers, r.extent)
          for r in result.vanishing_regions),
        *(("exploding", r.severity_level, r.affected_layers, r.extent)
          for r in result.exploding_regions),
        *(("dead", "severe" if z.intervention_required else "mild", z.affected_layers, z.extent)
          for z in result.dead_zones),
    ]  # fmt: skip
    for what, level, layers, extent in found:
        rows = {row[layer] for layer in layers if layer in row}
        for first, last in _neighbours([name in rows for name in groups]):
            yield {
                "what": f"{what}, {level}",
                "layer": names[first],
                "until": names[last],
                "from": extent.onset[1],
                "to": extent.end,
                "colour": _COLOURS[level],
            }


def _neighbours(inside: Sequence[bool]) -> Iterator[tuple[int, int]]:
    """The first and the last place of each stretch."""
    for value, places in groupby(range(len(inside)), inside.__getitem__):
        if value:
            stretch = list(places)
            yield stretch[0], stretch[-1]


# --- curves ---------------------------------------------------------------------------------------


def _curves(result: FlowResult) -> Iterator[dict[str, Any]]:
    if result.curves is None:
        return
    named = {
        "loss": result.curves.loss,
        "total gradient norm": result.curves.total_norm,
        "learning rate": result.curves.learning_rate,
    }
    steps = result.curves.steps
    each = -(-len(steps) // 1000)
    for name, values in named.items():
        for step, value in list(zip(steps, values or (), strict=False))[::each]:
            if value is not None and math.isfinite(value):
                yield {"what": name, "step": step, "value": value}


def _events(result: FlowResult) -> Iterator[dict[str, Any]]:
    """Where findings begin."""

    def at(step: int | None, what: str, level: Level) -> Iterator[dict[str, Any]]:
        if step is not None:
            yield {"step": step, "what": what, "colour": _COLOURS[level]}

    for region in result.vanishing_regions:
        yield from at(region.extent.onset[1], "gradients vanish", region.severity_level)
    for region in result.exploding_regions:
        yield from at(region.extent.onset[1], "gradients explode", region.severity_level)
    for zone in result.dead_zones:
        yield from at(zone.extent.onset[1], "gradients die", "severe")
    for broken in result.nonfinite:
        yield from at(broken.step, "gradients are not finite", "critical")
    left = result.loss.divergence if result.loss is not None else None
    for spike in spikes(result):
        yield from at(spike.step, f"spike, {spike.ratio:.3g} times", "mild")
    if left is not None:
        yield from at(left.onset[1], "the loss leaves its level", "severe")


def _drawn_curves(curves: Sequence[dict[str, Any]], events: Sequence[dict[str, Any]]) -> Chart:
    import altair as alt

    steps = [row["step"] for row in curves]
    scale = alt.Scale(domain=[min(steps), max(steps)], nice=False)
    rows = []
    names = list(dict.fromkeys(row["what"] for row in curves))
    for name in names:
        # One axis of steps, below the last.
        below = alt.Axis() if name == names[-1] else alt.Axis(labels=False, title=None)
        values = [row for row in curves if row["what"] == name]
        wide = _is_wide([row["value"] for row in values])
        line = (
            alt.Chart(inline(values))
            .mark_line(color="@@line1", strokeWidth=1.5)
            .encode(
                x=alt.X("step:Q", scale=scale, title="step", axis=below),
                y=alt.Y("value:Q", title=name, axis=alt.Axis(format=".4~g", tickCount=4),
                        scale=alt.Scale(type="log") if wide else alt.Scale(zero=False)),
                tooltip=[alt.Tooltip("step:Q"), alt.Tooltip("value:Q", format=".5g", title=name)],
            )
        )  # fmt: skip
        marks = (
            alt.Chart(inline(list(events)))
            .mark_rule(strokeWidth=2)
            .encode(
                x=alt.X("step:Q", scale=scale),
                color=alt.Color("colour:N", scale=None),
                tooltip=[alt.Tooltip("what:N", title="begins"), alt.Tooltip("step:Q")],
            )
        )
        rows.append(alt.layer(*([marks] if events else []), line).properties(width=820, height=110))
    return Chart(
        "The run",
        "One axis of steps for all. Vertical lines are where findings begin; point at one to read "
        "which.",
        alt.vconcat(*rows, spacing=10).to_dict(),
    )


def _is_wide(values: Sequence[float]) -> bool:
    """Whether positive values cover so much that only logarithms show them all."""
    return min(values) > 0 and max(values) > 50 * min(values)


# --- table ----------------------------------------------------------------------------------------


def _layers(result: FlowResult) -> Grid:
    nodes = {n.layer_name: n.node_type for n in result.network.nodes}
    return Grid(
        "Layers",
        "Medians over the last window of records. Decades count from the loss side: 3 is a "
        "thousandth of the gradient there.",
        (
            Column("layer", number=False), Column("node", number=False),
            Column("parameters", form=","), Column("RMS"), Column("decades lost"),
            Column("update ratio"), Column("zeros", form="%"), Column("consistency"),
            Column("stability"), Column("direction", number=False),
        ),
        [
            Row([
                layer.layer_name, nodes.get(layer.layer_name), layer.numel, layer.rms,
                layer.deficit, layer.update_ratio, layer.zero_fraction, layer.flow_consistency,
                layer.stability_score, layer.flow_direction,
            ])
            for layer in result.layers
        ],
    )  # fmt: skip
