"""Reports made by hand, for what only looks at findings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from gradscope.report.gate import gate
from gradscope.report.model import AnyReport, Coverage, Finding, Input, NotEvaluated, Report
from gradscope.report.model import fingerprint as fingerprint_of
from gradscope.report.severity import Severity


def finding(severity: str = "high", subject: str = "fc.weight", **changed: Any) -> Finding:
    rule = changed.get("rule", "W105")
    plain = {
        "rule": rule, "name": "dead-units", "severity": Severity(severity), "subject": subject,
        "input": "runs/m.safetensors", "message": "5 of 10 rows are dead",
        "evidence": {"dead_rows": 5, "affected_fraction": 0.5}, "threshold": 0.3,
        "recommendation": "prune them", "fingerprint": fingerprint_of(rule, subject),
    }  # fmt: skip
    return Finding(**(plain | changed))


def report(*findings: Finding, **changed: Any) -> AnyReport:
    coverage = Coverage(
        analyzed=changed.pop("analyzed", 3), total=3, unit="tensors", bytes=1000,
        rules=("dead-units", "non-finite", "skewed"),
        not_evaluated=(NotEvaluated(rule="skewed", reason="needs statistics"),),
    )  # fmt: skip
    errors = changed.get("errors", ())
    options = {k: changed.pop(k) for k in ("fail_on", "notes") if k in changed}
    plain = {
        "command": "weights",
        "inputs": (Input(path="runs/m.safetensors", format="safetensors", bytes=1200),),
        "coverage": coverage, "findings": findings, "result": None,
        "gate": gate(findings, errors, coverage, **options),
    }  # fmt: skip
    return Report[Any](**(plain | changed))


@pytest.fixture(name="finding")
def _finding() -> Callable[..., Finding]:
    return finding


@pytest.fixture(name="report_of")
def _report_of() -> Callable[..., AnyReport]:
    return report
