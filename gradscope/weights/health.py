"""Health: a score that only findings lower, capped by the worst of them.

The shape of a distribution alone never makes a tensor unhealthy, so there is nothing to add up:
the worst finding sets the band, the share of the tensor it affects the place within it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from gradscope.report.model import Finding, Severity
from gradscope.weights.result import Health, Status, TensorResult
from gradscope.weights.roles import AUXILIARY, TRAINING, Role

#: The best score that a finding of each severity leaves.
CAPS = {
    Severity.CRITICAL: 20.0,
    Severity.HIGH: 55.0,
    Severity.MEDIUM: 85.0,
    Severity.LOW: 95.0,
    Severity.INFO: 100.0,
}
#: The worst: where the next band begins.
_FLOORS = {
    Severity.CRITICAL: 0.0,
    Severity.HIGH: 20.0,
    Severity.MEDIUM: 60.0,
    Severity.LOW: 85.0,
    Severity.INFO: 100.0,
}
_BANDS: tuple[tuple[float, Status], ...] = (
    (90, "excellent"), (75, "good"), (60, "fair"), (40, "poor"), (0, "critical"),
)  # fmt: skip


def health(findings: Iterable[Finding]) -> Health:
    """The health that some findings leave a tensor."""
    return _banded(min((_score(f) for f in findings), default=100.0))


def overall_health(
    tensors: Sequence[TensorResult], findings: Sequence[Finding], complete: bool
) -> Health | None:
    """The model's: the parameter-weighted mean, never better than the worst finding allows.

    What was read only in part is never excellent. None when nothing was measured.
    """
    measured = [t for t in tensors if t.health is not None]
    counted = [t for t in measured if t.role not in AUXILIARY] or [
        t for t in measured if t.role not in TRAINING | {Role.BUFFER, Role.COUNTER}
    ]
    total = sum(t.numel for t in counted)
    if not counted:
        return None
    mean = sum(t.health.score * t.numel for t in counted if t.health) / total if total else 0.0
    cap = min((CAPS[f.severity] for f in findings), default=100.0)
    return _banded(min(mean, cap, 100.0 if complete else 89.0))


def _score(finding: Finding) -> float:
    cap, floor = CAPS[finding.severity], _FLOORS[finding.severity]
    share = finding.evidence.get("affected_fraction", 0.0)
    return cap - (cap - floor) * (min(max(share, 0.0), 1.0) if isinstance(share, float) else 0.0)


def _banded(score: float) -> Health:
    rounded = round(score, 1)
    return Health(score=rounded, status=next(s for limit, s in _BANDS if rounded >= limit))
