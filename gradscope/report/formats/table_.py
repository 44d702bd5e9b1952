"""The table for people: findings first, worst on top, then what was measured."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence

from rich.console import Console, RenderableType
from rich.padding import Padding
from rich.text import Text

from gradscope.report.formats import FILE, Display
from gradscope.report.formats.cells import Grid
from gradscope.report.model import AnyReport, Finding
from gradscope.report.severity import Severity
from gradscope.report.shown import shown_in
from gradscope.text import escaped, listed, plural, shortened, size

#: How each severity is coloured. The word is always written, too.
STYLES = {
    Severity.CRITICAL: "bold white on red",
    Severity.HIGH: "bold red",
    Severity.MEDIUM: "yellow",
    Severity.LOW: "cyan",
    Severity.INFO: "dim",
}
#: Rows and findings a terminal is shown unless every tensor is asked for.
_SHOWN = 24


def render(report: AnyReport, display: Display = FILE) -> str:
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
        if isinstance(part, Grid):
            out.writelines(f"{line}\n" for line in part.lines())
            continue
        console.print(part, soft_wrap=display.width is None and isinstance(part, Text))
    return "".join(line.rstrip() + "\n" for line in out.getvalue().splitlines())


#: What a section is made of.
Part = RenderableType | Grid


def _parts(report: AnyReport, display: Display) -> Iterator[Part]:
    for given in report.inputs:
        yield Text.assemble(
            (shortened(given.path), "bold"), f"  {given.format} · {size(given.bytes)}"
        )
    for failure in report.errors:
        yield Text.assemble(
            ("error ", "bold red"), f"{shortened(failure.input)}: {escaped(failure.message)}"
        )
    yield from _findings(report, display)
    section = shown_in(report, "table") if display.detail else None
    if section is not None:
        yield from section(report.result, display)
    yield from _coverage(report, display)
    if report.gate.notes:
        yield Text("\nNotes", style="bold")
    yield from (Padding(Text(escaped(note)), (0, 0, 0, 2)) for note in report.gate.notes)
    yield _verdict(report, display)


def _findings(report: AnyReport, display: Display) -> Iterator[RenderableType]:
    groups = grouped(report.findings)
    shown = groups if display.width is None or display.detail > 1 else groups[:_SHOWN]
    if groups:
        yield Text("\nFindings", style="bold")
    for group in shown:
        yield from _finding(group, several=len(report.inputs) + len(report.errors) > 1)
    if len(groups) > len(shown):
        rest = sum(len(g) for g in groups[len(shown) :])
        yield Text(
            f"  … {rest} more findings, less severe or known; -v shows them all", style="dim"
        )


def grouped(findings: Sequence[Finding]) -> list[list[Finding]]:
    """Findings of one rule, kind and severity about one place of different layers of an input."""
    groups: dict[tuple[object, ...], list[Finding]] = {}
    for finding in findings:
        place = re.sub(r"\d+", "*", finding.subject)
        kind = finding.evidence.get("kind")
        key = (finding.rule, kind, finding.severity, finding.input, place, _state(finding))
        groups.setdefault(key, []).append(finding)
    return list(groups.values())


def _finding(group: Sequence[Finding], several: bool) -> Iterator[RenderableType]:
    first = group[0]
    style = STYLES[first.severity]
    more = f"  (and {len(group) - 1} like it: {_others(group)})" if len(group) > 1 else ""
    where = f"  in {shortened(first.input)}" if several and first.input not in first.subject else ""
    yield Text.assemble(
        "  ",
        (f"{first.severity.upper():<8}", style),
        f" {first.rule} ",
        (first.name, "bold"),
        f"  {shortened(first.subject)}",
        (more, "dim"),
        where,
        (_state(first), "dim"),
    )
    yield Padding(Text(escaped(first.message)), (0, 0, 0, 11))
    yield Padding(Text("→ " + escaped(first.recommendation), style="dim"), (0, 0, 0, 11))


def _state(finding: Finding) -> str:
    if finding.allowed:
        return f"  allowed: {escaped(finding.allowed)}"
    return {"new": "", "unchanged": "  known", "worsened": "  worsened"}[finding.state]


def _others(group: Sequence[Finding]) -> str:
    return listed((shortened(f.subject) for f in group[1:]), len(group) - 1, 2)


def _coverage(report: AnyReport, display: Display) -> Iterator[RenderableType]:
    """What was not analysed, by reason, and which rules could not be asked."""
    by_reason: dict[str, list[str]] = {}
    for skip in report.coverage.skipped:
        by_reason.setdefault(skip.reason, []).append(shortened(skip.subject))
    if by_reason:
        yield Text("\nNot analysed", style="bold")
    for reason, subjects in by_reason.items():
        most = len(subjects) if display.width is None or display.detail > 1 else 3
        named = listed(subjects, len(subjects), most)
        yield Text.assemble(f"  {named}", (f"  {escaped(reason)}", "dim"))
    if display.detail < 2:
        return  # the verdict counts the rules that were not evaluated
    not_evaluated: dict[str, list[str]] = {}
    for rule in report.coverage.not_evaluated:
        not_evaluated.setdefault(rule.reason, []).append(rule.rule)
    for reason, rules in not_evaluated.items():
        yield Text(f"\nNot evaluated: {', '.join(rules)} ({reason})", style="dim")


def _verdict(report: AnyReport, display: Display) -> RenderableType:
    gate, coverage = report.gate, report.coverage
    analysed = f"{coverage.analyzed:,} of {coverage.total:,} {coverage.unit}"
    style = "bold red" if gate.failed else "bold yellow" if report.part else "bold green"
    # Failed inputs are written out above; here they are counted.
    failed = len(report.errors)
    unread = [f"{plural(failed, 'input')} could not be read in full"] if failed else []
    reasons = "".join(f": {shortened(r)}" for r in (*unread, *gate.reasons[failed:]))
    return Text.assemble(
        (f"\n{report.verdict.upper()}", style),
        f"  {counted(report)} · {analysed}, {size(coverage.bytes)}{_unasked(report, display)}"
        f" · exit {gate.exit_code}{' (--fail-on never)' * (gate.fail_on == 'never')}",
        reasons,
    )


def _unasked(report: AnyReport, display: Display) -> str:
    """How many rules could not be evaluated, and how to learn why."""
    names = {absent.rule for absent in report.coverage.not_evaluated}
    hint = "" if display.detail > 1 else " (-v tells why)"
    return f" · {plural(len(names), 'rule')} not evaluated{hint}" if names else ""


def counted(report: AnyReport) -> str:
    """How many findings of each severity there are, and how many are known."""
    counts = {s: sum(f.severity is s for f in report.findings) for s in reversed(Severity)}
    found = ", ".join(f"{n} {s}" for s, n in counts.items() if n) or "no findings"
    known = sum(f.state == "unchanged" for f in report.findings)
    return found + (f" ({known} known)" if known else "")
