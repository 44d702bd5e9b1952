"""``gradscope drift``."""

from __future__ import annotations

import gc
from typing import Annotated

import typer

from gradscope.cli.command import Reported, analysis
from gradscope.cli.options import Gate, Jobs, Output, Tensors
from gradscope.formats import CHECKPOINT, supported


@analysis
def drift(
    base: Annotated[
        str,
        typer.Argument(
            metavar="BASE",
            help=f"What it was: {supported(*CHECKPOINT)}, or a folder of them.",
            show_default=False,
        ),
    ],
    new: Annotated[str, typer.Argument(metavar="NEW", help="What it became.", show_default=False)],
    *,
    tensors: Tensors,
    jobs: Jobs = None,
    output: Output,
    gate: Gate,
) -> Reported:
    """What changed between two checkpoints, how much, and why."""
    from gradscope.cli.terminal import load_compiler, progress_bar

    if not tensors.headers_only:
        load_compiler()
    from gradscope.drift.analysis import analyze_drift

    gc.disable()  # a report of a million tensors is ten million objects, none of them garbage
    with progress_bar("comparing", wanted=output.progress) as tick:
        return analyze_drift(base, new, jobs=jobs, progress=tick, **tensors.wanted, **gate.wanted)
