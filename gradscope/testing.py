"""For tests: a model file, a recorded run or a report is healthy, or the test says why not."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from gradscope.containers.beginning import Beginning
from gradscope.errors import UsageError
from gradscope.formats import CHECKPOINT, find, recognised
from gradscope.text import plural, quoted

if TYPE_CHECKING:
    from gradscope.report.model import AnyReport


def assert_healthy(
    subject: AnyReport | str | os.PathLike[str],
    *,
    select: Sequence[str] = (),
    ignore: Sequence[str] = (),
    fail_on: str | None = None,
) -> None:
    """Raise AssertionError for what fails a run: findings, and what was not read or not asked.

    ``subject`` is a report, or the path of a checkpoint, of a gradient history, or of a report that
    was saved as JSON; which one it is, is told by its content. ``select`` and ``ignore`` are rule
    codes, prefixes or names; of a report they choose among the rules that it asked. ``fail_on`` is
    the least severity that fails, by default the report's own (high). That none of the rules could
    be evaluated fails too.

    Raises UsageError for an unknown rule or severity, and for rules that were not asked.
    """
    __tracebackhide__ = True
    if reason := _unhealthy(_report(subject), select, ignore, fail_on):
        raise AssertionError(reason)


def _report(subject: AnyReport | str | os.PathLike[str]) -> AnyReport:
    if not isinstance(subject, str | os.PathLike):
        return subject
    path = os.fspath(subject)
    if _is_report(path):
        from gradscope.saved import read_report

        return read_report(path)
    if _is_history(path):
        from gradscope.flow.analysis import analyze_flow

        return analyze_flow(path)
    from gradscope.weights.analysis import analyze_weights

    return analyze_weights(path)


def _is_report(path: str) -> bool:
    """Whether a file begins as the JSON of a report does."""
    if not os.path.isfile(path):
        return False
    with open(path, "rb") as file:
        start = file.read(4096)
    return start.lstrip().startswith(b"{") and b'"schema_version"' in start and b'"tool"' in start


def _is_history(path: str) -> bool:
    """Whether a path is a history and no checkpoint; a folder by the shards that lie in it."""
    if os.path.isdir(path):
        return any(_is_run(Beginning(str(f))) for f in Path(path).iterdir() if f.is_file())
    if not os.path.isfile(path):
        return False
    file = Beginning(path)
    return _is_run(file) or (
        recognised(file, *CHECKPOINT) is None and recognised(file, "history") is not None
    )


def _is_run(file: Beginning) -> bool:
    """Whether a file is of a format that only histories have."""
    return any(find(name).matches(file) for name in ("grads", "events"))


def _unhealthy(
    report: AnyReport, select: Sequence[str], ignore: Sequence[str], fail_on: str | None
) -> str:
    """Why a report fails by the rules that are chosen; empty where it does not."""
    from gradscope.report.formats import Display, renderer
    from gradscope.report.gate import gate
    from gradscope.report.severity import Severity

    if fail_on not in (None, *Severity, "never"):
        raise UsageError(f"fail_on is {fail_on!r}; it is one of {', '.join(Severity)} or never")
    asked = _asked(report, select, ignore)
    chosen = tuple(f for f in report.findings if f.name in asked)
    decided = gate(
        chosen,
        report.errors,
        report.coverage,
        fail_on=fail_on or report.gate.fail_on,
        allow_empty=report.gate.exit_code != 4,
        notes=report.gate.notes,
    )
    absent = {n.rule for n in report.coverage.not_evaluated}
    shown = renderer("table")(
        report.model_copy(update={"findings": chosen, "gate": decided}), Display(detail=0)
    )
    if decided.failed:
        return f"{'; '.join(decided.reasons)}\n\n{shown}"
    if report.coverage.analyzed and asked <= absent:
        return f"none of the {plural(len(asked), 'rule')} could be evaluated\n\n{shown}"
    return ""


def _asked(report: AnyReport, selected: Sequence[str], ignored: Sequence[str]) -> set[str]:
    """The names of the chosen rules among those that a report asked."""
    from gradscope.report.rules import load_rules, select

    rules = [r for r in load_rules().values() if r.name in report.coverage.rules]
    for pattern in selected:
        select(load_rules().values(), [pattern])
        if not any(r.selected_by(pattern) for r in rules):
            raise UsageError(f"no rule that {quoted(pattern)} names was asked for this report")
    chosen = {r.name for r in select(load_rules().values(), selected, ignored)}
    return chosen & {r.name for r in rules}
