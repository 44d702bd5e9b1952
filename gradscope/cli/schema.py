"""``gradscope schema``."""

from __future__ import annotations

import json
from enum import StrEnum
from typing import Annotated

import typer

from gradscope.cli import options as o
from gradscope.cli.terminal import emit


class Subject(StrEnum):
    """What has a schema."""

    REPORT = "report"
    HISTORY = "history"


def schema(
    subject: Annotated[Subject, typer.Argument(help="Whose schema.")],
    debug: o.Debug = False,
) -> int:
    """The JSON Schema of what gradscope writes."""
    from gradscope.cli.schemas import SCHEMAS

    emit(json.dumps(SCHEMAS[subject](), indent=1) + "\n")
    return 0
