"""What a page shows of ``flow --against``: how this run differs from the other one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from gradscope.flow.records.against import Against, LayerAgainst
from gradscope.report.panels import Chart, Column, Grid, Panel, Row, inline
from gradscope.text import plural, shortened

#: Layers that are drawn, those that differ most where there are more.
_LAYERS = 60


def against(found: Against) -> Iterator[Panel]:
    """Levels of layers in both runs, then onsets, findings, and what only one of them has."""
    if levels := [layer for layer in found.layers if layer.level is not None]:
        yield _levels(found, levels)
    yield Grid(
        f"Against {shortened(found.input)}",
        f"Of the steps {found.first_step} to {found.last_step}, which both runs have.",
        (Column("what", number=False), Column("here"), Column("there")),
        [Row(list(cells)) for cells in _numbers(found)],
    )


def _levels(found: Against, levels: Sequence[LayerAgainst]) -> Chart:
    import altair as alt

    most = sorted(levels, key=lambda layer: -abs(layer.level or 0.0))[:_LAYERS]
    shown = [layer for layer in levels if layer in most]
    base = alt.Chart(inline([_bar(layer) for layer in shown])).encode(
        y=alt.Y("layer:N", sort=None, title=None, axis=alt.Axis(labelLimit=260)),
        tooltip=[alt.Tooltip("layer:N"), alt.Tooltip("factor:Q", format=".3g", title="times"),
                 alt.Tooltip("spread:Q", format=".2g", title="usual spread, times")],
    )  # fmt: skip
    bars = base.mark_bar(height=9).encode(
        x=alt.X("level:Q", title="decades above (right) or below the other run"),
        color=alt.Color("colour:N", scale=None),
    )
    usual = base.mark_tick(color="@@fg", thickness=1.5, size=11)
    chart = alt.layer(bars, usual.encode(x="low:Q"), usual.encode(x="high:Q")).properties(
        width=640, height={"step": 14}
    )
    differ = sum(layer.differs for layer in levels)
    left = len(levels) - len(shown)
    said = f"{differ} of {plural(len(levels), 'layer')} differ" if differ else "No layer differs"
    return Chart(
        "Gradients against the other run",
        f"Median RMS gradients of the last records beside those of {shortened(found.input, 60)}. "
        f"{said}: coloured bars pass three times the spread of both runs (the ticks) and a "
        "factor of two." + (f" Left out: {plural(left, 'layer')} nearer to zero." if left else ""),
        chart.to_dict(),
    )


def _bar(layer: LayerAgainst) -> Mapping[str, Any]:
    level, usual = layer.level or 0.0, 3 * (layer.spread or 0.0)
    return {
        "layer": layer.layer_name, "level": level, "factor": 10**level, "low": -usual,
        "high": usual, "spread": None if layer.spread is None else 10**layer.spread,
        "colour": "@@info" if not layer.differs else "@@line2" if level > 0 else "@@line1",
    }  # fmt: skip


def _numbers(found: Against) -> Iterator[tuple[Any, ...]]:
    yield "loss", found.loss.here, found.loss.there
    yield "efficiency", found.efficiency.here, found.efficiency.there
    for onset in found.onsets:
        yield (
            f"{onset.kind} since",
            *(
                "never" if between is None else f"step {between[1]}"
                for between in (onset.here, onset.there)
            ),
        )
    for change in found.findings:
        yield (
            f"{change.rule} {change.name}: {shortened(change.subject)}",
            change.here or "none",
            change.there or "none",
        )
    for name in found.only_here:
        yield f"layer {shortened(name)}", "recorded", "not there"
    for name in found.only_there:
        yield f"layer {shortened(name)}", "not there", "recorded"
