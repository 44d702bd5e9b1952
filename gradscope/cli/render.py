"""``gradscope render``."""

from __future__ import annotations

from typing import Annotated

import typer

from gradscope.cli.command import checked, command, published, worst
from gradscope.cli.options import Output
from gradscope.cli.terminal import saved

REPORT = typer.Argument(
    metavar="REPORT.json",
    help="What --format json or --report json=FILE wrote; - is stdin.",
    show_default=False,
)


@command
def render(saved_as: Annotated[str, REPORT], *, output: Output) -> int:
    """Show a saved JSON report in any other format, as the run itself would have."""
    files = checked(output, [saved_as])
    return worst(published(saved(saved_as), output, files))
