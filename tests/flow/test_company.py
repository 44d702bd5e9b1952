"""What else changed where something rose."""

from __future__ import annotations

import numpy as np
import pytest

from gradscope import analyze_flow
from gradscope.flow.company import company, rate_factor
from gradscope.flow.joining import series

from .made import made, noise


def jumped(factor: float, at: int = 60) -> np.ndarray:
    """The rates of 120 records, one group of which is raised for the step before ``at``."""
    rates = np.full((120, 2), 1e-3)
    rates[at - 1 :, 0] *= factor
    return rates


@pytest.mark.parametrize("factor", [0.1, 1.0, 3.0, 200.0])
def test_the_rates_factor_is_that_of_the_step_that_raised_what_is_seen(factor: float) -> None:
    found = rate_factor(series(made(noise(120, 2), lr=jumped(factor))), 60)

    assert found == pytest.approx(max(factor, 1.0))  # the greatest rate of all groups
    assert rate_factor(series(made(noise(120, 2))), 60) is None
    assert rate_factor(series(made(noise(120, 2), lr=np.zeros((120, 1)))), 60) is None


def test_norms_and_steps_are_medians_around_the_onset() -> None:
    norms, steps = np.ones((120, 3)), np.full((120, 3), 1e-3)
    norms[60:] = 5.0
    steps[62] = [0.2, 0.3, 0.4]

    found = company(series(made(norms, param_l2=np.ones((120, 3)), update_l2=steps)), 60)

    assert found["gradient_factor"] == pytest.approx(5.0)
    assert found["update_ratio"] == pytest.approx(0.3)
    assert found["learning_rate_factor"] is None
    assert found["descent"] is None


@pytest.mark.parametrize(("factor", "said"), [(200.0, True), (1.0, False)])
def test_gradients_that_explode_after_a_raised_rate_are_told_with_it(
    factor: float, said: bool
) -> None:
    """Resumed with the rate of the start: the loss ends where chance is, not far above."""
    norms = noise(120, 3, 0.05)
    norms[60:] *= 300

    report = analyze_flow(made(norms, lr=jumped(factor)))

    (found,) = (f for f in report.findings if f.name == "exploding-gradient")
    assert ("the learning rate had just been raised 200 times" in found.message) is said
    assert found.recommendation.startswith("check the schedule") is said
