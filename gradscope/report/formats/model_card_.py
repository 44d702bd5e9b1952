"""A section of a model card, for those who will use the model: what was looked at, what was found.

Written into a card that is there (``--report model-card=README.md``), it takes the place of the
section before it and of nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from pathlib import PurePath

from gradscope.report.formats import FILE, Display
from gradscope.report.formats.markdown_ import code, inert
from gradscope.report.formats.sections import section
from gradscope.report.formats.table_ import counted, grouped
from gradscope.report.model import AnyReport, Finding
from gradscope.text import listed, plural

#: Rows of findings. A card is no report.
_MOST = 20
#: Inputs that are named.
_INPUTS = 8


def render(report: AnyReport, display: Display = FILE) -> str:  # noqa: ARG001
    """Files by their names alone: a card is published, the folders of its author are not."""
    lines = chain(("## Diagnostics", ""), _summary(report), _findings(report), _absent(report))
    return section("gradscope", "\n".join(lines))


def _summary(report: AnyReport) -> Iterator[str]:
    coverage, gate = report.coverage, report.gate
    paths = [*(i.path for i in report.inputs), *(e.input for e in report.errors)]
    names = dict.fromkeys(code(_name(path)) for path in paths)
    yield (
        f"`gradscope {report.command}` {report.tool.version} looked at "
        f"{listed(names, len(names), _INPUTS)} ({coverage.analyzed:,} of {coverage.total:,} "
        f"{coverage.unit}): **{counted(report)}**. "
        + (
            f"This is {report.verdict} of a run, and no verdict."
            if report.part and not gate.failed
            else f"The gate at `{gate.fail_on}` {report.verdict}."
        )
    )
    if report.errors:
        yield f"Not everything could be read: {plural(len(report.errors), 'failure')}."


def _findings(report: AnyReport) -> Iterator[str]:
    groups = grouped(report.findings)
    if groups:
        yield from ("", "| severity | finding | where | what |", "| --- | --- | --- | --- |")
    yield from map(_row, groups[:_MOST])
    if rest := sum(map(len, groups[_MOST:])):
        yield from ("", f"… and {plural(rest, 'finding')} more.")


def _row(group: list[Finding]) -> str:
    first = group[0]
    why = f"<br>accepted: {inert(first.allowed)}" if first.allowed else ""
    subject = _name(first.input) if first.subject == first.input else first.subject
    where = listed([code(subject), *(code(f.subject) for f in group[1:])], len(group), 2)
    return (
        f"| {first.severity} | {inert(first.rule)} {inert(first.name)} | {where} "
        f"| {inert(first.message)}{why} |"
    )


def _absent(report: AnyReport) -> Iterator[str]:
    absent = [inert(n.rule) for n in report.coverage.not_evaluated]
    if absent:
        yield from ("", f"Not evaluated: {', '.join(absent)}.")
    if skipped := report.coverage.skipped:
        names = (code(skip.subject) for skip in skipped)
        yield from ("", f"Not analysed: {listed(names, len(skipped))}.")


def _name(path: str) -> str:
    return PurePath(path.replace("\\", "/")).name or path
