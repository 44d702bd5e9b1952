"""What a page shows of ``explain`` and ``visualize``: the maps, and what they are worth."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePath
from typing import Any

from gradscope.attribution.result import (
    ExplainResult,
    Explanation,
    Prediction,
    Target,
    VisualizeResult,
)
from gradscope.report.panels import Chart, Column, Gallery, Grid, Panel, Picture, Row, inline

#: What is drawn on the left, and on the right.
_SIDES = ["insertion", "deletion"]


def explain(result: ExplainResult) -> Iterator[Panel]:
    """Each picture with its maps side by side, how far they can be trusted, and predictions."""
    by_image: dict[str, list[Explanation]] = defaultdict(list)
    for explanation in result.explanations:
        by_image[explanation.image].append(explanation)
    for image, those in by_image.items():
        if any(e.files.overlay for e in those):
            yield _gallery(image, those)
    if any(e.diagnostics.insertion_auc is not None for e in result.explanations):
        yield _faithfulness(result.explanations)
    for image, those in by_image.items():
        if rows := [row for e in those for row in _curves(e)]:
            yield _probabilities(image, rows)
    if result.explanations:
        yield _maps(result.explanations)
    for image_ in result.images:
        if image_.predictions:
            title = f"What the model sees in {PurePath(image_.path).name}"
            yield _predictions(title, image_.predictions)


def _gallery(image: str, explanations: Sequence[Explanation]) -> Gallery:
    return Gallery(
        PurePath(image).name,
        f"The slider lays the maps over the picture {image}.",
        [
            Picture(
                f"{e.method} → {_said(e.target)}",
                f"layer {e.layer}" if e.layer else "",
                e.image,
                e.files.overlay,
            )
            for e in explanations
            if e.files.overlay
        ],
    )


def _said(target: Target) -> str:
    named = f"{target.index} {target.label or ''}".rstrip()
    return f"{named}, less {target.versus_label or target.versus}" if target.versus else named


def _faithfulness(explanations: Sequence[Explanation]) -> Chart:
    """Insertion and deletion against the same curves for the map at random positions."""
    import altair as alt

    rows = [row for e in explanations for row in _areas(e)]
    base = alt.Chart(inline(rows)).encode(
        y=alt.Y("map:N", title=None, sort=None, axis=alt.Axis(labelLimit=300)),
        tooltip=[alt.Tooltip("map:N"), alt.Tooltip("area:Q", format=".3f"),
                 alt.Tooltip("control:Q", format=".3f"),
                 alt.Tooltip("spread:Q", format=".3f", title="control's spread")],
    )  # fmt: skip
    bar = base.mark_bar(color="@@line1", height=9).encode(x=alt.X("area:Q", title="area"))
    control = base.mark_tick(color="@@line2", thickness=3, size=17).encode(x=alt.X("control:Q"))
    band = base.mark_rule(color="@@line2", strokeWidth=1.5).encode(
        x=alt.X("low:Q"), x2=alt.X2("high:Q")
    )
    chart = (
        alt.layer(bar, band, control)
        .properties(width=340, height={"step": 24})
        .facet(facet=alt.Facet("what:N", title=None, sort=_SIDES), columns=2)
    )
    return Chart(
        "Is the map faithful?",
        "Bars are the map's area under the probability as its pixels are inserted (longer is "
        "better) or deleted (shorter is better); the tick is a map of the same values at random "
        "places. A bar that does not pass its tick explains nothing.",
        chart.to_dict(),
    )


def _areas(e: Explanation) -> Iterator[Mapping[str, Any]]:
    d = e.diagnostics
    control = d.random_control
    sides = (
        ("insertion", d.insertion_auc, *((control.insertion_auc, control.insertion_spread)
                                         if control else (None, None))),
        ("deletion", d.deletion_auc, *((control.deletion_auc, control.deletion_spread)
                                       if control else (None, None))),
    )  # fmt: skip
    for what, area, usual, spread in sides:
        if area is not None:
            yield {
                "what": what, "map": f"{PurePath(e.image).name}: {e.method}", "area": area,
                "control": usual, "spread": spread,
                "low": None if usual is None or spread is None else usual - spread,
                "high": None if usual is None or spread is None else usual + spread,
            }  # fmt: skip


def _probabilities(image: str, rows: Sequence[Mapping[str, Any]]) -> Chart:
    import altair as alt

    base = alt.Chart(inline(rows)).encode(
        x=alt.X("share:Q", title="pixels", axis=alt.Axis(format="%")),
        y=alt.Y("probability:Q", scale=alt.Scale(domainMin=0)),
        color=alt.Color("map:N", sort=None, scale=alt.Scale(
            range=["@@line1", "@@line2", "@@line3", "@@line4"])),
        tooltip=[alt.Tooltip("map:N"), alt.Tooltip("order:N"),
                 alt.Tooltip("share:Q", format=".0%"),
                 alt.Tooltip("probability:Q", format=".3f")],
    )  # fmt: skip
    lines = base.mark_line(strokeWidth=1.8).encode(
        strokeDash=alt.StrokeDash(
            "order:N", title="pixels in the order of", sort=None,
            legend=alt.Legend(symbolType="stroke", symbolStrokeColor="@@dim", symbolSize=300),
            scale=alt.Scale(range=[[1, 0], [4, 4]]),
        )
    )  # fmt: skip
    chart = (
        alt.layer(lines, base.mark_circle(size=28, opacity=1))
        .properties(width=340, height=190)
        .facet(facet=alt.Facet("what:N", title=None, sort=_SIDES), columns=2)
    )
    return Chart(
        f"Insertion and deletion: {PurePath(image).name}",
        "The target's probability as pixels come into a blurred picture, or leave the picture, the "
        "map's strongest first. A map that found what the model uses rises and falls before its "
        "dashed line, which is the same map at random places.",
        chart.to_dict(),
    )


def _curves(e: Explanation) -> Iterator[Mapping[str, Any]]:
    for order, known in (
        ("the map", e.diagnostics),
        ("the map elsewhere", e.diagnostics.random_control),
    ):
        for what in _SIDES:
            curve = getattr(known, f"{what}_curve", None) or ()
            for place, probability in enumerate(curve):
                yield {
                    "what": what, "order": order, "map": f"{e.method} → {_said(e.target)}",
                    "share": place / (len(curve) - 1), "probability": probability,
                }  # fmt: skip


def _maps(explanations: Sequence[Explanation]) -> Grid:
    return Grid(
        "Maps",
        "Click a name for options and the method's own diagnostics.",
        (
            Column("map", number=False), Column("target", number=False), Column("score"),
            Column("probability"), Column("layer", number=False), Column("concentration"),
            Column("completeness", form="g"), Column("insertion"), Column("deletion"),
        ),
        [
            Row(
                [
                    f"{e.image}: {e.method}", _said(e.target), e.target.score,
                    e.target.probability, e.layer, e.map.concentration,
                    e.diagnostics.relative_delta, e.diagnostics.insertion_auc,
                    e.diagnostics.deletion_auc,
                ],
                [(name, _short(value))
                 for name, value in {**e.options, **e.diagnostics.method}.items()],
            )
            for e in explanations
        ],
    )  # fmt: skip


def _short(value: Any) -> Any:
    return value if isinstance(value, int | float | None) else str(value)[:200]


def _predictions(title: str, predictions: Sequence[Prediction]) -> Grid:
    return Grid(
        title,
        "The likeliest classes.",
        (Column("class", number=False), Column("score"), Column("probability")),
        [Row([f"{p.index} {p.label or ''}".rstrip(), p.score, p.probability]) for p in predictions],
    )


def visualize(result: VisualizeResult) -> Iterator[Panel]:
    """The image, and how its objective rose."""
    import altair as alt

    what = result.label or f"class {result.target}" if result.target is not None else (
        f"{result.layer}, channel {result.channel}")  # fmt: skip
    drawn = [
        Picture(what, f"seed {one.start}, objective {one.objective[-1]:.3g}", one.image, None)
        for one in (result, *result.others)
        if one.image is not None
    ]
    if drawn:
        yield Gallery(what, f"{result.steps} steps, prior {result.prior}.", drawn)
    rows = [{"step": i, "objective": v} for i, v in enumerate(result.objective)]
    chart = (
        alt.Chart(inline(rows))
        .mark_line(color="@@line1")
        .encode(x=alt.X("step:Q"), y=alt.Y("objective:Q", scale=alt.Scale(zero=False)))
        .properties(width=640, height=160)
    )
    yield Chart("Objective", "Under the random view of each step.", chart.to_dict())
    yield _predictions("What the model sees in it", result.predictions)
