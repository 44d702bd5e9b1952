"""``gradscope merge``."""

from __future__ import annotations

from typing import Annotated

import typer

from gradscope.cli.command import Reported, analysis
from gradscope.cli.options import Gate, Output


@analysis
def merge(
    parts: Annotated[
        list[str],
        typer.Argument(
            metavar="PART.json",
            help="The JSON reports of all parts of a run, from --shard 0/n on, in any order.",
            show_default=False,
        ),
    ],
    *,
    output: Output,  # noqa: ARG001
    gate: Gate,
) -> Reported:
    """Join the partial reports of --shard i/n into the report of one run, and judge it."""
    from gradscope.merging import merge as joined

    return joined(*parts, **gate.wanted)
