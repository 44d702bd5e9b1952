"""What opposed gradients say about the learning rate, and when gradients add up."""

from __future__ import annotations

import math
from collections.abc import Sequence

from gradscope.flow.records.optimizer import Accumulation, Captures
from gradscope.flow.records.steps import LearningRateAdvice, Oscillation

#: Nearer to -1 than this the closed form of gradient descent on a quadratic holds.
_NEARLY_OPPOSED = -0.9


def learning_rate(
    found: Sequence[Oscillation],
    plain_descent: bool,
    current: float | None,
    *,
    opposed: float,
) -> LearningRateAdvice | None:
    """What the last oscillation says about the learning rate; None when it says nothing.

    For plain gradient descent on a quadratic g' = (1 - eta h) g: opposed gradients that grow by
    e^gamma a step have eta h = 1 + e^gamma, so dividing the rate by that reaches eta h = 1, where
    the sharpest direction is solved in one step. With momentum, Adam or noise only the sign holds.
    """
    for last in reversed(found):
        if last.cosine is not None and last.growth_per_step is not None:
            break
    else:
        return None
    if last.cosine > opposed:
        return None
    exact = plain_descent and last.cosine < _NEARLY_OPPOSED
    factor = 1 + math.exp(last.growth_per_step) if exact else None
    return LearningRateAdvice(
        divide_by=factor,
        current=current,
        suggested=current / factor if current is not None and factor else None,
        growth_per_step=last.growth_per_step,
        cosine=last.cosine,
        why=_why(factor, last.growth_per_step),
    )


def _why(factor: float | None, growth: float) -> str:
    if factor is None:
        return (
            "steps overshoot; with momentum, an adaptive optimizer or noisy batches no "
            "factor follows"
        )
    state = "diverges" if growth > 0 else "still converges"
    return (
        f"plain gradient descent at {factor:.3g} times the rate that would not overshoot; "
        f"it {state}"
    )


def adds_up(
    found: Accumulation | None,
    counted: Captures | None,
    *,
    unfinished: float,
    cosine: float,
    growth: float,
    added: float,
    steady: float,
    doubled: float,
) -> bool:
    """Whether gradients carry over from record to record, by the limits of F115."""
    if captured_unfinished(counted, unfinished):
        return True
    if found is None or found.cosine <= cosine or found.growth <= growth:
        return False
    adds = found.added_growth is not None and found.added_growth < steady
    adds |= found.doubled is not None and found.doubled > doubled
    return 1 / added < found.added < added and adds


def captured_unfinished(counted: Captures | None, unfinished: float) -> bool:
    """Whether records are of gradients that still added up over micro-batches."""
    if counted is None:
        return False
    return counted.calls * (1 - counted.skipped) > unfinished * max(counted.steps, 1)
