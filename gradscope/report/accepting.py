"""Writing a baseline from a report: accepting what is found, dropping what is gone.

A run that looked at less than the baseline is about may remove nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from gradscope.errors import UsageError
from gradscope.report.baseline import (
    Baseline,
    Compared,
    Entry,
    Scope,
    compared,
    evaluated,
    input_names,
    is_worse,
    measures,
    partial_run,
)
from gradscope.report.model import AnyReport, Finding
from gradscope.text import listed


def created(report: AnyReport) -> Baseline:
    """Every finding of a report, accepted. Raises UsageError for a report of a part."""
    if report.part:
        raise UsageError(f"the report is of part {report.part} of a run; accept the merged one")
    if report.errors or not report.coverage.analyzed:
        raise UsageError("the report is of a run that could not read everything; repeat that")
    return _of(
        Baseline(), report, [_entry(f, report.command) for f in report.findings if not f.allowed]
    )


def pruned(baseline: Baseline, report: AnyReport) -> Baseline:
    """Without the entries that a whole run does not find any more.

    Raises UsageError for a run that looked at less than the baseline is about.
    """
    found = _whole(baseline, report)
    return _of(baseline, report, [entry for _, entry in found.pairs if entry is not None])


def updated(baseline: Baseline, report: AnyReport, accept_new: bool) -> Baseline:
    """Pruned, and what became better kept as it is now; what is new or worse if ``accept_new``.

    Raises UsageError as ``pruned`` does.
    """
    found = _whole(baseline, report)
    entries = (_renewed(f, e, report.command, accept_new) for f, e in found.pairs)
    return _of(baseline, report, [entry for entry in entries if entry is not None])


def _renewed(finding: Finding, entry: Entry | None, command: str, accept_new: bool) -> Entry | None:
    if finding.allowed or (entry is None and not accept_new):
        return None
    if entry is not None and not accept_new and is_worse(finding, entry, 0):
        return entry
    kept = {} if entry is None else {"tolerance": entry.tolerance}
    return _entry(finding, command).model_copy(update=kept)


def _whole(baseline: Baseline, report: AnyReport) -> Compared:
    why = partial_run(report.command, report.inputs, report.coverage, report.errors, baseline)
    if why is not None:
        raise UsageError(f"this run may not remove entries: {why}")
    found = compared(report.findings, report.command, baseline)
    unasked = {e.name for e in found.gone} - evaluated(report.coverage)
    if unasked:
        raise UsageError(
            "this run may not remove entries: it did not evaluate "
            f"{listed(sorted(unasked), len(unasked))}, of which the baseline has some"
        )
    return found


def _of(baseline: Baseline, report: AnyReport, entries: Iterable[Entry]) -> Baseline:
    """The baseline with these entries for the report's command."""
    others = [e for e in baseline.findings if e.command != report.command]
    scope = Scope(inputs=input_names(report.inputs), narrowed=report.coverage.narrowed)
    changed: dict[str, Any] = {
        "runs": {**baseline.runs, report.command: scope},
        "findings": tuple(
            sorted((*others, *entries), key=lambda e: (e.command, e.rule, e.subject, e.input))
        ),
    }
    return baseline.model_copy(update=changed)


def _entry(finding: Finding, command: str) -> Entry:
    return Entry(
        command=command,
        rule=finding.rule,
        name=finding.name,
        subject=finding.subject,
        input=Path(finding.input).name,
        fingerprint=finding.fingerprint,
        severity=finding.severity,
        measures=measures(finding),
    )
