"""Findings among the runs of experiment trackers: TensorBoard's event files, W&B's offline runs.

A tracker is a function of a report and a folder, which it adds a run to; nothing leaves the
machine. Its library comes with the extra that bears its name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING

from gradscope.errors import OutputError, UsageError
from gradscope.report.formats import TRACKERS, renderer
from gradscope.report.severity import Severity
from gradscope.text import escaped

if TYPE_CHECKING:  # pydantic, which the command line is not to wait for
    from gradscope.report.model import AnyReport

Tracker = Callable[["AnyReport", Path], None]

#: How checkpoints name the step that they are of.
_STEP = re.compile(r"(?:step|checkpoint|ckpt|iter)[-_=]?(\d{1,18})")
_COLUMNS = ("severity", "rule", "name", "subject", "input", "message", "recommendation", "state")


def tracker(name: str) -> Tracker:
    """The function of a tracker; it raises OutputError where it cannot write.

    Raises UsageError where its library is not installed.
    """
    library = TRACKERS[name]
    if find_spec(library) is None:
        raise UsageError(f"{name} needs {library}: pip install 'gradscope-diagnostics[{name}]'")
    log = {"tensorboard": tensorboard, "wandb": wandb}[name]

    def logged(report: AnyReport, folder: Path) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            # W&B would go elsewhere without a word that stays.
            with TemporaryFile(dir=folder):
                pass
            log(report, folder)
        except OSError as error:
            raise OutputError(folder, error.strerror or str(error)) from error

    return logged


def numbers(report: AnyReport) -> Iterator[tuple[str, float]]:
    """What is drawn over the steps: findings by severity, what was analysed, health, the gate."""
    found = [f.severity for f in report.findings]
    for severity in reversed(Severity):
        yield f"findings/{severity}", found.count(severity)
    yield "failed", int(report.gate.failed)
    if report.coverage.total:
        yield "analysed", report.coverage.analyzed / report.coverage.total
    if (health := getattr(report.result, "health", None)) is not None:
        yield "health", health.score


def step(report: AnyReport) -> int:
    """The step of the first input whose path tells one (``checkpoint-500``), else 0."""
    told = (_STEP.findall(given.path) for given in report.inputs)
    return next((int(steps[-1]) for steps in told if steps), 0)


def tensorboard(report: AnyReport, folder: Path) -> None:
    """An event file: curves of the numbers, and the report as text."""
    from tensorboardX import SummaryWriter

    at = step(report)
    with SummaryWriter(str(folder)) as writer:
        for name, value in numbers(report):
            writer.add_scalar(f"gradscope/{report.command}/{name}", value, at)
        writer.add_text(f"gradscope/{report.command}", renderer("markdown")(report), at)


def wandb(report: AnyReport, folder: Path) -> None:
    """An offline run, for ``wandb sync``: numbers, a table of findings, the JSON as artifact."""
    import wandb as library

    at, home = step(report), f"gradscope/{report.command}"
    rows = [[escaped(str(getattr(f, c))) for c in _COLUMNS] for f in report.findings]
    with library.init(
        project="gradscope",
        job_type=report.command,
        dir=str(folder),
        mode="offline",
        config={"inputs": [escaped(given.path) for given in report.inputs]},
        settings=library.Settings(console="off", silent=True, disable_git=True, save_code=False),
    ) as run:
        run.log({f"{home}/{name}": value for name, value in numbers(report)}, step=at)
        run.log({f"{home}/table": library.Table(list(_COLUMNS), rows)}, step=at)
        saved = library.Artifact(f"gradscope-{report.command}", "report")
        with saved.new_file("report.json") as file:
            file.write(renderer("json")(report))
        run.log_artifact(saved)
    library.teardown()  # its process has written all of the run, whatever becomes of this one
