"""One analysis as it was asked for, and how it ends: the same for every command.

``requested`` checks the request before any work. The wing measures; ``Request.judged`` asks the
rules about one input; ``Request.report`` sorts, counts, decides the gate and seals the envelope.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from gradscope.errors import InputError, UsageError
from gradscope.report.gate import gate
from gradscope.report.model import (
    Coverage,
    Finding,
    Input,
    InputFailure,
    NotEvaluated,
    Report,
    fingerprint,
)
from gradscope.report.rules import Rule, Subject, evaluate, select_for
from gradscope.report.severity import Severity

R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class Judged:
    """What the rules say of one input."""

    findings: tuple[Finding, ...] = ()
    not_evaluated: tuple[NotEvaluated, ...] = ()


@dataclass(frozen=True, slots=True)
class Request:
    """Which rules are asked, and when the run fails."""

    command: str
    rules: tuple[Rule, ...] = ()
    fail_on: str = "high"
    allow_empty: bool = False

    def judged(self, subject: Subject, input_: str) -> Judged:
        """Ask the rules about what was measured of one input, named as it was given."""
        said = list(evaluate(self.rules, subject, input_))
        return Judged(
            tuple(f for f in said if isinstance(f, Finding)),
            tuple(n for n in said if isinstance(n, NotEvaluated)),
        )

    def report(
        self,
        kind: type[Report[R]],
        result: R | None,
        *,
        inputs: Iterable[Input],
        coverage: Coverage,
        judged: Sequence[Judged] = (),
        errors: Sequence[InputFailure] = (),
    ) -> Report[R]:
        """The report: findings worst first, what was not evaluated once, the gate's decision."""
        findings = _told_apart(f for j in judged for f in j.findings)
        findings.sort(key=lambda f: -f.severity.rank)
        absent = dict.fromkeys(n for j in judged for n in j.not_evaluated)
        asked = tuple(r.name for r in self.rules)
        coverage = coverage.model_copy(update={"rules": asked, "not_evaluated": tuple(absent)})
        return kind(
            command=self.command,
            inputs=tuple(inputs),
            coverage=coverage,
            findings=tuple(findings),
            result=result,
            gate=gate(
                findings, errors, coverage, fail_on=self.fail_on, allow_empty=self.allow_empty
            ),
            errors=tuple(errors),
        )


def requested(
    reads: type[Subject],
    *,
    select: Sequence[str] = (),
    ignore: Sequence[str] = (),
    fail_on: str = "high",
    allow_empty: bool = False,
) -> Request:
    """The request of a command whose rules read ``reads``.

    Raises UsageError for an unknown severity or rule.
    """
    if fail_on not in (*Severity, "never"):
        raise UsageError(f"fail_on is {fail_on!r}; it is one of {', '.join(Severity)} or never")
    return Request(reads.command, tuple(select_for(reads, select, ignore)), fail_on, allow_empty)


class Failures(list[InputFailure]):
    """The inputs, or parts of one, that could not be read."""

    @contextmanager
    def caught(self) -> Iterator[None]:
        """Keep an InputError of this block as a failure and go on behind it."""
        try:
            yield
        except InputError as error:
            self.append(failure(error))


def failure(error: InputError) -> InputFailure:
    """An error as the report shows it."""
    return InputFailure(input=error.path, kind=error.kind, message=error.message)


def _told_apart(findings: Iterable[Finding]) -> list[Finding]:
    """Findings whose fingerprints also name the input where several share rule and subject.

    One of a single input keeps the same fingerprint whatever else was looked at in the run.
    """
    found = list(findings)
    inputs: dict[str, set[str]] = defaultdict(set)
    for finding in found:
        inputs[finding.fingerprint].add(finding.input)
    return [
        f if len(inputs[f.fingerprint]) == 1 else _of_input(f, inputs[f.fingerprint]) for f in found
    ]


def _of_input(finding: Finding, inputs: set[str]) -> Finding:
    """Named by the file's name where that is enough, for folders differ between machines."""
    names = {Path(path).name for path in inputs}
    name = Path(finding.input).name if len(names) == len(inputs) else finding.input
    changed: dict[str, Any] = {"fingerprint": fingerprint(finding.rule, finding.subject, name)}
    return finding.model_copy(update=changed)
