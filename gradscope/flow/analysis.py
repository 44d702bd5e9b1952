"""``analyze_flow``: a history read, measured, judged by the rules and reported."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from gradscope.errors import InputError, UsageError
from gradscope.flow.against import Run, common_steps
from gradscope.flow.against import against as compared
from gradscope.flow.excerpt import between
from gradscope.flow.joining import By, series
from gradscope.flow.limits import MIN_TREND, SHORTEST
from gradscope.flow.measured import SERIES_ROWS, analyze
from gradscope.flow.records.against import Against
from gradscope.flow.result import FlowReport, FlowResult
from gradscope.flow.temporal import WINDOW
from gradscope.histories.history import History
from gradscope.histories.open import open_history
from gradscope.report.config import ConfigLike
from gradscope.report.model import Coverage, Input, Skip
from gradscope.report.request import Failures, Request, failure, part_failures, requested
from gradscope.text import plural


def analyze_flow(
    history: str | Path | History,
    *,
    as_: Literal["norms", "vectors"] | None = None,
    by: By = "layer",
    window: int = WINDOW,
    from_step: int | None = None,
    to_step: int | None = None,
    all_series: bool = False,
    threshold: float | None = None,
    against: str | Path | History | None = None,
    select: Sequence[str] = (),
    ignore: Sequence[str] = (),
    fail_on: str | None = None,
    allow_empty: bool = False,
    config: ConfigLike = None,
    baseline: str | Path | None = None,
) -> FlowReport:
    """Diagnose a recorded training run.

    ``as_`` says what ambiguous arrays are, ``by`` whether the parameters of a module are one row,
    ``window`` how many records a windowed statistic rests on (at least 8), ``from_step`` and
    ``to_step`` (both included) which part of the run is looked at. ``threshold`` is an absolute
    limit on norms, for those who want one beside the scale-free tests. ``against`` is another run:
    what differs from it, over the steps that both have, is told and never judged. A history
    that cannot be read is an entry of ``errors``, never an exception.

    Raises UsageError for an unknown rule or severity, a window that is too short, and a file that
    does not say what it holds.
    """
    request = requested(
        FlowResult,
        select=select,
        ignore=ignore,
        fail_on=fail_on,
        allow_empty=allow_empty,
        config=config,
        baseline=baseline,
        narrowed=[
            f"{option} {step}"
            for option, step in (("--from", from_step), ("--to", to_step))
            if step is not None
        ],
    )
    if window < 8:
        raise UsageError(f"a window of {window} records says nothing; it takes at least 8")
    if by not in ("layer", "param"):
        raise UsageError(f"by is {by!r}; it is layer or param")
    try:
        read = _read(history, as_)
    except InputError as error:
        return request.report(
            FlowReport, None, inputs=(), coverage=_NOTHING, errors=[failure(error)]
        )
    part = between(read, from_step, to_step)
    result = analyze(part, by=by, window=window, all_series=all_series, threshold=threshold)
    judged, inputs, failures = request.judged(result, read.path), [read], Failures()
    coverage = _coverage(part, result)
    if against is not None:
        with failures.caught():
            other = _read(against, as_)
            inputs.append(other)
            found = _against(request, part, between(other, from_step, to_step), by, window)
            result = result.model_copy(update={"against": found})
            if found is None:
                missing_ = Skip(
                    subject=other.path, reason=f"has no step in common with {part.path}"
                )
                coverage = coverage.model_copy(update={"skipped": (*coverage.skipped, missing_)})
    return request.report(
        FlowReport,
        result,
        inputs=[Input(path=h.path, format=h.format, bytes=h.nbytes) for h in inputs],
        coverage=coverage,
        judged=[judged],
        errors=[*(e for h in inputs for e in part_failures(h.path, h.failures)), *failures],
    )


def _read(history: str | Path | History, as_: Literal["norms", "vectors"] | None) -> History:
    read = history if isinstance(history, History) else open_history(str(history), as_=as_)
    _refuse_negative(read)
    return read


def _against(
    request: Request, here: History, there: History, by: By, window: int
) -> Against | None:
    """What differs between two runs over the steps that both have; None when they share none."""
    steps = common_steps(here.steps, there.steps)
    if steps is None:
        return None

    def run(history: History) -> Run:
        result = analyze(history, by=by, window=window)
        findings = request.judged(result, history.path).findings
        return Run(history.path, series(history, by), result, findings)

    with np.errstate(all="ignore"):
        return compared(run(between(here, *steps)), run(between(there, *steps)), window)


def _refuse_negative(history: History) -> None:
    """Raise InputError for norms below zero: something else is in the file."""
    for name in ("l2", "max_abs", "param_l2", "update_l2"):
        values = getattr(history, name)
        if values is not None and values.size and bool((values < 0).any()):
            record, row = np.argwhere(values < 0)[0]
            where = f"{history.layers[row].name} at step {history.steps[record]}"
            message = f"{name} of {where} is {values[record, row]:g}: a norm is never negative"
            raise InputError(history.path, "malformed", message)


_NOTHING = Coverage(analyzed=0, total=0, unit="layers", bytes=0)


def _coverage(history: History, result: FlowResult) -> Coverage:
    skipped = [Skip(subject=s, reason=why) for s, why in history.skipped_parts]
    skipped += [
        Skip(subject=m.layer_name, reason=_MISSING[m.state])
        for m in result.missing
        if m.state != "partly"
    ]
    if result.rows_omitted:
        reason = f"only the last {SERIES_ROWS:,} rows are in the report; --series all has every one"
        skipped.append(Skip(subject=f"{result.rows_omitted:,} rows of the series", reason=reason))
    if not result.layers and history.loss is not None:
        return _of_losses(history, result.loss is not None)
    if few := _too_few(result):
        skipped.append(few)
    recorded = few is None and any(layer.records for layer in result.layers)
    absent = sum(m.state != "partly" for m in result.missing)
    return Coverage(
        analyzed=len(result.layers) - absent if recorded else 0,
        total=len(result.layers),
        unit="layers",
        bytes=history.nbytes,
        skipped=tuple(skipped),
    )


def _of_losses(history: History, judged: bool) -> Coverage:
    """Of a run that logged no gradients the loss is all there is."""
    assert history.loss is not None
    known = int((~np.isnan(history.loss)).sum())
    few = Skip(
        subject=f"{known:,} loss{'es' * (known != 1)}",
        reason=f"a loss is judged from {MIN_TREND} on",
    )
    return Coverage(
        analyzed=known if judged else 0,
        total=len(history.steps),
        unit="losses",
        bytes=history.nbytes,
        skipped=() if judged else (few,),
    )


def _too_few(result: FlowResult) -> Skip | None:
    """Why a history is too short to pass: no test but that for NaN and Inf can have fired."""
    counted = result.steps - result.skipped_steps
    if counted >= SHORTEST or result.nonfinite:
        return None
    skipped = f", mixed precision skipped {result.skipped_steps}" if result.skipped_steps else ""
    reason = f"a run is judged from {SHORTEST} records on{skipped}"
    return Skip(subject=plural(result.steps, "record"), reason=reason)


_MISSING = {
    "unused": "its gradient was None at every record",
    "frozen": "requires no gradient",
    "not-recorded": "no record of it in this part of the history",
}
