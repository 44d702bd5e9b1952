"""Weights that something other than the optimizer wrote into."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from gradscope import analyze_flow
from gradscope.flow.joining import series
from gradscope.flow.overwritten import overwritten
from gradscope.report.model import Finding

from .made import made, noise

ADAM = {"optimizer": {"class": "AdamW", "eps": 1e-8}}


def trained(
    records: int = 120, layers: int = 4, seed: int = 0, size: int = 30
) -> tuple[np.ndarray, np.ndarray]:
    """Norms of weights and of steps, [T, L], of a random walk of vectors: a run in float64."""
    rng = np.random.default_rng(seed)
    weights = rng.normal(size=(layers, size))
    norms, made_steps = [], []
    for _ in range(records):
        step = 0.01 * rng.normal(size=(layers, size)) + 0.002 * weights
        norms.append(np.linalg.norm(weights, axis=1))
        made_steps.append(np.linalg.norm(step, axis=1))
        weights = weights + step
    return np.array(norms), np.array(made_steps)


def history(
    at: int | None = None, scale: float = 0.6, rise: float = 1.0, rows: int = 4, **fields: Any
) -> Any:
    """That run, whose weights become others at a record, and whose loss is then higher."""
    weights, steps = trained()
    loss = 0.1 * noise(120, 1, 0.1)[:, 0]
    if at is not None:
        weights[at:, :rows] *= scale
        loss[at : at + 30] *= rise
    fields = {"loss": loss, "param_l2": weights, "update_l2": steps, "meta": ADAM} | fields
    return made(noise(120, 4, 0.1), **fields)


def told(run: Any) -> list[Finding]:
    return [f for f in analyze_flow(run).findings if f.name == "overwritten-weights"]


@pytest.mark.parametrize("scale", [0.2, 0.9, 1.1, 5.0])
@pytest.mark.parametrize("at", [1, 20, 119])
def test_weights_whose_norm_changes_by_more_than_the_step_were_overwritten(
    at: int, scale: float
) -> None:
    found = overwritten(series(history(at, scale)))

    assert found is not None
    assert found.onset == (at - 1, at)
    assert found.change == pytest.approx(abs(scale - 1), abs=0.02)
    assert found.times == 1


@pytest.mark.parametrize("length", [1, 3, 100])
def test_no_step_of_the_optimizer_however_long_overwrites_weights(length: int) -> None:
    """The triangle inequality, of vectors: steps away from, toward and across the origin."""
    rng = np.random.default_rng(length)
    weights, norms, steps = rng.normal(size=(4, 30)), [], []
    for t in range(120):
        step = rng.normal(size=(4, 30)) * (length if t % 20 == 7 else 0.01)
        step = -2 * weights if t == 50 else step
        norms.append(np.linalg.norm(weights, axis=1))
        steps.append(np.linalg.norm(step, axis=1))
        weights = weights + step

    for meta in (ADAM, {"optimizer": {"class": "SGD"}}):
        run = made(noise(120, 4), param_l2=np.array(norms), update_l2=np.array(steps), meta=meta)
        assert overwritten(series(run)) is None


def test_over_a_gap_the_steps_of_adam_bound_those_between_and_those_of_descent_do_not() -> None:
    for meta, expected in ((ADAM, True), ({"optimizer": {"class": "SGD"}}, False)):
        run = history(60, 0.3, steps=np.arange(120) * 4, meta=meta)
        found = overwritten(series(run))
        assert (found is not None) is expected
        assert found is None or found.onset == (236, 240)
    far = history(60, 0.3, steps=np.arange(120) * 20)
    assert overwritten(series(far)) is None


def test_large_steps_before_a_gap_or_after_it_bound_those_inside() -> None:
    """A rate that was raised: the record that has its first step comes before the gap."""
    weights, steps = trained()
    kept = np.flatnonzero(np.arange(120) % 10 < 2)
    weights[55:] *= 3
    for at, told in ((50, False), (60, False), (40, True)):
        made_steps = np.array(steps)
        made_steps[at] = 1.0
        made_steps[1::10] = np.nan
        parts = {"param_l2": weights[kept], "update_l2": made_steps[kept]}
        run = made(noise(len(kept), 4), steps=kept, meta=ADAM, **parts)
        assert (overwritten(series(run)) is not None) is told


def test_most_of_the_weights_have_to_be_others() -> None:
    assert overwritten(series(history(60, rows=2))) is None
    found = overwritten(series(history(60, rows=3)))
    assert found is not None
    assert found.layers == ("layers.0", "layers.1", "layers.2")


@pytest.mark.parametrize("numel", [(1000, 10, 1000, 10), (10, 1000, 10, 1000), (100,) * 4])
def test_tensors_count_by_their_elements(numel: tuple[int, ...]) -> None:
    """A second initialisation of the matrices that leaves the biases."""
    weights, steps = trained()
    weights[60:, [0, 2]] *= 3
    run = made(noise(120, 4), numel=numel, param_l2=weights, update_l2=steps, meta=ADAM)

    found = overwritten(series(run))

    assert (found is not None) is (numel[0] == 1000)
    assert found is None or found.layers == ("layers.0", "layers.2")


def test_nothing_is_claimed_without_norms_of_weights_or_steps() -> None:
    for missing in ("param_l2", "update_l2"):
        assert overwritten(series(history(60, **{missing: None}))) is None
    steps = np.full((120, 4), np.nan)
    assert overwritten(series(history(60, update_l2=steps))) is None


def test_what_the_loss_does_then_decides() -> None:
    pruned, reset = history(60), history(60, rise=20.0)

    (meant,), (harmful,) = told(pruned), told(reset)

    assert (meant.severity, harmful.severity) == ("info", "medium")
    assert "between steps 59 and 60" in harmful.message
    assert "times as high after it" in harmful.message
    assert "checkpoint" in harmful.recommendation
    assert "pruning" in meant.recommendation


def test_of_several_places_the_one_that_harmed_is_told() -> None:
    run = history(60, rise=20.0)
    run.param_l2[90:] *= 0.5

    (found,) = told(run)

    assert found.evidence["step"] == 60
    assert "2 times in all" in found.message


def test_a_loss_that_stays_high_over_other_weights_is_one_finding() -> None:
    """A resume that did not restore the model: neither other data nor a rate that is too high."""
    loss = np.r_[np.geomspace(2, 0.05, 60), np.full(60, 2.2)] * noise(120, 1, 0.05)[:, 0]

    report = analyze_flow(history(60, loss=loss))

    (found,) = (f for f in report.findings if f.severity.rank >= 1)
    assert (found.name, found.severity) == ("overwritten-weights", "high")


def test_of_hundreds_of_places_the_one_with_the_rising_loss_is_told() -> None:
    weights, steps = trained(records=600)
    weights[1::2] *= 0.6
    loss = 0.1 * noise(600, 1, 0.1)[:, 0]
    loss[501:540] *= 8
    loss[[50, 51]] = np.inf

    found = overwritten(
        series(made(noise(600, 4, 0.1), loss=loss, param_l2=weights, update_l2=steps, meta=ADAM))
    )

    assert found is not None
    assert found.times > 500
    assert 500 <= found.onset[0] <= 516  # before that the reference, 32 losses, is the old level
    assert found.loss_factor == pytest.approx(8, rel=0.2)
