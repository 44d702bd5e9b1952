"""``gradscope visualize``."""

from __future__ import annotations

from typing import Annotated

import typer

from gradscope.cli.command import Reported, analysis
from gradscope.cli.options import Device, Folder, Jobs, Labels, Model, Output


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
    steps: Annotated[int, typer.Option(min=1, metavar="N", help="Steps of ascent.")] = 256,
    seed: Annotated[int, typer.Option(metavar="N", help="Seed of the start and of the views.")] = 0,
    device: Device = "cpu",
    jobs: Jobs = None,
    output: Output,
) -> Reported:
    """Synthesise the image that most activates a class, or a channel of a layer."""
    from gradscope.cli.terminal import progress_bar, say, use_threads, without_prints

    use_threads(jobs)
    bar = progress_bar("synthesising", wanted=output.progress, of="share")
    with without_prints(), bar as tick:
        from gradscope.attribution.visualize import visualize as synthesised

        report = synthesised(
            model.model,
            target,
            layer=layer,
            channel=channel,
            labels=labels,
            output=folder,
            steps=steps,
            seed=seed,
            device=device,
            progress=tick,
            **model.loading,
        )
    if output.detail and report.result is not None:
        say(f"wrote {report.result.image} and the objective at each step beside it")
    return report
