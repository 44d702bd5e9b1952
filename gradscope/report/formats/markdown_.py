"""Markdown for a pull request or the summary of a job: the verdict, then findings worst first.

What else a command has for such a reader, it says itself: ``markdown.py`` beside its ``result.py``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from itertools import chain

from rich.table import Table

from gradscope.report.formats import FILE, Display
from gradscope.report.formats.table_ import counted, grouped
from gradscope.report.model import AnyReport, Finding
from gradscope.report.shown import shown_in
from gradscope.text import escaped, listed, plural, shortened, size

#: A comment on GitHub holds 65,536 characters, and a summary that is too long is dropped whole.
MOST_BYTES = 65_000


def render(report: AnyReport, display: Display = FILE) -> str:  # noqa: ARG001
    """At most ``MOST_BYTES`` in UTF-8; what does not fit is counted, never cut in the middle."""
    head = _text(_head(report))
    tail = _text(_tail(report))
    if _bytes(head) + _bytes(tail) > MOST_BYTES // 2:
        head, tail = _kept(head, MOST_BYTES // 4), _kept(tail, MOST_BYTES // 4)
    shown = _kept(_shown(report), MOST_BYTES // 4)
    rest = MOST_BYTES - sum(map(_bytes, (head, shown, tail)))
    return head + _findings(report, rest) + shown + tail


def _head(report: AnyReport) -> Iterator[str]:
    gate, coverage = report.gate, report.coverage
    yield f"## gradscope {report.command}: {report.verdict.upper()}\n"
    yield (
        f"**{counted(report)}** · {coverage.analyzed:,} of {coverage.total:,} {coverage.unit}, "
        f"{size(coverage.bytes)} · exit {gate.exit_code}"
    )
    for given in report.inputs:
        yield f"- {code(given.path)} {inert(given.format)}, {size(given.bytes)}"
    for failure in report.errors:
        yield f"- **not read in full** {code(failure.input)}: {inert(failure.message)}"
    yield from (f"- {inert(reason)}" for reason in gate.reasons[len(report.errors) :])
    yield from (f"- {inert(note)}" for note in gate.notes)


def _shown(report: AnyReport) -> str:
    """What the command shows of its result: tables, and lines of text, the first a heading."""
    section = shown_in(report, "markdown")
    parts = [] if section is None else section(report.result)
    return "".join(_grid(p) if isinstance(p, Table) else _line(str(p)) for p in parts)


def _line(text: str) -> str:
    heading = text.startswith("\n")
    told = re.sub(r" {2,}", " · ", text.strip())
    return f"\n{'### ' if heading else ''}{inert(told)}\n"


def _grid(table: Table) -> str:
    """A table of the terminal as one of Markdown."""
    columns = [[inert(str(cell)) for cell in (c.header, *c.cells)] for c in table.columns]
    signs = [":---" if c.justify == "left" else "---:" for c in table.columns]
    heading, *rows = zip(*columns, strict=True)
    return "\n" + "".join(f"| {' | '.join(row)} |\n" for row in (heading, signs, *rows))


def _findings(report: AnyReport, most: int) -> str:
    groups = grouped(report.findings)
    if not groups:
        return ""
    several = len(report.inputs) + len(report.errors) > 1
    text = (
        "\n| severity | rule | where | what is wrong, and what to do |\n| --- | --- | --- | --- |\n"
    )
    for number, group in enumerate(groups):
        row = _row(group, several)
        if _bytes(text) + _bytes(row) > most - 100:
            rest = sum(map(len, groups[number:]))
            return f"{text}\n… and {plural(rest, 'finding')} more; the JSON report has them all.\n"
        text += row
    return text


def _row(group: list[Finding], several: bool) -> str:
    first = group[0]
    like = (code(f.subject) for f in group[1:])
    others = f"<br>and {listed(like, len(group) - 1, 2)}" if len(group) > 1 else ""
    where = f"<br>in {code(first.input)}" if several else ""
    state = "" if first.state == "new" else f"<br>{_state(first)}"
    return (
        f"| {first.severity.upper()}{state} | {first.rule} {first.name} "
        f"| {code(first.subject)}{others}{where} "
        f"| {inert(first.message)}<br>→ {inert(first.recommendation)} |\n"
    )


def _state(finding: Finding) -> str:
    return inert(f"allowed: {finding.allowed}") if finding.allowed else finding.state


def _tail(report: AnyReport) -> Iterator[str]:
    skipped: dict[str, list[str]] = {}
    for skip in report.coverage.skipped:
        skipped.setdefault(skip.reason, []).append(skip.subject)
    absent: dict[str, list[str]] = {}
    for rule in report.coverage.not_evaluated:
        absent.setdefault(rule.reason, []).append(rule.rule)
    lines = chain(
        (f"- not analysed: {_several(names)}: {inert(why)}" for why, names in skipped.items()),
        (f"- not evaluated: {', '.join(rules)} ({inert(why)})" for why, rules in absent.items()),
    )
    if skipped or absent:
        yield "\n<details><summary>What was not looked at</summary>\n"
        yield from lines
        yield "\n</details>"


def _several(names: list[str]) -> str:
    return listed(map(code, names), len(names))


def _text(lines: Iterable[str]) -> str:
    return "".join(f"{line}\n" for line in lines)


def _kept(text: str, most: int) -> str:
    """The first lines that fit."""
    kept, rest = "", text.splitlines(keepends=True)
    while rest and _bytes(kept) + _bytes(rest[0]) <= most:
        kept += rest.pop(0)
    closing = "\n</details>\n" if "<details>" in kept and "</details>" not in kept else ""
    return f"{kept}- … and {plural(len(rest), 'line')} more{closing}\n" if rest else kept


def _bytes(text: str) -> int:
    return len(text.encode("utf-8", "backslashreplace"))


def inert(text: str) -> str:
    """Text that Markdown shows as it is, without links, mentions or markup."""
    shown = re.sub(r"([\\`*_\[\]<>~|#&$])", r"\\\1", escaped(text, 2000))
    return re.sub(r"@(?=\w)|://|(?<=www)\.", lambda at: f"{at[0]}&#8288;", shown)


def code(name: str) -> str:
    """A name as code; within a table, too."""
    shown = shortened(name).replace("|", "\\|")
    fence = "`" * (1 + max(map(len, re.findall("`+", shown)), default=0))
    pad = " " if shown.startswith("`") or shown.endswith("`") or not shown.strip() else ""
    return f"{fence}{pad}{shown}{pad}{fence}"
