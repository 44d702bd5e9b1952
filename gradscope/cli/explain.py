"""``gradscope explain``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from gradscope.cli import completion
from gradscope.cli.command import Reported, analysis
from gradscope.cli.options import (
    Device,
    Folder,
    Gate,
    Jobs,
    Labels,
    Model,
    Output,
    seconds,
    split_commas,
)
from gradscope.errors import UsageError


@dataclass(frozen=True)
class Methods:
    """Which maps are made, and with which options."""

    method: Annotated[
        list[str] | None,
        typer.Option(
            "--method",
            "-m",
            metavar="M[,M...]",
            help="See `gradscope methods`. [default: gradcam]",
            autocompletion=completion.methods,
        ),
    ] = None
    reference: Annotated[
        str | None,
        typer.Option(
            metavar="black|white|mean|blurred|random|FILE",
            help="What the image is compared with: integrated-gradients, deeplift, …",
        ),
    ] = None
    steps: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Points on the path of integrated gradients."),
    ] = None
    tolerance: Annotated[
        float | None,
        typer.Option(
            metavar="X", help="Refine integrated gradients until they add up this well, e.g. 0.01."
        ),
    ] = None
    option: Annotated[
        list[str] | None,
        typer.Option(
            "--option",
            "-O",
            metavar="NAME=VALUE",
            help="Any other option of a method (repeatable).",
        ),
    ] = None

    @property
    def names(self) -> list[str]:
        """The methods that are asked for."""
        return split_commas(self.method) or ["gradcam"]

    @property
    def options(self) -> dict[str, Any]:
        """Their options. Raises UsageError before anything heavy is imported."""
        named = {"reference": self.reference, "steps": self.steps, "tolerance": self.tolerance}
        given = _options(self.option, named)
        _check(self.names, given)
        return given


@dataclass(frozen=True)
class Target:
    """What is explained of a model's answer, and where it is looked at."""

    target: Annotated[
        str,
        typer.Option(
            metavar="TARGET",
            help="An index, a label, top1 or topK; pixel:Y,X, mask:CLASS, box:N, similar:IMAGE, "
            "channel:K or text:FILE.",
        ),
    ] = "top1"
    versus: Annotated[
        str | None,
        typer.Option(metavar="CLASS", help="Explain the target rather than this class."),
    ] = None
    output_name: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|INDEX", help="Which of several outputs of the model is its answer."
        ),
    ] = None
    layer: Annotated[
        str,
        typer.Option(metavar="NAME", help="The layer that CAM methods read (gradscope layers)."),
    ] = "auto"
    labels: Labels = None

    @property
    def wanted(self) -> dict[str, Any]:
        """As the Python API takes it. Raises UsageError before anything heavy is imported."""
        from gradscope.attribution.targets.aim import parse_aim

        parse_aim(self.target)
        return vars(self)


@dataclass(frozen=True)
class Evaluation:
    """Whether maps are measured, against what and for how long."""

    evaluate: Annotated[
        bool,
        typer.Option("--evaluate", help="Measure what the maps are worth (takes much longer)."),
    ] = False
    boxes: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Where the objects are: COCO or Pascal VOC annotations, a mask, a folder of them.",
        ),
    ] = None
    budget: Annotated[
        str | None,
        typer.Option(metavar="TIME", help="Leave out evaluation after so long: 60s, 5m."),
    ] = None

    @property
    def wanted(self) -> dict[str, Any]:
        """As the functions of the Python API take it. Raises UsageError."""
        limit = None if self.budget is None else seconds("--budget", self.budget)
        return {"evaluated": self.evaluate, "boxes": self.boxes, "budget": limit}


@analysis
def explain(
    model: Model,
    images: Annotated[
        list[str],
        typer.Argument(metavar="IMAGE", help="Pictures and folders of them.", show_default=False),
    ],
    *,
    methods: Methods,
    aim: Target,
    evaluation: Evaluation,
    folder: Folder = "explanations",
    colormap: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="inferno, viridis, jet; coolwarm for signed maps."),
    ] = None,
    figure: Annotated[
        str | None,
        typer.Option(
            metavar="png|svg|pdf", help="Each map also as a figure for a paper (Matplotlib)."
        ),
    ] = None,
    chunk: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Inputs at a time; by default by memory.")
    ] = None,
    exact: Annotated[
        bool,
        typer.Option(
            "--exact", help="Ask the model itself, never a faster private copy (within 1e-5)."
        ),
    ] = False,
    device: Device = "cpu",
    jobs: Jobs = None,
    seed: Annotated[
        int, typer.Option(metavar="N", help="Seed of noise, masks and random references.")
    ] = 0,
    output: Output,
    gate: Gate,
) -> Reported:
    """Why a vision model answers as it does: heatmaps, and whether to believe them."""
    wanted = {**aim.wanted, **methods.options, **evaluation.wanted}
    from gradscope.cli.terminal import progress_bar, say, use_threads, without_prints

    use_threads(jobs)
    bar = progress_bar("explaining", wanted=output.progress, of="share")
    with without_prints(), bar as tick:
        from gradscope.attribution.explain import explain as analyse

        report = analyse(
            model.model,
            images,
            methods.names,
            output=folder,
            colormap=colormap,
            figure=figure,
            device=device,
            seed=seed,
            chunk=chunk,
            exact=exact,
            progress=tick,
            **wanted,
            **model.loading,
            **gate.wanted,
        )
    if output.detail and report.result is not None:
        each = 3 if figure is None else 4
        say(f"wrote {each * len(report.result.explanations)} files to {folder}")
    return report


def _options(pairs: Sequence[str] | None, named: dict[str, Any]) -> dict[str, Any]:
    """Options of methods, values read as JSON where they are."""
    given = {name: value for name, value in named.items() if value is not None}
    for pair in pairs or ():
        name, equals, value = pair.partition("=")
        if not equals:
            raise UsageError(f"--option takes NAME=VALUE, not {pair!r}")
        try:
            given[name.strip().replace("-", "_")] = json.loads(value)
        except ValueError:
            given[name.strip().replace("-", "_")] = value
    return given


def _check(names: Sequence[str], given: dict[str, Any]) -> None:
    """Refuse an unknown method or option before anything heavy is imported."""
    from gradscope.attribution.method import completed
    from gradscope.attribution.methods import method_named

    found = [method_named(name) for name in names]
    for option in given:
        if not any(option in method.options for method in found):
            completed(found[0], {option: given[option]})
