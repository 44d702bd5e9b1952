"""What ``gradscope explain`` shows of its result in a table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.text import Text

from gradscope.attribution.diagnostics import Diagnostics
from gradscope.attribution.drawing.preview import preview
from gradscope.attribution.result import (
    ExplainResult,
    Explanation,
    ImageFacts,
    ModelFacts,
    Prediction,
    Summary,
    VisualizeResult,
)
from gradscope.report.formats import Display
from gradscope.report.formats.cells import facts, number, sparkline, table
from gradscope.text import escaped, plural, shortened

#: How many pictures are previewed, and their greatest width.
_PREVIEWS = 2
_WIDEST = 56
#: A share of the score beyond which little is left for the pixels.
_MOSTLY = 0.5


def explain(result: ExplainResult, display: Display) -> Iterator[RenderableType]:
    """Notes, the model, its predictions for each picture, the maps, a preview of the first."""
    for note in result.notes:
        yield Text.assemble(("note ", "dim"), escaped(note))
    yield Text("")
    yield _model(result)
    for image in result.images:
        yield from _image(image, [e for e in result.explanations if e.image == image.path], result)
    yield from _summary(result)
    yield from _previews(result.explanations, display)


def _summary(result: ExplainResult) -> Iterator[RenderableType]:
    """Method by metric over the pictures: mean ± half of its confidence interval, and the control.

    Metrics are rows: there are more of them than methods that fit beside each other.
    """
    if not result.summary:
        return
    methods = dict.fromkeys(s.method for s in result.summary)
    known = {(s.metric, s.method): s for s in result.summary}
    most = max(s.pictures for s in result.summary)
    yield Text.assemble(
        (f"\nover {plural(most, 'picture')}", "bold"),
        "  mean ± half of its 95 % interval (at random positions)",
    )
    made = table(("metric", "left"), ("better", "left"), *methods)
    for metric in dict.fromkeys(s.metric for s in result.summary):
        cells = [known.get((metric, method)) for method in methods]
        better = next(s.better for s in cells if s is not None)
        made.add_row(metric, better, *("–" if s is None else _interval(s) for s in cells))
    yield Padding(made, (0, 0, 0, 2))


def _interval(s: Summary) -> str:
    half = "" if s.high is None else f" ± {s.high - s.mean:.2f}"
    control = "" if s.control is None else f" ({s.control:.2f})"
    return f"{s.mean:.2f}{half}{control}"


def visualize(result: VisualizeResult, display: Display) -> Iterator[RenderableType]:
    """What was maximised, its course, the model's predictions for the picture, a preview."""
    for note in result.notes:
        yield Text.assemble(("note ", "dim"), escaped(note))
    what = f"{result.layer} channel {result.channel}"
    if result.target is not None:
        what = f"class {result.target} {shortened(result.label or '')}".rstrip()
    course = result.objective[:: max(1, len(result.objective) // 40)]
    lowest = min(course)
    yield Text("")
    yield facts(
        {
            "maximised": what,
            "objective": f"{number(result.objective[0])} → {number(result.objective[-1])}",
            "": sparkline([value - lowest for value in course], display.unicode),
        }
    )
    yield Padding(Text(_predictions(result.predictions), style="dim"), (0, 0, 0, 2))
    if result.others:
        yield Padding(_starts(result), (0, 0, 0, 2))
    if result.image is not None:
        yield from _preview(result.image, display)


def _starts(result: VisualizeResult) -> RenderableType:
    """The pictures from every start, the best first."""
    made = table(("seed", "right"), ("objective", "right"), ("picture", "left"))
    for one in (result, *result.others):
        made.add_row(str(one.start), number(one.objective[-1]), shortened(one.image or "–"))
    if result.similarity is None:
        return made
    return Group(made, Text(f"alike: {result.similarity:.2f}, the mean cosine of Gram matrices"))


def _model(result: ExplainResult) -> Text:
    model, steps = result.model, result.preprocessing
    shown = {
        "model": f"{model.format}, {model.parameters:,} parameters, {_answers(model)}",
        "input": ", ".join(steps.steps),
        "from": steps.source if steps.assumed else shortened(steps.source),
    }
    return facts(shown)


def _answers(model: ModelFacts) -> str:
    if model.head == "embedding":
        return f"an embedding of {model.classes:,} numbers"
    if model.head == "value":
        return plural(model.classes, "value")
    return f"{model.classes:,} classes"


def _image(
    image: ImageFacts, explanations: Sequence[Explanation], result: ExplainResult
) -> Iterator[RenderableType]:
    yield Text.assemble(
        ("\n" + shortened(image.path), "bold"), f"  {image.width}×{image.height} {image.mode}"
    )
    if image.predictions:
        yield Padding(Text(_predictions(image.predictions), style="dim"), (0, 0, 0, 2))
    if not explanations:
        return
    yield Padding(_maps(explanations, result.evaluated), (0, 0, 0, 2))
    for e in explanations:
        share = e.diagnostics.method.get("relevance_of_constants")
        if share is not None:
            said = f"{e.method}: biases and constants hold {share:.0%} of the score"
            if share > _MOSTLY and "biases" in e.options:
                said += "; -O biases=false hands it on to the pixels"
            yield Padding(Text(said, style="dim"), (0, 0, 0, 2))
    reasons = {e.layer: e.layer_reason for e in explanations if e.layer_reason}
    for layer, reason in reasons.items():
        yield Padding(Text(f"{layer}: {reason}", style="dim"), (0, 0, 0, 2))


def _predictions(predictions: Sequence[Prediction]) -> str:
    return " · ".join(map(_prediction, predictions))


def _prediction(p: Prediction) -> str:
    strength = f"score {number(p.score)}" if p.probability is None else f"{p.probability:.3f}"
    return " ".join(
        str(part) for part in (p.index, shortened(p.label or ""), strength) if part != ""
    )


def _maps(explanations: Sequence[Explanation], evaluated: bool) -> RenderableType:
    measured = ("insertion", "deletion", "randomised", "sensitivity") if evaluated else ()
    columns = ("min", "max", "top tenth", "complete", *measured)
    made = table(("method", "left"), ("target", "left"), ("layer", "left"), *columns)
    for e in explanations:
        made.add_row(
            e.method,
            shortened(_target(e)),
            shortened(e.layer or "–"),
            number(e.map.min),
            number(e.map.max),
            _share(e.map.concentration),
            _completeness(e.diagnostics),
            *(_evaluated(e.diagnostics) if evaluated else ()),
        )
    return made


def _target(e: Explanation) -> str:
    named = e.target.what
    if e.target.versus is None:
        return named
    return f"{named} − {e.target.versus} {e.target.versus_label or ''}".rstrip()


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.0%}"


def _completeness(known: Diagnostics) -> str:
    if known.completeness_delta is None:
        return "–"
    share = known.relative_delta
    return f"±{abs(known.completeness_delta):.2g}" if share is None else f"within {share:.2%}"


def _evaluated(known: Diagnostics) -> Iterator[str]:
    control = known.random_control
    for own, other in (
        (known.insertion_auc, control and control.insertion_auc),
        (known.deletion_auc, control and control.deletion_auc),
    ):
        yield "–" if own is None else f"{own:.2f} (random {other:.2f})"
    last = known.similarity
    yield "–" if last is None else f"{last:.2f}"
    yield number(known.sensitivity)


def _previews(explanations: Sequence[Explanation], display: Display) -> Iterator[RenderableType]:
    """The first overlays."""
    for e in explanations[:_PREVIEWS]:
        if e.files.overlay is not None:
            yield from _preview(e.files.overlay, display)


def _preview(path: str, display: Display) -> Iterator[RenderableType]:
    """A picture's file, on a terminal that is wide enough."""
    if display.width is None or not display.colour or display.width < 40:
        return
    if Path(path).is_file():
        with Image.open(path) as image:
            drawn = np.asarray(image.convert("RGB"))
        yield Text(f"\n{shortened(path)}", style="dim")
        columns = min(_WIDEST, display.width - 2)
        yield preview(drawn, columns, colour=display.colour, unicode=display.unicode)
