"""``gradscope drift``."""

from __future__ import annotations

import gc
from enum import StrEnum
from typing import Annotated

import typer

from gradscope.cli.command import Reported, analysis
from gradscope.cli.options import Engine, EngineName, Gate, Jobs, KeepGoing, Output, Shard, Tensors
from gradscope.formats import CHECKPOINT, supported


class Expect(StrEnum):
    """What the new checkpoint should be."""

    IDENTICAL = "identical"
    MERGE = "merge"
    QUANTISED = "quantised"
    CONVERTED = "converted"


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
    new: Annotated[
        list[str],
        typer.Argument(
            metavar="NEW...",
            help="What it became; of several, ordered by the steps in their names, the way there.",
            show_default=False,
        ),
    ],
    *,
    parent: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE",
            help="What NEW may be mixed from, beside BASE: its share is fitted (repeatable).",
        ),
    ] = None,
    expect: Annotated[
        Expect | None, typer.Option(help="What the new one should be as a whole.")
    ] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            metavar="DIR",
            help="The adapter that was merged (--expect merge); repeated, several in turn.",
        ),
    ] = None,
    expect_frozen: Annotated[
        list[str] | None,
        typer.Option(metavar="GLOB", help="Tensors that may not differ by a bit (repeatable)."),
    ] = None,
    expect_changed: Annotated[
        list[str] | None,
        typer.Option(metavar="GLOB", help="Tensors that must have changed (repeatable)."),
    ] = None,
    max_drift: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ROLE=X",
            help="How far tensors of a role may move, as a share of their norm; * is every role.",
        ),
    ] = None,
    tensors: Tensors,
    shard: Shard = None,
    keep_going: KeepGoing = False,
    engine: Engine = EngineName.LOCAL,
    jobs: Jobs = None,
    output: Output,
    gate: Gate,
) -> Reported:
    """What changed between two checkpoints, how much, and why."""
    from gradscope.cli.terminal import progress_bar
    from gradscope.weights.shares import share

    if shard is not None:  # refused before anything heavy is imported
        share(shard)
    from gradscope.drift.analysis import analyze_drift
    from gradscope.drift.expectations import parse_limits

    gc.disable()  # a report of a million tensors is ten million objects, none of them garbage
    with progress_bar("comparing", wanted=output.progress) as tick:
        return analyze_drift(
            base,
            new[0],
            *new[1:],
            parents=parent or (),
            expect=expect.value if expect is not None else None,
            adapter=adapter or (),
            expect_frozen=expect_frozen or (),
            expect_changed=expect_changed or (),
            max_drift=parse_limits(max_drift or ()),
            shard=shard,
            keep_going=keep_going,
            engine=engine.value,
            jobs=jobs,
            progress=tick,
            **tensors.wanted,
            **gate.wanted,
        )
