"""A report in a notebook: the verdict, then the findings worst first."""

from __future__ import annotations

from collections.abc import Iterator

from gradscope.notebook import name, shown, table, words
from gradscope.report.formats.table_ import counted, grouped
from gradscope.report.model import AnyReport, Finding
from gradscope.text import listed, plural, size

#: Rows of findings, and what is said of inputs and of what was not looked at.
_MOST = 30


def report_html(report: AnyReport) -> str:
    """Verdict, inputs, reasons, findings (like ones together) and what was not looked at."""
    groups = grouped(report.findings)
    several = len(report.inputs) + len(report.errors) > 1
    headings = ("severity", "rule", "where", "what is wrong, and what to do")
    findings = table(headings, (_row(group, several) for group in groups[:_MOST]))
    rest = sum(map(len, groups[_MOST:]))
    more = f"<p>… and {plural(rest, 'finding')} more, in <code>.findings</code></p>"
    return shown(
        _verdict(report),
        f"<ul>{''.join(f'<li>{line}</li>' for line in _notes(report))}</ul>",
        findings if groups else "",
        more if rest else "",
    )


def _verdict(report: AnyReport) -> str:
    gate, coverage = report.gate, report.coverage
    return (
        f"<p><strong>gradscope {words(report.command)}: {report.verdict.upper()}</strong> · "
        f"{counted(report)} · {coverage.analyzed:,} of {coverage.total:,} {coverage.unit}, "
        f"{size(coverage.bytes)} · exit {gate.exit_code}</p>"
    )


def _notes(report: AnyReport) -> Iterator[str]:
    coverage, failed = report.coverage, report.errors
    for given in report.inputs[:_MOST]:
        yield f"{name(given.path)} {words(given.format)}, {size(given.bytes)}"
    for failure in failed[:_MOST]:
        yield f"<strong>not read in full</strong> {name(failure.input)}: {words(failure.message)}"
    unsaid = len(report.inputs[_MOST:]) + len(failed[_MOST:])
    if unsaid:
        yield f"… and {plural(unsaid, 'input')} more"
    yield from map(words, report.gate.reasons[len(failed) :])
    yield from map(words, report.gate.notes)
    if coverage.skipped:
        names = (name(skip.subject) for skip in coverage.skipped)
        yield f"not analysed: {listed(names, len(coverage.skipped))}"
    if coverage.not_evaluated:
        rules = (words(rule.rule) for rule in coverage.not_evaluated)
        yield f"not evaluated: {listed(rules, len(coverage.not_evaluated))}"


def _row(group: list[Finding], several: bool) -> tuple[str, ...]:
    first = group[0]
    state = "" if first.state == "new" else f"<br>{words(first.allowed or first.state)}"
    like = (name(finding.subject) for finding in group[1:])
    others = f"<br>and {listed(like, len(group) - 1, 2)}" if len(group) > 1 else ""
    where = f"<br>in {name(first.input)}" if several else ""
    return (
        f"<strong>{first.severity.upper()}</strong>{state}",
        f"{words(first.rule)} {words(first.name)}",
        name(first.subject) + others + where,
        f"{words(first.message)}<br>→ {words(first.recommendation)}",
    )
