"""``gradscope visualize``."""

from __future__ import annotations

from typing import Annotated

import typer

from gradscope.cli.command import Reported, analysis
from gradscope.cli.options import Device, Folder, Labels, Model, Output
from gradscope.text import plural


@analysis
def visualize(
    model: Model,
    *,
    target: Annotated[
        str | None, typer.Option(metavar="CLASS", help="A class: its index or its label.")
    ] = None,
    layer: Annotated[
        str | None, typer.Option(metavar="NAME", help="A layer (gradscope layers), with --channel.")
    ] = None,
    channel: Annotated[
        int | None, typer.Option(min=0, metavar="K", help="The layer's channel.")
    ] = None,
    folder: Folder = "explanations",
    labels: Labels = None,
    size: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="The picture's longer side; by default 512, or the model's own where it sees "
            "fewer than 64.",
        ),
    ] = None,
    prior: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="What the picture is made of: fourier (a spectrum scaled by 1/f) or maco (only "
            "the phases of a natural picture's spectrum).",
        ),
    ] = "fourier",
    starts: Annotated[
        int,
        typer.Option(min=1, metavar="N", help="Pictures from so many starts, the best first."),
    ] = 1,
    diversity: Annotated[
        float,
        typer.Option(
            min=0,
            metavar="SHARE",
            help="Share of the score that pictures of several starts lose which are alike.",
        ),
    ] = 0.0,
    steps: Annotated[int, typer.Option(min=1, metavar="N", help="Steps of ascent.")] = 256,
    seed: Annotated[
        int, typer.Option(metavar="N", help="Seed of the first start and of its views.")
    ] = 0,
    device: Device = "cpu",
    jobs: Annotated[
        int | None,
        typer.Option(
            "--jobs",
            "-j",
            min=1,
            metavar="N",
            help="Threads; by default one per core. Another number rounds otherwise, which ascent "
            "makes another picture of.",
        ),
    ] = None,
    output: Output,
) -> Reported:
    """Synthesise the image that most activates a class, or a channel of a layer."""
    from gradscope.cli.terminal import progress_bar, say, use_threads, without_prints

    use_threads(jobs)
    bar = progress_bar("synthesising", wanted=output.progress, of="share")
    with without_prints(), bar as tick:
        from gradscope.attribution.synthesis.visualize import visualize as synthesised

        report = synthesised(
            model.model,
            target,
            layer=layer,
            channel=channel,
            labels=labels,
            output=folder,
            size=size,
            prior=prior,
            starts=starts,
            diversity=diversity,
            steps=steps,
            seed=seed,
            device=device,
            progress=tick,
            **model.loading,
        )
    if output.detail and report.result is not None:
        others = len(report.result.others)
        more = f", {plural(others, 'other picture')}" if others else ""
        say(f"wrote {report.result.image}{more} and the objective at each step beside it")
    return report
