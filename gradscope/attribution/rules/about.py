"""Where a rule of ``explain`` looks."""

from __future__ import annotations

from collections.abc import Mapping

from gradscope.attribution.result import Explanation
from gradscope.report.model import Fact
from gradscope.report.rules import Observation
from gradscope.report.severity import Severity


def about(
    e: Explanation,
    message: str,
    recommendation: str,
    evidence: Mapping[str, Fact],
    *,
    threshold: float | None = None,
    severity: Severity | None = None,
) -> Observation:
    """An observation of one explanation, about its picture."""
    return Observation(
        e.subject, message, recommendation, evidence, threshold, severity, input=e.image
    )
