"""The allow-list: findings that are known and meant, with a reason and perhaps an end."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from datetime import date
from fnmatch import fnmatchcase

from gradscope.report.config import Allowance
from gradscope.report.model import Finding
from gradscope.report.rules import Rule
from gradscope.text import escaped, plural, quoted


def allowed(
    findings: Iterable[Finding], allowances: Sequence[Allowance], today: date
) -> list[Finding]:
    """The findings, those that an allowance covers unchanged and with its reason."""
    valid = [a for a in allowances if not expired(a, today)]
    return [_with_reason(f, next((a for a in valid if covers(a, f)), None)) for f in findings]


def _with_reason(finding: Finding, allowance: Allowance | None) -> Finding:
    if allowance is None:
        return finding
    return finding.model_copy(update={"state": "unchanged", "allowed": allowance.reason})


def covers(allowance: Allowance, finding: Finding) -> bool:
    """Whether a finding is one of those that are allowed."""
    return any(
        p in ("ALL", finding.name) or finding.rule.startswith(p) for p in allowance.rules
    ) and any(p == finding.subject or fnmatchcase(finding.subject, p) for p in allowance.subjects)


def expired(allowance: Allowance, today: date) -> bool:
    """Whether its findings count again."""
    return allowance.expires is not None and allowance.expires <= today


def remarks(
    findings: Sequence[Finding],
    allowances: Iterable[Allowance],
    rules: Sequence[Rule],
    whole: bool,
    today: date,
) -> Iterator[str]:
    """What is to be said of allowances: those that expired and, of a whole run, those in vain."""
    for allowance in allowances:
        covered = sum(covers(allowance, f) for f in findings)
        asked = any(r.selected_by(p) for r in rules for p in allowance.rules)
        what = (
            f"the allowance of {', '.join(allowance.rules)} for "
            f"{', '.join(map(quoted, allowance.subjects))} ({escaped(allowance.reason)})"
        )
        if covered and expired(allowance, today):
            again = f"{plural(covered, 'finding')} count{'s' * (covered == 1)} again"
            yield f"{what} expired on {allowance.expires}: {again}"
        elif not covered and asked and whole:
            yield f"{what} covers no finding of this run"
