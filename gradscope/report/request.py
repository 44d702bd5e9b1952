"""One analysis as it was asked for, and how it ends: the same for every command.

``requested`` checks the request before any work. The wing measures; ``Request.judged`` asks the
rules about one input; ``Request.report`` sorts, counts, decides the gate and seals the envelope.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any, Protocol, TypeVar

from gradscope.errors import InputError, UsageError
from gradscope.report.allowances import allowed, remarks
from gradscope.report.baseline import (
    Baseline,
    Compared,
    compared,
    evaluated,
    partial_run,
    read_baseline,
    stale,
    stale_remark,
)
from gradscope.report.config import Allowance, Config, ConfigLike, configured, given_config
from gradscope.report.gate import gate
from gradscope.report.model import (
    Coverage,
    Finding,
    Input,
    InputFailure,
    NotEvaluated,
    Report,
    fingerprint,
    place_in,
)
from gradscope.report.rules import Rule, Subject, evaluate, load_rules, rules_of, select_for
from gradscope.report.severity import Severity

R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class Judged:
    """What the rules say of one input."""

    findings: tuple[Finding, ...] = ()
    not_evaluated: tuple[NotEvaluated, ...] = ()


@dataclass(frozen=True, slots=True)
class Request:
    """Which rules are asked, what is accepted, and when the run fails."""

    command: str
    rules: tuple[Rule, ...] = ()
    fail_on: str = "high"
    allow_empty: bool = False
    allowances: tuple[Allowance, ...] = ()
    baseline: Baseline = field(default_factory=Baseline)
    #: Where the baseline lies.
    accepted_in: str = ""
    #: The options by which only a part is looked at.
    narrowed: tuple[str, ...] = ()

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
        given = tuple(inputs)
        absent = dict.fromkeys(n for j in judged for n in j.not_evaluated)
        facts = {
            "rules": tuple(r.name for r in self.rules),
            "narrowed": self.narrowed,
            "not_evaluated": tuple(absent),
        }
        coverage = coverage.model_copy(update=facts)
        found = _told_apart(f for j in judged for f in j.findings)
        found.sort(key=lambda f: -f.severity.rank)
        today = date.today()
        known = compared(allowed(found, self.allowances, today), self.command, self.baseline)
        # What is known stands behind what is not, which formats that show only so many begin with.
        ranked = tuple(sorted(known.findings, key=lambda f: f.state == "unchanged"))
        whole = not partial_run(self.command, given, coverage, errors, self.baseline)
        return kind(
            command=self.command,
            inputs=given,
            coverage=coverage,
            findings=ranked,
            result=result,
            gate=gate(
                ranked,
                errors,
                coverage,
                fail_on=self.fail_on,
                allow_empty=self.allow_empty,
                notes=tuple(self._notes(known, coverage, whole, today)),
            ),
            errors=tuple(errors),
        )

    def _notes(
        self, known: Compared, coverage: Coverage, whole: bool, today: date
    ) -> Iterator[str]:
        asked = evaluated(coverage)
        rules = [r for r in self.rules if r.name in asked]
        yield from remarks(known.findings, self.allowances, rules, whole, today)
        if whole:
            yield from stale_remark(stale(known.gone, coverage), self.accepted_in)


def requested(
    reads: type[Subject],
    *,
    select: Sequence[str] = (),
    ignore: Sequence[str] = (),
    fail_on: str | None = None,
    allow_empty: bool = False,
    config: ConfigLike = None,
    baseline: str | Path | None = None,
    narrowed: Sequence[str] = (),
) -> Request:
    """The request of a command whose rules read ``reads``.

    ``config`` is a configuration or its file, over which ``select``, ``fail_on`` and ``baseline``
    win, and to which ``ignore`` adds. ``baseline`` is the file of accepted findings.

    Raises UsageError for an unknown severity or rule, for a selection that leaves no rule, and for
    a configuration or baseline that cannot be read.
    """
    if fail_on not in (None, *Severity, "never"):
        raise UsageError(f"fail_on is {fail_on!r}; it is one of {', '.join(Severity)} or never")
    settings = given_config(config)
    path = baseline or settings.baseline
    return Request(
        command=reads.command,
        rules=tuple(_asked(reads, select, ignore, settings)),
        fail_on=fail_on or settings.fail_on,
        allow_empty=allow_empty or settings.allow_empty,
        allowances=settings.allow,
        baseline=read_baseline(path) if path else Baseline(),
        accepted_in=str(path or ""),
        narrowed=tuple(narrowed),
    )


def _asked(
    reads: type[Subject], selected: Sequence[str], ignored: Sequence[str], config: Config
) -> list[Rule]:
    """The rules that a request and its configuration leave.

    A configuration is of all commands: what it says of other commands' rules is passed over, and
    a selection of those alone selects nothing here.
    """
    ours = rules_of(reads)

    def of_ours(patterns: Sequence[str]) -> list[str]:
        return [p for p in patterns if any(r.selected_by(p) for r in ours)]

    left = select_for(
        reads, selected or of_ours(config.select), (*ignored, *of_ours(config.ignore))
    )
    if ours and not left:
        raise UsageError(f"no rule of `gradscope {reads.command}` is left: nothing could fail")
    codes = {r.code for r in left}
    known = load_rules().values() if config.rules else ours
    return [r for r in configured(known, config) if r.code in codes]


class Failures(list[InputFailure]):
    """The inputs, or parts of one, that could not be read."""

    @contextmanager
    def caught(self) -> Iterator[None]:
        """Keep an InputError of this block as a failure and go on behind it."""
        try:
            yield
        except InputError as error:
            self.append(failure(error))


class Told(Protocol):
    """Why a part of an input could not be read."""

    @property
    def kind(self) -> str:
        """One of the kinds of ``errors``."""
        ...

    @property
    def message(self) -> str:
        """What and why."""
        ...


def part_failures(input_: str, told: Iterable[Told]) -> Iterator[InputFailure]:
    """Why parts of an input could not be read, as the report shows it."""
    for part in told:
        yield InputFailure(input=input_, kind=part.kind, message=part.message)


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
    place = place_in(finding.input, finding.subject)
    changed: dict[str, Any] = {"fingerprint": fingerprint(finding.rule, place, name)}
    return finding.model_copy(update=changed)
