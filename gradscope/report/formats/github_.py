"""GitHub annotations: workflow commands that the runner shows on the run and on the commit."""

from __future__ import annotations

from collections.abc import Iterator

from gradscope.report.formats import FILE, Display
from gradscope.report.formats.places import LEVELS, place
from gradscope.report.formats.table_ import grouped
from gradscope.report.model import AnyReport, Finding
from gradscope.text import escaped, shortened

#: Annotations of each level. GitHub shows ten a step and drops the rest in silence; the tenth says
#: how many there are.
_MOST = 9
_COMMANDS = {"error": "error", "warning": "warning", "note": "notice"}


def render(report: AnyReport, display: Display = FILE) -> str:
    """Worst first, like findings together; what the baseline knows is left out."""
    lines: dict[str, list[str]] = {command: [] for command in _COMMANDS.values()}
    for failure in report.errors:
        lines["error"].append(
            _command("error", place(failure.input, display), "cannot be read in full",
                     f"{failure.input}: {failure.message}")
        )  # fmt: skip
    if report.gate.exit_code == 4:
        lines["error"].append(
            _command("error", None, "nothing was analysed", "; ".join(report.gate.reasons))
        )
    for group in grouped([f for f in report.findings if f.state != "unchanged"]):
        command = _COMMANDS[LEVELS[group[0].severity]]
        lines[command].append(_annotation(command, group, display))
    title = report.verdict if report.part else "baseline and allow-list"
    lines["warning"].extend(_command("warning", None, title, note) for note in report.gate.notes)
    return "".join(line for command in lines for line in _shown(command, lines[command]))


def _annotation(command: str, group: list[Finding], display: Display) -> str:
    first = group[0]
    more = f" (and {len(group) - 1} like it)" if len(group) > 1 else ""
    return _command(
        command,
        place(first.input, display),
        f"{first.rule} {first.name} ({first.severity})",
        f"{shortened(first.subject)}{more}: {first.message}\n→ {first.recommendation}",
    )


def _shown(command: str, lines: list[str]) -> Iterator[str]:
    yield from lines[:_MOST]
    if len(lines) > _MOST:
        yield _command(command, None, "gradscope", f"{len(lines) - _MOST:,} more, see the report")


def _command(command: str, file: str | None, title: str, message: str) -> str:
    properties = ([f"file={_property(file)}", "line=1"] if file else []) + [
        f"title={_property(title)}"
    ]
    return f"::{command} {','.join(properties)}::{_data(message)}\n"


def _data(text: str) -> str:
    return "%0A".join(escaped(line).replace("%", "%25") for line in text.split("\n"))


def _property(text: str) -> str:
    return escaped(text).replace("%", "%25").replace(":", "%3A").replace(",", "%2C")
