"""``gradscope rules``."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from gradscope.cli import completion
from gradscope.cli.command import command
from gradscope.cli.options import ListFormat, Listing
from gradscope.cli.terminal import emit


@command
def rules(
    rule: Annotated[
        str | None,
        typer.Argument(
            metavar="[ID]",
            help="A code, a prefix or a name.",
            show_default=False,
            autocompletion=completion.rules,
        ),
    ] = None,
    format_: ListFormat = Listing.TABLE,
) -> int:
    """Every rule: what it finds, why, its thresholds, and how often it is wrong."""
    from gradscope.report.rules import load_rules, select

    chosen = select(load_rules().values(), [rule] if rule else ())
    if format_ is Listing.JSON:
        emit(json.dumps([_record(r) for r in chosen], indent=1) + "\n")
    elif rule:
        emit("\n\n".join(_described(r) for r in chosen) + "\n")
    else:
        emit("".join(f"{r.code}  {r.severity:<8}  {r.name:<21}  {r.summary}\n" for r in chosen))
        emit(f"\n{_calibration()}\n")
        emit("`gradscope rules NAME` says why, with thresholds and their source.\n")
    return 0


def _described(r: Any) -> str:
    thresholds = "\n".join(f"  {name} = {value:g}" for name, value in r.thresholds.items())
    return f"{r.code} {r.name} ({r.severity})\n\n{r.documentation}" + (
        f"\n\nThresholds:\n{thresholds}" if thresholds else ""
    )


def _record(r: Any) -> dict[str, Any]:
    return {
        "code": r.code,
        "name": r.name,
        "severity": r.severity,
        "command": r.reads.command,
        "needs": r.needs,
        "summary": r.summary,
        "documentation": r.documentation,
        "thresholds": r.thresholds,
    }


def _calibration() -> str:
    from gradscope.weights.calibration import CALIBRATION

    return CALIBRATION.sentence
