"""Rules: one function each, registered where it is defined, judged nowhere else.

A rule is a generator over what was measured. It yields an ``Observation`` for each thing it
finds; its name, code, severity and documentation are in its decorator, signature and docstring,
and everything that lists rules reads them from here. Third parties' modules of rules are found
through the entry point group ``gradscope.rules``.
"""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

from gradscope.errors import UsageError
from gradscope.report.model import Fact, Finding, NotEvaluated, Severity, fingerprint


@dataclass(frozen=True, slots=True)
class Observation:
    """What a rule yields; the registry adds the rule's identity and makes it a Finding."""

    subject: str
    message: str
    recommendation: str
    evidence: Mapping[str, Fact] = field(default_factory=dict)
    threshold: float | None = None
    #: None takes the rule's own.
    severity: Severity | None = None


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
    #: What it reads: "headers" is enough, or "statistics", "spectrum", … are needed.
    needs: str

    @property
    def thresholds(self) -> dict[str, Any]:
        """Name and default of each threshold."""
        parameters = inspect.signature(self.check).parameters.values()
        return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}

    @property
    def summary(self) -> str:
        """The first line of its documentation."""
        return self.documentation.split("\n", 1)[0]

    @property
    def documentation(self) -> str:
        """What it finds, why that matters, where its thresholds come from."""
        return textwrap.dedent(inspect.getdoc(self.check) or "")

    def selected_by(self, pattern: str) -> bool:
        """Whether a code, a code's prefix or the name names this rule."""
        return pattern == self.name or pattern == "ALL" or self.code.startswith(pattern)


#: Rules by code, in ascending order of code.
RULES: dict[str, Rule] = {}

#: The packages whose import registers ours. By name rather than by entry point: with a stale or
#: broken installation the latter finds no rule, and everything passes.
BUILT_IN = ("gradscope.weights.rules", "gradscope.flow.rules", "gradscope.attribution.rules")


def rule(
    code: str, name: str, severity: Severity, needs: str = "statistics"
) -> Callable[[Check], Check]:
    """Register a generator function as a rule."""

    def register(check: Check) -> Check:
        for known in RULES.values():
            if known.code == code or known.name == name:
                raise ValueError(f"rule {code} {name} is already registered")
        RULES[code] = Rule(code, name, severity, check, needs)
        return check

    return register


def load_rules() -> Mapping[str, Rule]:
    """Every rule, built-in and of installed plugins, by code."""
    for module in BUILT_IN:
        import_module(module)
    for point in sorted(entry_points(group="gradscope.rules"), key=lambda point: point.name):
        try:
            point.load()
        except Exception as error:
            raise UsageError(f"the rules plugin {point.value} failed to load: {error}") from error
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
    close = get_close_matches(pattern, names, n=3)
    hint = f"; did you mean {', '.join(close)}?" if close else ""
    raise UsageError(f"no rule is called or begins with {pattern!r}{hint} (see `gradscope rules`)")


def evaluate(
    rules: Iterable[Rule], subject: object, measured: frozenset[str], artefact: str = ""
) -> Iterator[Finding | NotEvaluated]:
    """Ask each rule about a subject of which ``measured`` kinds of facts are known."""
    for r in rules:
        if r.needs not in measured:
            yield NotEvaluated(rule=r.name, reason=f"needs {r.needs}, which was not measured")
            continue
        for seen in r.check(subject):
            if isinstance(seen, Unknown):
                yield NotEvaluated(rule=r.name, reason=seen.reason)
            else:
                yield _finding(r, seen, artefact)


def _finding(r: Rule, seen: Observation, artefact: str) -> Finding:
    return Finding(
        rule=r.code,
        name=r.name,
        severity=seen.severity or r.severity,
        subject=seen.subject,
        message=seen.message,
        evidence=seen.evidence,
        threshold=seen.threshold,
        recommendation=seen.recommendation,
        fingerprint=fingerprint(r.code, seen.subject, artefact),
    )
