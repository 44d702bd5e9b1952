"""Rules: one function each, registered where it is defined, judged nowhere else.

A rule is a generator over what was measured. It yields an ``Observation`` for each thing it
finds; its name, code, severity and documentation are in its decorator, signature and docstring,
and everything that lists rules reads them from here. Third parties' modules of rules are found
through the entry point group ``gradscope.rules``.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from importlib import import_module
from typing import Any, ClassVar, Protocol

from gradscope.docstrings import docstring
from gradscope.errors import UsageError
from gradscope.plugins import loaded
from gradscope.report.model import Fact, Finding, NotEvaluated, Severity, fingerprint, place_in
from gradscope.text import meant, quoted


class Subject(Protocol):
    """What rules read: the measurements of one input, and which kinds of facts there are."""

    #: The command that makes it.
    command: ClassVar[str]
    #: The kinds of facts that a rule can need; the values complete "needs …".
    Needs: ClassVar[type[StrEnum]]

    @property
    def measured(self) -> Collection[str]:
        """The kinds of facts that are there."""
        ...


@dataclass(frozen=True, slots=True)
class Observation:
    """What a rule yields; the registry adds the rule's identity and makes it a Finding.

    The first number of ``evidence``, and ``affected_fraction``, are what a baseline compares: put
    what is measured against ``threshold`` first.
    """

    subject: str
    message: str
    recommendation: str
    evidence: Mapping[str, Fact] = field(default_factory=dict)
    threshold: float | None = None
    #: None takes the rule's own.
    severity: Severity | None = None
    #: Which input it is about, where the rule reads several; None takes the one being judged.
    input: str | None = None


@dataclass(frozen=True, slots=True)
class Unknown:
    """Yielded by a rule whose input is absent: it did not pass, it was not evaluated."""

    reason: str


Check = Callable[..., Iterable[Observation | Unknown]]


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule. Its thresholds are its check's keyword-only parameters."""

    code: str
    name: str
    severity: Severity
    check: Check
    #: The type that it reads, and so the command that asks it.
    reads: type[Subject]
    #: The kind of facts without which it cannot be evaluated.
    needs: StrEnum
    #: Thresholds that a configuration gives in the place of the check's own.
    given: Mapping[str, float] = field(default_factory=dict)
    #: The severity of all its findings, where a configuration gives one.
    always: Severity | None = None

    @property
    def thresholds(self) -> dict[str, Any]:
        """Name and value of each threshold."""
        parameters = inspect.signature(self.check).parameters.values()
        return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY} | {**self.given}

    @property
    def summary(self) -> str:
        """The first line of its documentation."""
        return self.documentation.split("\n", 1)[0]

    @property
    def documentation(self) -> str:
        """What it finds, why that matters, where its thresholds come from."""
        return docstring(self.check)

    def selected_by(self, pattern: str) -> bool:
        """Whether a code, a code's prefix or the name names this rule."""
        return pattern in ("ALL", self.name) or (pattern != "" and self.code.startswith(pattern))


#: Rules by code, in ascending order of code.
RULES: dict[str, Rule] = {}

#: The packages whose import registers ours. By name rather than by entry point: with a stale or
#: broken installation the latter finds no rule, and everything passes.
BUILT_IN = (
    "gradscope.weights.rules",
    "gradscope.drift.rules",
    "gradscope.fingerprints.rules",
    "gradscope.flow.rules",
    "gradscope.attribution.rules",
)


def rule(
    code: str, name: str, severity: Severity, *, reads: type[Subject], needs: StrEnum
) -> Callable[[Check], Check]:
    """Register a generator function over ``reads`` as a rule.

    Raises ValueError for a code or name that is malformed or taken, and for ``needs`` that is not
    one of ``reads.Needs``.
    """
    if not re.fullmatch(r"[A-Z]+\d+", code) or not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", name):
        raise ValueError(f"rule {code} {name}: a code looks like W101, a name like dead-units")
    if needs not in list(reads.Needs):
        known = ", ".join(repr(str(need)) for need in reads.Needs)
        raise ValueError(f"rule {code} {name} needs {needs!r}; {reads.__name__} has {known}")

    def register(check: Check) -> Check:
        for known in RULES.values():
            if known.code == code or known.name == name:
                raise ValueError(f"rule {code} {name} is already registered")
        RULES[code] = Rule(code, name, severity, check, reads, reads.Needs(needs))
        return check

    return register


def load_rules() -> Mapping[str, Rule]:
    """Every rule, built-in and of installed plugins, by code.

    Raises UsageError for a plugin that cannot be imported.
    """
    return _imported(BUILT_IN)


def _imported(packages: Iterable[str]) -> Mapping[str, Rule]:
    for package in packages:
        import_module(package)
    for _ in loaded("rules"):
        pass
    return dict(sorted(RULES.items()))


def select(
    rules: Iterable[Rule], selected: Sequence[str] = (), ignored: Sequence[str] = ()
) -> list[Rule]:
    """The rules that ``selected`` names (all if none) without those that ``ignored`` names.

    The longest prefix wins, as in ruff: ``--ignore W --select W101`` keeps W101 alone.
    Raises UsageError for a pattern that names no rule.
    """
    known = list(rules)
    for pattern in (*selected, *ignored):
        _check_pattern(pattern, known)
    return [r for r in known if _weight(r, selected or ("ALL",)) > _weight(r, ignored)]


def _weight(rule: Rule, patterns: Sequence[str]) -> int:
    matching = [p for p in patterns if rule.selected_by(p)]
    return max(
        (0 if p == "ALL" else 99 if p == rule.name else len(p) for p in matching), default=-1
    )


def _check_pattern(pattern: str, rules: Sequence[Rule]) -> None:
    if any(r.selected_by(pattern) for r in rules):
        return
    names = [r.name for r in rules] + [r.code for r in rules]
    raise UsageError(
        f"no rule is called or begins with {quoted(pattern)}{meant(pattern, names)} "
        "(see `gradscope rules`)"
    )


def select_for(
    reads: type[Subject], selected: Sequence[str] = (), ignored: Sequence[str] = ()
) -> list[Rule]:
    """The selected rules that read this type, plugins' included.

    Raises UsageError for a pattern that names no rule, and for one that names only rules which
    read something else: selecting them here would check nothing and pass.
    """
    ours = rules_of(reads)
    for pattern in (*selected, *ignored):
        if not any(r.selected_by(pattern) for r in ours):
            everything = list(load_rules().values())
            _check_pattern(pattern, everything)
            other = next(r for r in everything if r.selected_by(pattern))
            raise UsageError(
                f"{pattern!r} names a rule of `gradscope {other.reads.command}`, which `gradscope "
                f"{reads.command}` does not evaluate"
            )
    return select(ours, selected, ignored)


def rules_of(reads: type[Subject]) -> list[Rule]:
    """The rules that read this type, plugins' included.

    Ours stand in the package of what they read, and no other package's are imported: those of all
    commands, with their types, are a fifth of a short run.
    """
    beside = f"{reads.__module__.rpartition('.')[0]}.rules"
    found = _imported(package for package in BUILT_IN if package == beside)
    return [r for r in found.values() if issubclass(reads, r.reads)]


def evaluate(
    rules: Iterable[Rule], subject: Subject, input_: str
) -> Iterator[Finding | NotEvaluated]:
    """Ask each rule about a subject, which was measured of this input."""
    for r in rules:
        if r.needs not in subject.measured:
            yield NotEvaluated(rule=r.name, reason=f"needs {r.needs}, which was not measured")
            continue
        for seen in r.check(subject, **r.given):
            if isinstance(seen, Unknown):
                yield NotEvaluated(rule=r.name, reason=seen.reason)
            else:
                yield _finding(r, seen, input_)


def _finding(r: Rule, seen: Observation, input_: str) -> Finding:
    return Finding(
        rule=r.code,
        name=r.name,
        severity=r.always or seen.severity or r.severity,
        subject=seen.subject,
        input=seen.input or input_,
        message=seen.message,
        evidence=seen.evidence,
        threshold=seen.threshold,
        recommendation=seen.recommendation,
        fingerprint=fingerprint(r.code, place_in(seen.input or input_, seen.subject)),
    )
