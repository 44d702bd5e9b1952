"""Words that several rules have for one tensor."""

from __future__ import annotations

from gradscope.drift.result import TensorDrift


def moved(tensor: TensorDrift) -> float:
    """How far, as a share of its norm."""
    return tensor.relative_drift or 0.0


def what(tensor: TensorDrift) -> str:
    """What became of it, in words."""
    if tensor.explanation is not None:
        return tensor.explanation.text
    if tensor.relative_drift is not None:
        return f"moved by {tensor.relative_drift:.3g} of its norm"
    return f"is {tensor.status}"
