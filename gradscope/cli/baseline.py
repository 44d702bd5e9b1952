"""``gradscope baseline``."""

from __future__ import annotations

import os
from collections import Counter
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from gradscope.cli.command import command
from gradscope.cli.options import AcceptedIn, ConfigFrom, Isolated
from gradscope.cli.render import REPORT
from gradscope.cli.terminal import emit, saved
from gradscope.errors import UsageError
from gradscope.text import plural

if TYPE_CHECKING:
    from gradscope.report.baseline import Baseline
    from gradscope.report.model import AnyReport


class Action(StrEnum):
    """What to do with a baseline."""

    CREATE = "create"
    UPDATE = "update"
    PRUNE = "prune"


@command
def baseline(
    action: Annotated[
        Action,
        typer.Argument(
            help="create: accept every finding of the report. update: drop what is gone, keep what "
            "became better. prune: only drop what is gone."
        ),
    ],
    report: Annotated[str, REPORT],
    *,
    baseline: AcceptedIn = None,
    accept_new: Annotated[
        bool, typer.Option("--accept-new", help="With update: accept what is new or worse, too.")
    ] = False,
    config: ConfigFrom = None,
    isolated: Isolated = False,
) -> int:
    """Accept the findings of a saved report, so that only new and worse ones fail a run."""
    from gradscope.cli.configuration import in_force
    from gradscope.report.baseline import write_baseline

    path = baseline or in_force(config or (), isolated)[0].baseline
    if not path:
        raise UsageError("name the file with --baseline FILE, or baseline in the configuration")
    if accept_new and action is not Action.UPDATE:
        raise UsageError("--accept-new belongs to update; create accepts everything, prune nothing")
    if action is Action.CREATE and os.path.exists(path):
        raise UsageError(f"{path} is there already; `gradscope baseline update` changes it")
    found = saved(report)
    before, after = _changed(action, path, found, accept_new)
    write_baseline(path, after)
    emit(_summary(path, before, after, found))
    return 0


def _changed(
    action: Action, path: str, report: AnyReport, accept_new: bool
) -> tuple[Baseline, Baseline]:
    from gradscope.report.accepting import created, pruned, updated
    from gradscope.report.baseline import Baseline, read_baseline

    if action is Action.CREATE:
        return Baseline(), created(report)
    before = read_baseline(path)
    if action is Action.PRUNE:
        return before, pruned(before, report)
    return before, updated(before, report, accept_new)


def _summary(path: str, before: Baseline, after: Baseline, report: AnyReport) -> str:
    from gradscope.report.baseline import compared

    then, now = ({e.fingerprint for e in b.findings} for b in (before, after))
    left = [f for f in compared(report.findings, report.command, after).findings if not f.allowed]
    states = Counter(finding.state for finding in left)
    out = ", ".join(f"{states[s]} {s}" for s in ("new", "worsened") if states[s])
    rest = f"; not accepted: {out} (update --accept-new does)" if out else ""
    return (
        f"{path}: {plural(len(after.findings), 'accepted finding')} "
        f"(+{len(now - then)} -{len(then - now)}){rest}\n"
    )
