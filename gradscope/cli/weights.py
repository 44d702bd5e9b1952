"""``gradscope weights``."""

from __future__ import annotations

import gc
from typing import Annotated

import typer

from gradscope.cli.command import Reported, analysis
from gradscope.cli.options import Device, Gate, Jobs, Output, split_commas
from gradscope.formats import CHECKPOINT, supported


@analysis
def weights(
    checkpoints: Annotated[
        list[str],
        typer.Argument(
            metavar="CKPT",
            help=f"{supported(*CHECKPOINT)}, or a folder of them; recognised by content.",
            show_default=False,
        ),
    ],
    *,
    include: Annotated[
        list[str] | None,
        typer.Option(metavar="GLOB", help="Only tensors with such names (repeatable)."),
    ] = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option(metavar="GLOB", help="No tensors with such names (repeatable)."),
    ] = None,
    key: Annotated[
        str | None,
        typer.Option(
            metavar="PATH", help="Which nested dict is the state dict, e.g. model.state_dict."
        ),
    ] = None,
    headers_only: Annotated[
        bool,
        typer.Option(
            "--headers-only", help="Read no data: names, shapes and consistency, in milliseconds."
        ),
    ] = False,
    keep_going: Annotated[
        bool,
        typer.Option(
            "--keep-going",
            help="When a file fails while it is read, analyse the rest of its checkpoint.",
        ),
    ] = False,
    cast: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TYPE",
            help="What casting to fp16, bf16, fp8_e4m3, fp8_e5m2, int8, nvfp4, mxfp4 would lose "
            "(repeatable, commas; fp8_e4m3:row sets the scales).",
        ),
    ] = None,
    snr: Annotated[
        str | None,
        typer.Option(
            metavar="DECIBELS",
            help="Plan the smallest type of each tensor that keeps so much signal to noise: 30dB.",
        ),
    ] = None,
    device: Device = "cpu",
    jobs: Jobs = None,
    output: Output,
    gate: Gate,
) -> Reported:
    """Statistics, outliers, dead units, numerics and health of checkpoints of any size."""
    from gradscope.cli.terminal import load_compiler, progress_bar

    if not headers_only:
        load_compiler()
    from gradscope.weights.analysis import analyze_weights

    gc.disable()  # a report of a million tensors is ten million objects, none of them garbage
    with progress_bar("reading", wanted=output.progress) as tick:
        return analyze_weights(
            *checkpoints,
            key=key,
            include=include or (),
            exclude=exclude or (),
            headers_only=headers_only,
            keep_going=keep_going,
            cast=split_commas(cast),
            snr=snr,
            device=device,
            jobs=jobs,
            progress=tick,
            **gate.wanted,
        )
