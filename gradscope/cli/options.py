"""The options that analysis commands share, and how their values are read."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from gradscope.errors import UsageError
from gradscope.report.severity import Severity

FailOn = StrEnum("FailOn", [*((s.name, s.value) for s in Severity), ("NEVER", "never")])  # type: ignore[misc]


class Color(StrEnum):
    """When to colour."""

    AUTO = "auto"
    ALWAYS = "always"
    NEVER = "never"


Format = Annotated[
    str,
    typer.Option(
        "--format", "-f", metavar="FORMAT", help="What stdout carries: table, json, jsonl, csv."
    ),
]
Reports = Annotated[
    list[str] | None,
    typer.Option(
        "--report", metavar="FORMAT=PATH", help="Also write a report to a file (repeatable)."
    ),
]
FailOnOption = Annotated[
    FailOn, typer.Option("--fail-on", help="Exit 1 when a finding is at least this severe.")
]
Select = Annotated[
    list[str] | None,
    typer.Option(
        metavar="RULE", help="Only these rules: codes, prefixes or names (repeatable, commas)."
    ),
]
Ignore = Annotated[
    list[str] | None, typer.Option(metavar="RULE", help="Not these rules (repeatable, commas).")
]
AllowEmpty = Annotated[
    bool, typer.Option("--allow-empty", help="Exit 0, not 4, when there is nothing to analyse.")
]
KeepGoing = Annotated[
    bool,
    typer.Option(
        "--keep-going",
        help="When a file fails while it is read, analyse the rest of its checkpoint.",
    ),
]
Device = Annotated[
    str, typer.Option(help="cpu, cuda, cuda:1 or auto. A device that is absent is an error.")
]
Jobs = Annotated[
    int | None,
    typer.Option(
        "--jobs",
        "-j",
        min=1,
        help="Threads; the cores there are by default. Results do not depend on it.",
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Findings and verdict only.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Every tensor and every finding.")]
ColorOption = Annotated[Color, typer.Option("--color", help="Colour the table.")]
NoProgress = Annotated[bool, typer.Option("--no-progress", help="No progress bar.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an internal error.")]
Seed = Annotated[
    int, typer.Option(help="Seed of what is random; nothing in this command is.", hidden=True)
]


def use_threads(jobs: int | None) -> None:
    """Let torch use so many threads; by default the cores there are."""
    if jobs is not None:
        import torch

        torch.set_num_threads(jobs)


def split_commas(values: Sequence[str] | None) -> list[str]:
    """``--select A,B --select C`` as one list."""
    return [part.strip() for value in values or () for part in value.split(",") if part.strip()]


def check_request(format_: str, selected: Sequence[str], ignored: Sequence[str]) -> None:
    """Refuse an unknown format or rule before anything heavy is imported. Raises UsageError."""
    from gradscope.report.formats import renderer
    from gradscope.report.rules import load_rules, select

    renderer(format_)
    select(load_rules().values(), selected, ignored)


def parse_reports(values: Sequence[str] | None) -> list[tuple[str, Path]]:
    """``FORMAT=PATH`` pairs, their formats checked before any work. Raises UsageError."""
    from gradscope.report.formats import renderer

    pairs = []
    for value in values or ():
        name, equals, path = value.partition("=")
        if not equals or not path:
            raise UsageError(f"--report takes FORMAT=PATH, e.g. json=report.json, not {value!r}")
        renderer(name)
        if not Path(path).absolute().parent.is_dir():
            raise UsageError(f"--report {value}: there is no folder {Path(path).parent}")
        pairs.append((name, Path(path)))
    return pairs


def publish(
    report: Any, format_: str, reports: Sequence[tuple[str, Path]], color: str, detail: int
) -> None:
    """Print a report on stdout and write the others; "wrote X" goes to stderr."""
    import sys

    from gradscope.cli.terminal import coloured, columns, emit, say
    from gradscope.report.formats import Display, renderer

    unicode = (sys.stdout.encoding or "").lower().replace("-", "").startswith("utf")
    screen = Display(columns(sys.stdout), coloured(sys.stdout, color), unicode, detail)
    emit(renderer(format_)(report, screen))
    for name, path in reports:
        try:
            path.write_text(
                renderer(name)(report, Display(detail=2)),
                encoding="utf-8",
                errors="backslashreplace",
            )
        except OSError as error:
            raise UsageError(f"--report {name}={path}: {error.strerror}") from error
        if detail:
            say(f"wrote {path}")
