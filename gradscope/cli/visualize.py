"""``gradscope visualize``."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from typing import Annotated

import typer

from gradscope.cli import options as o
from gradscope.cli.explain import Arch, Key, Labels, Preprocess, TrustOption


def visualize(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="As for explain.", show_default=False)
    ],
    target: Annotated[
        str | None, typer.Option(metavar="CLASS", help="A class: its index or its label.")
    ] = None,
    layer: Annotated[
        str | None, typer.Option(metavar="NAME", help="A layer (gradscope layers), with --channel.")
    ] = None,
    channel: Annotated[
        int | None, typer.Option(min=0, metavar="K", help="The layer's channel.")
    ] = None,
    output: Annotated[
        str, typer.Option("--output", "-o", metavar="DIR", help="Where the picture goes.")
    ] = "explanations",
    arch: Arch = None,
    preprocess: Preprocess = None,
    labels: Labels = None,
    key: Key = None,
    trust: TrustOption = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps of ascent.")] = 256,
    seed: Annotated[int, typer.Option(help="Seed of the start and of the views.")] = 0,
    format_: o.Format = "table",
    report: o.Reports = None,
    device: o.Device = "cpu",
    jobs: o.Jobs = None,
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
    color: o.ColorOption = o.Color.AUTO,
    no_progress: o.NoProgress = False,
    debug: o.Debug = False,
) -> int:
    """Synthesise the image that most activates a class, or a channel of a layer."""
    o.check_request(format_, (), ())
    reports = o.parse_reports(report)
    from gradscope.cli.terminal import progress_bar, say

    o.use_threads(jobs)
    bar = progress_bar("synthesising", wanted=not (no_progress or quiet), of="share")
    with redirect_stdout(sys.stderr), bar as tick:
        from gradscope.attribution.visualize import visualize as synthesised

        result = synthesised(
            model,
            target,
            layer=layer,
            channel=channel,
            arch=arch,
            key=key,
            trust=[t.value for t in trust or ()],
            preprocess=preprocess,
            labels=labels,
            output=output,
            steps=steps,
            seed=seed,
            device=device,
            progress=tick,
        )
    if "table" in (format_, *(name for name, _ in reports)):
        from gradscope.attribution import table as _table  # noqa: F401  registers what it shows

    o.publish(result, format_, reports, color.value, detail=2 if verbose else 0 if quiet else 1)
    if result.result is not None and not quiet:
        say(f"wrote {result.result.image} and the objective at each step beside it")
    return result.gate.exit_code
