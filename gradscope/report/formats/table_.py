"""The table for people: findings first, worst on top, then what was measured."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from gradscope.report.formats import Display
from gradscope.report.model import AnyReport, Finding
from gradscope.report.severity import Severity

#: How each severity is coloured. The word is always written, too.
STYLES = {
    Severity.CRITICAL: "bold white on red",
    Severity.HIGH: "bold red",
    Severity.MEDIUM: "yellow",
    Severity.LOW: "cyan",
    Severity.INFO: "dim",
}
_STATUS = {
    "excellent": "green",
    "good": "green",
    "fair": "yellow",
    "poor": "red",
    "critical": "bold red",
}
#: Rows and findings a terminal is shown unless every tensor is asked for.
_SHOWN = 24
_LONGEST_NAME = 100

#: What a command shows of its result: (report, display) -> parts. Filled by ``section``.
_SECTIONS: dict[str, Callable[[Any, Display], Iterator[RenderableType]]] = {}


def render(report: AnyReport, display: Display) -> str:
    """The whole table. Off a terminal nothing is cut and every row is there."""
    out = io.StringIO()
    console = Console(
        file=out,
        width=display.width or 10_000,
        height=100,
        force_terminal=display.colour,
        color_system="truecolor" if display.colour else None,
        no_color=not display.colour,
        highlight=False,
        markup=False,
        emoji=False,
        legacy_windows=False,
        _environ={},
    )
    for part in _parts(report, display):
        console.print(part, soft_wrap=display.width is None and isinstance(part, Text))
    return "".join(line.rstrip() + "\n" for line in out.getvalue().splitlines())


def section(command: str) -> Callable[[Any], Any]:
    """Register what a command shows of its result below the findings."""

    def register(parts: Callable[[Any, Display], Iterator[RenderableType]]) -> Any:
        _SECTIONS[command] = parts
        return parts

    return register


def _parts(report: AnyReport, display: Display) -> Iterator[RenderableType]:
    for given in report.inputs:
        yield Text.assemble((clean(given.path), "bold"), f"  {given.format} · {size(given.bytes)}")
    for failure in report.errors:
        yield Text.assemble(
            ("error ", "bold red"), f"{clean(failure.input)}: {clean(failure.message, None)}"
        )
    yield from _findings(report.findings, display)
    if display.detail and report.command in _SECTIONS and report.result is not None:
        yield from _SECTIONS[report.command](report.result, display)
    yield from _coverage(report, display)
    yield _verdict(report)


def _findings(findings: Sequence[Finding], display: Display) -> Iterator[RenderableType]:
    groups = grouped(findings)
    shown = groups if display.width is None or display.detail > 1 else groups[:_SHOWN]
    if groups:
        yield Text("\nFindings", style="bold")
    for group in shown:
        yield from _finding(group)
    if len(groups) > len(shown):
        rest = sum(len(g) for g in groups[len(shown) :])
        yield Text(f"  … {rest} more findings of lower severity; -v shows them all", style="dim")


def grouped(findings: Sequence[Finding]) -> list[list[Finding]]:
    """Findings of one rule and severity about the same place of different layers, together."""
    groups: dict[tuple[str, str, str], list[Finding]] = {}
    for finding in findings:
        key = (finding.rule, finding.severity, re.sub(r"\d+", "*", finding.subject))
        groups.setdefault(key, []).append(finding)
    return list(groups.values())


def _finding(group: Sequence[Finding]) -> Iterator[RenderableType]:
    first = group[0]
    style = STYLES[first.severity]
    more = f"  (and {len(group) - 1} like it: {_others(group)})" if len(group) > 1 else ""
    yield Text.assemble(
        "  ",
        (f"{first.severity.upper():<8}", style),
        f" {first.rule} ",
        (first.name, "bold"),
        f"  {clean(first.subject)}",
        (more, "dim"),
        ("  known" if first.state == "unchanged" else "", "dim"),
    )
    yield Padding(Text(clean(first.message, None)), (0, 0, 0, 11))
    yield Padding(Text("→ " + clean(first.recommendation, None), style="dim"), (0, 0, 0, 11))


def _others(group: Sequence[Finding]) -> str:
    names = [clean(f.subject) for f in group[1:3]]
    return ", ".join(names) + (", …" if len(group) > 3 else "")


def _coverage(report: AnyReport, display: Display) -> Iterator[RenderableType]:
    """What was not analysed, by reason, and which rules could not be asked."""
    by_reason: dict[str, list[str]] = {}
    for skip in report.coverage.skipped:
        by_reason.setdefault(skip.reason, []).append(clean(skip.subject))
    if by_reason:
        yield Text("\nNot analysed", style="bold")
    for reason, subjects in by_reason.items():
        listed = subjects if display.width is None or display.detail > 1 else subjects[:3]
        more = f" and {len(subjects) - len(listed):,} more" if len(subjects) > len(listed) else ""
        yield Text.assemble(f"  {', '.join(listed)}{more}", (f"  {clean(reason, None)}", "dim"))
    not_evaluated: dict[str, list[str]] = {}
    for rule in report.coverage.not_evaluated:
        not_evaluated.setdefault(rule.reason, []).append(rule.rule)
    for reason, rules in not_evaluated.items():
        yield Text(f"\nNot evaluated: {', '.join(rules)} ({reason})", style="dim")


def _verdict(report: AnyReport) -> RenderableType:
    gate, coverage = report.gate, report.coverage
    counts = {s: sum(f.severity is s for f in report.findings) for s in reversed(Severity)}
    found = ", ".join(f"{n} {s}" for s, n in counts.items() if n) or "no findings"
    analysed = f"{coverage.analyzed:,} of {coverage.total:,} {coverage.unit}"
    style = "bold red" if gate.failed else "bold green"
    # Failed inputs are written out above; here they are counted.
    failed = len(report.errors)
    unread = [f"{failed} input{'s' * (failed > 1)} could not be read in full"] if failed else []
    reasons = "".join(f": {clean(r)}" for r in (*unread, *gate.reasons[failed:]))
    return Text.assemble(
        ("\nFAILED" if gate.failed else "\nPASSED", style),
        f"  {found} · {analysed}, {size(coverage.bytes)} · exit {gate.exit_code}{reasons}",
    )


# -- pieces that sections share -------------------------------------------------------------------


def table(*columns: str | tuple[str, str]) -> Table:
    """A borderless table; a column is a heading or (heading, "left" or "right")."""
    made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for column in columns:
        heading, justify = (column, "right") if isinstance(column, str) else column
        wraps = heading in ("tensor", "layer")
        made.add_column(heading, justify=justify, no_wrap=not wraps, overflow="fold")  # type: ignore[arg-type]
    return made


def clean(text: str, longest: int | None = _LONGEST_NAME) -> str:
    """A stranger's text made harmless: control and direction characters escaped, length bounded."""
    escaped = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    if longest is not None and len(escaped) > 4 * longest:
        escaped = (
            f"{escaped[:longest]}…({len(escaped) - 2 * longest:,} characters)…{escaped[-longest:]}"
        )
    return escaped


def number(value: float | int | None) -> str:
    """Four significant digits, or a dash for what is undefined."""
    return "–" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def size(count: float) -> str:
    """Bytes in decimal units."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def sparkline(counts: Sequence[float], unicode: bool = True) -> str:
    """A small drawing of some counts, one character each."""
    if not counts:
        return ""
    blocks = " ▁▂▃▄▅▆▇█" if unicode else " .:-=+*#@"
    top = max(counts) or 1
    return "".join(blocks[0 if c == 0 else max(1, round(c / top * 8))] for c in counts)


def health_text(score: float, status: str) -> Text:
    """A health score in the colour of its band."""
    return Text(f"{score:.0f} {status}", style=_STATUS[status])


def facts(items: Mapping[str, str]) -> Text:
    """Names and values on one line."""
    return Text("  ").join(Text.assemble((f"{k} ", "dim"), v) for k, v in items.items())
