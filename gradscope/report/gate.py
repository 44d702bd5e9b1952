"""The gate: from findings, failures and coverage to an exit code with reasons."""

from __future__ import annotations

from collections.abc import Sequence

from gradscope.report.model import Coverage, Finding, Gate, InputFailure, Severity


def gate(
    findings: Sequence[Finding],
    errors: Sequence[InputFailure],
    coverage: Coverage,
    *,
    fail_on: str = "high",
    allow_empty: bool = False,
    notes: Sequence[str] = (),
) -> Gate:
    """Decide the exit code.

    An unreadable input outranks an empty run, and that outranks findings, so that a broken scan
    never looks like a pass or like an ordinary finding.
    """
    failing = [f for f in findings if fails(f, fail_on)]
    empty = coverage.analyzed == 0
    reasons = [f"{e.input}: {e.message}" for e in errors]
    if empty and not errors:
        reasons.append(f"nothing was analysed: 0 of {coverage.total} {coverage.unit}")
    if failing:
        reasons.append(f"{len(failing)} finding{'s' * (len(failing) > 1)} at or above {fail_on}")
    code = 3 if errors else 4 if empty and not allow_empty else 1 if failing else 0
    return Gate(
        fail_on=fail_on,
        failed=code != 0,
        exit_code=code,
        reasons=tuple(reasons),
        notes=tuple(notes),
    )


def fails(finding: Finding, fail_on: str) -> bool:
    """Whether a finding fails the gate by itself: as severe as that, and not known."""
    if fail_on == "never" or finding.state == "unchanged":
        return False
    return finding.severity.rank >= Severity(fail_on).rank
