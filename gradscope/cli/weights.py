"""``gradscope weights``."""

from __future__ import annotations

import gc
from typing import Annotated

import typer

from gradscope.cli import completion
from gradscope.cli.command import Reported, analysis
from gradscope.cli.options import (
    Device,
    Engine,
    EngineName,
    Gate,
    Jobs,
    KeepGoing,
    Output,
    Shard,
    Tensors,
    split_commas,
)
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
    tensors: Tensors,
    shard: Shard = None,
    keep_going: KeepGoing = False,
    cast: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TYPE",
            help="What casting to fp16, bf16, fp8_e4m3, fp8_e5m2, int8, nvfp4, mxfp4 would lose "
            "(repeatable, commas; fp8_e4m3:row sets the scales).",
            autocompletion=completion.types,
        ),
    ] = None,
    snr: Annotated[
        str | None,
        typer.Option(
            metavar="DECIBELS",
            help="Plan the smallest type of each tensor that keeps so much signal to noise: 30dB.",
        ),
    ] = None,
    spectral: Annotated[
        bool,
        typer.Option(
            "--spectral",
            help="The singular values of every matrix: norms, ranks, tails, how random they look.",
        ),
    ] = False,
    norms_only: Annotated[
        bool,
        typer.Option(
            "--norms-only",
            help="Of the singular values only the greatest: norms and stable ranks, much faster.",
        ),
    ] = False,
    bootstrap: Annotated[
        int,
        typer.Option(
            min=0, metavar="N", help="Test each fitted tail by N drawn sets (100: p to 0.05)."
        ),
    ] = 0,
    budget: Annotated[
        str | None,
        typer.Option(metavar="TIME", help="Begin no further spectrum after so long: 60s, 5m."),
    ] = None,
    device: Device = "cpu",
    engine: Engine = EngineName.LOCAL,
    jobs: Jobs = None,
    output: Output,
    gate: Gate,
) -> Reported:
    """Statistics, outliers, dead units, numerics and health of checkpoints of any size."""
    from gradscope.cli.terminal import progress_bar
    from gradscope.weights.casting import wanted_casts
    from gradscope.weights.shares import share

    wanted_casts(split_commas(cast), snr)  # refused before anything heavy is imported
    if shard is not None:
        share(shard)
    from gradscope.weights.analysis import analyze_weights

    gc.disable()  # a report of a million tensors is ten million objects, none of them garbage
    with progress_bar("reading", wanted=output.progress) as tick:
        return analyze_weights(
            *checkpoints,
            shard=shard,
            keep_going=keep_going,
            cast=split_commas(cast),
            snr=snr,
            spectral=spectral,
            norms_only=norms_only,
            bootstrap=bootstrap,
            budget=budget,
            device=device,
            engine=engine.value,
            jobs=jobs,
            progress=tick,
            **tensors.wanted,
            **gate.wanted,
        )
