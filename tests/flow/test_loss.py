"""The level of the loss: what is lost for good, what comes back, and what a GAN's loss does."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from gradscope import analyze_flow
from gradscope.flow.joining import series
from gradscope.flow.loss import loss_level
from gradscope.flow.records.loss import Divergence, LossLevel
from gradscope.report.model import Finding

from .made import made, noise


def level(loss: Any, **fields: Any) -> LossLevel | None:
    loss = np.asarray(loss, dtype=np.float64)
    return loss_level(series(made(noise(len(loss), 2), loss=loss, **fields)))


def divergence(loss: Any, **fields: Any) -> Divergence | None:
    found = level(loss, **fields)
    assert found is not None
    return found.divergence


def diverged(loss: Any, **fields: Any) -> list[Finding]:
    loss = np.asarray(loss, dtype=np.float64)
    norms = fields.pop("norms", noise(len(loss), 2, 0.05))
    report = analyze_flow(made(norms, loss=loss, **fields))
    return [f for f in report.findings if f.name == "diverged"]


def falling(records: int, first: float = 2.3, last: float = 0.1, seed: int = 0) -> np.ndarray:
    """A loss that falls as losses do, with the noise of batches."""
    curve = last + (first - last) * np.exp(-np.linspace(0, 5, records))
    return curve * noise(records, 1, 0.1, seed)[:, 0]


# --- for good -------------------------------------------------------------------------------------


@pytest.mark.parametrize("records", [40, 200, 2000])
@pytest.mark.parametrize("factor", [5.0, 15.0, 1000.0])
def test_a_loss_that_jumps_and_stays_is_high_with_the_step_of_its_onset(
    records: int, factor: float
) -> None:
    loss = falling(2 * records)
    loss[records:] = loss[records - 1] * factor * noise(records, 1, 0.1, 1)[:, 0]

    (found,) = diverged(loss)

    assert found.severity == "high"
    assert f"since step {records}" in found.message
    assert found.recommendation.startswith(f"go back to a checkpoint of step {records - 1} or")


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_the_scale_of_the_loss_does_not_matter(scale: float) -> None:
    loss = np.r_[falling(100), np.full(100, 5.0)] * scale

    assert [f.severity for f in diverged(loss)] == ["high"]
    assert diverged(falling(200) * scale) == []


def test_a_loss_below_zero_is_judged_by_what_it_had_gained() -> None:
    healthy = -falling(200)[::-1]
    lost = np.r_[healthy, np.full(60, healthy[0] + 5.0) + noise(60, 1, 0.1)[:, 0] * 0.01]

    assert divergence(healthy) is None
    assert divergence(lost) is not None


@pytest.mark.parametrize("seed", range(8))
def test_noise_on_a_plateau_is_no_rise(seed: int) -> None:
    rng = np.random.default_rng(seed)

    assert divergence(2.3 + 0.1 * rng.normal(size=300)) is None
    assert divergence(rng.normal(size=300)) is None
    assert divergence(np.exp(rng.normal(size=300))) is None


def test_a_tiny_loss_that_ends_fifteen_times_higher_has_lost_nothing_of_what_it_gained() -> None:
    loss = np.r_[np.geomspace(2.3, 1e-3, 150), np.full(50, 15e-3)]

    assert divergence(loss) is None


# --- and back -------------------------------------------------------------------------------------


def test_an_excursion_that_comes_back_is_medium_and_one_that_ends_where_it_began_high() -> None:
    hill = np.r_[np.full(40, 60.0), np.geomspace(60, 1, 40)]
    back = np.r_[falling(100, last=0.5), hill, np.full(60, 0.4)]
    no_better = np.r_[np.full(20, 2.3), hill, np.full(60, 2.3)]

    assert [f.severity for f in diverged(back)] == ["medium"]
    (found,) = diverged(
        no_better, norms=np.where(no_better > 5, 9.0, 1.0)[:, None] * np.ones((1, 2))
    )
    assert found.severity == "high"
    assert "no better than it began" in found.message


# --- non-finite -----------------------------------------------------------------------------------


def test_a_loss_that_ends_nan_under_finite_gradients_is_critical() -> None:
    (found,) = diverged(np.r_[falling(80), np.full(20, np.nan)])

    assert found.severity == "critical"
    assert "not finite since step 80" in found.message


def test_records_without_a_loss_do_not_end_it() -> None:
    loss = np.full(100, np.nan)
    loss[::10] = falling(10)

    assert level(loss).lost is None
    assert diverged(loss) == []


def test_a_loss_that_rises_and_ends_infinite_is_critical() -> None:
    loss = np.r_[falling(80), np.geomspace(1, 1e30, 30), np.full(10, np.inf)]

    (found,) = diverged(loss)

    assert (found.severity, found.evidence["ends"]) == ("critical", "non-finite")


# --- company --------------------------------------------------------------------------------------


def risen(factor: float = 4.0) -> np.ndarray:
    """A loss that never fell."""
    return np.r_[np.full(60, 0.7), np.full(140, 0.7 * factor)] * noise(200, 1, 0.02)[:, 0]


def test_the_loss_of_a_generator_may_rise() -> None:
    assert diverged(risen(4.0)) == []
    assert [f.severity for f in diverged(risen(12.0))] == ["medium"]


def test_a_rate_that_was_raised_just_before_is_named() -> None:
    rates = np.where(np.arange(200) < 59, 1e-3, 0.1)[:, None]

    (found,) = diverged(risen(), lr=rates)

    assert found.severity == "high"
    assert "the learning rate had just been raised 100 times" in found.message
    assert "schedule" in found.recommendation


def test_steps_up_the_gradient_are_named() -> None:
    (found,) = diverged(risen(), update_cosine=np.full((200, 2), -1.0))

    assert "steps go up the gradient" in found.message
    assert "sign" in found.recommendation


def test_gradients_that_go_with_the_loss_are_told_with_it() -> None:
    norms = noise(200, 2, 0.05)
    norms[60:] *= 6

    report = analyze_flow(made(norms, loss=risen()))

    assert [f.name for f in report.findings] == ["diverged"]
    assert "gradients went with it in layers.0, layers.1" in report.findings[0].message


def test_what_explodes_for_good_is_told_as_well() -> None:
    norms = noise(200, 2, 0.05)
    norms[60:] *= 500

    report = analyze_flow(made(norms, loss=risen()))

    assert {f.name for f in report.findings} == {"diverged", "exploding-gradient"}


def test_a_history_of_few_losses_is_not_judged() -> None:
    assert level(np.ones(7)) is None
    assert level(np.full(60, np.nan)) is None
    assert level([3.0, 1.03217] + [0.5] * 20).constant == 0.5


# --- what came first ------------------------------------------------------------------------------


def rising(records: int, at: int, seed: int, level: float = 1.0) -> np.ndarray:
    """Noise around a level, thirty times as high from some record on."""
    values = noise(records, 1, 0.1, seed, level)[:, 0]
    values[at:] *= 30
    return values


def in_turn(updates: int, gradients: int, loss: int) -> dict[str, Any]:
    """A history of one layer whose steps, gradients and loss rise at these records."""
    return {
        "loss": rising(160, loss, 1, 0.5),
        "norms": rising(160, gradients, 2)[:, None],
        "update_l2": rising(160, updates, 3, 1e-3)[:, None],
        "param_l2": np.ones((160, 1)),
    }


@pytest.mark.parametrize(
    ("at", "said"),
    [
        ((100, 104, 110), "out of range first: updates since step 100, then gradients since step"),
        ((110, 110, 104), "out of range first: loss since step 104, then updates since step 110, "),
    ],
)
def test_what_left_its_range_first_is_told(at: tuple[int, int, int], said: str) -> None:
    (found,) = diverged(**in_turn(*at))

    assert said in found.message
    assert f"go back to a checkpoint of step {min(at) - 1} or" in found.recommendation


def test_no_order_is_told_of_what_rose_between_the_same_two_records() -> None:
    (together,) = diverged(**in_turn(104, 104, 104))
    parts = in_turn(100, 104, 110)
    parts["update_l2"][96:110] = np.nan  # may have risen before the gradients, or after
    (unknown,) = diverged(**parts)

    assert "out of range first" not in together.message
    assert "out of range first" not in unknown.message
    assert unknown.evidence["precursors"] == "gradients 104, updates 110, loss 110"


# --- other data -----------------------------------------------------------------------------------


def stage(kind: str, records: int = 300, gap: int = 1, seed: int = 0) -> dict[str, Any]:
    """A run whose loss jumps halfway: by other data, or by steps that were too large before."""
    rng, at = np.random.default_rng(seed), records // 2
    harder = falling(records - at, 6.0, 0.05, seed + 1)
    then = harder if kind == "stage" else 2.3 * noise(records - at, 1, 0.05, seed + 2)[:, 0]
    loss = np.concatenate([falling(at, 2.3, 0.05, seed), then])
    loss[at] = 9.0
    updates = 1e-3 * np.exp(rng.normal(0, 0.2, (records, 2)))
    weights = 10 * np.exp(np.cumsum(rng.normal(0, 1e-4, (records, 2)), axis=0))
    if kind == "steps":
        updates[at - 1] *= 300
        weights[at:] *= 1.3
    if kind == "weights":  # loaded anew, or decayed: no step tells
        weights[at:] *= 0.2
    return {
        "loss": loss, "norms": noise(records, 2, 0.1, seed), "steps": np.arange(records) * gap,
        "update_l2": updates * weights, "param_l2": weights,
    }  # fmt: skip


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("gap", [1, 10, 50])
def test_a_loss_that_jumps_under_weights_that_did_not_is_that_of_other_data(
    gap: int, seed: int
) -> None:
    (found,) = diverged(**stage("labels", gap=gap, seed=seed))

    assert found.severity == "high"
    assert "steps and weights were as usual before" in found.message
    assert found.recommendation.startswith(f"look at what begins at step {150 * gap}: other data")
    assert "learning rate" not in found.recommendation


def test_steps_that_were_large_before_the_loss_rose_are_not_the_datas() -> None:
    (found,) = diverged(**stage("steps"))

    assert found.severity == "high"
    assert "as usual" not in found.message
    assert "learning rate" in found.recommendation


def test_where_steps_are_recorded_now_and_then_the_weights_tell() -> None:
    """A recorder with ``every=10`` leaves out the steps between two pairs of records."""
    for kind, told in (("labels", True), ("steps", False)):
        run = stage(kind)
        kept = np.flatnonzero((run["steps"] % 10 == 0) | (run["steps"] % 10 == 1))
        run = {name: np.array(values[kept]) for name, values in run.items()}
        run["update_l2"][run["steps"] % 10 == 1] = np.nan

        (found,) = diverged(**run)

        assert ("as usual" in found.message) is told


def test_a_rate_that_was_raised_at_that_step_is_the_cause() -> None:
    run = stage("labels")
    rate = np.where(np.arange(300) < 149, 1e-3, 1e-1)[:, None]

    (found,) = diverged(**run, lr=rate)

    assert "the learning rate had just been raised" in found.message
    assert "as usual" not in found.message


def test_a_loss_that_swings_before_does_not_jump_at_once() -> None:
    run = stage("labels")
    run["loss"][110:150] *= 1 + 30 * np.random.default_rng(3).random(40)

    (found,) = diverged(**run)

    assert "as usual" not in found.message


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_harder_stage_that_is_being_learnt_is_medium(seed: int) -> None:
    """A curriculum: the loss jumps and nearly all of it is undone, still falling at the end."""
    run = {name: values[:225] for name, values in stage("stage", seed=seed).items()}

    (found,) = diverged(**run)

    assert found.severity == "medium"
    assert "and falls" in found.message


@pytest.mark.parametrize(("kind", "severity"), [("labels", "medium"), ("steps", "high")])
def test_a_harder_stage_may_stay_higher_and_a_loss_that_diverged_may_not(
    kind: str, severity: str
) -> None:
    run = stage(kind)
    run["loss"][150:] = np.maximum(9.0 * np.exp(-np.arange(150) / 5), 0.6)

    (found,) = diverged(**run)

    assert found.severity == severity
    assert "is still 0.6" in found.message


def test_a_loss_that_fell_to_a_third_had_fallen_however_noisy_it_was() -> None:
    """Momentum of 0.999: swings that grow, with no step or gradient out of range."""
    wild = noise(300, 1, 0.45, 1)[:, 0]
    loss = np.concatenate([np.full(40, 2.3), np.full(160, 0.4) * wild[:160], np.full(100, 2.5)])

    (found,) = diverged(loss)

    assert found.severity == "high"


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_other_data_that_is_learnt_as_well_as_what_was_before_is_low(seed: int) -> None:
    """Batch norm left in evaluation, a new shard: the loss jumps below where it began."""
    loss = falling(300, 2.3, 0.02, seed)
    loss[200:] += 1.5 * np.exp(-np.arange(100) / 8)
    run = stage("labels", seed=seed) | {"loss": loss}

    (found,) = diverged(**run)

    assert found.severity == "low"
    assert "came back" in found.message
    assert found.recommendation.startswith("look at what begins at step 200: other data")


@pytest.mark.parametrize("kind", ["one batch", "slow", "steps"])
def test_single_batches_slow_rises_and_large_steps_are_no_other_data(kind: str) -> None:
    loss, after = falling(300, 2.3, 0.02), np.arange(100)
    run = stage("labels")
    loss[200:] += {
        "one batch": 1.5 * (after == 0),
        "slow": 0.4 * np.sin(np.pi * after / 100),
        "steps": 1.5 * np.exp(-after / 8),
    }[kind]
    if kind == "steps":
        run["update_l2"][199] *= 300

    assert diverged(**(run | {"loss": loss})) == []


@pytest.mark.parametrize("records", [12, 30, 60, 300])
@pytest.mark.parametrize("kind", ["mixup", "lognormal", "gamma"])
def test_a_loss_with_heavy_tails_does_not_diverge(kind: str, records: int) -> None:
    """Mixed or masked batches: one is ten times as hard as another, and the lowest window calm."""
    for seed in range(20):
        rng = np.random.default_rng(seed)
        wild = {
            "mixup": lambda: 0.1 + 1.3 * rng.beta(0.4, 0.4, records),  # noqa: B023
            "lognormal": lambda: np.exp(rng.normal(0, 0.8, records)),  # noqa: B023
            "gamma": lambda: rng.gamma(2, 0.5, records),  # noqa: B023
        }[kind]()
        loss = (0.3 + 2 * np.exp(-np.linspace(0, 5, records))) * wild
        assert [f for f in diverged(loss) if f.severity.rank >= 3] == [], seed


# --- no least value -------------------------------------------------------------------------------


def endless(records: int = 120, power: float = 3.0, scale: float = 1.0) -> dict[str, Any]:
    """A negated loss: it falls faster and faster, and gradients grow with it."""
    far = np.linspace(0, 10, records)
    noise_ = noise(records, 1, 0.05)[:, 0]
    norms = noise(records, 2, 0.1) * (1 + far[:, None] ** (power - 1))
    return {"loss": scale * -(2.3 + far**power) * noise_, "norms": scale * norms}


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("records", [20, 120, 1000])
def test_a_loss_without_a_least_value_is_told_with_its_sign(records: int, scale: float) -> None:
    (found,) = diverged(**endless(records, scale=scale))

    assert found.severity.rank >= 2
    assert "falls without a bound" in found.message
    assert "check the sign" in found.recommendation


def test_what_grows_with_a_loss_that_falls_without_a_bound_is_told_with_it() -> None:
    run = endless(200, power=6.0)

    report = analyze_flow(made(run["norms"], loss=run["loss"]))

    assert [f.name for f in report.findings if f.severity.rank >= 1] == ["diverged"]


def test_one_that_ends_not_finite_is_told_by_the_gradients_with_that_cause() -> None:
    run = endless(120)
    run["loss"][100:], run["norms"][100:] = np.nan, np.nan

    report = analyze_flow(made(run["norms"], loss=run["loss"]))

    (found,) = (f for f in report.findings if f.severity.rank >= 1)
    assert (found.name, found.severity) == ("non-finite-gradient", "critical")
    assert "check the sign" in found.recommendation


def test_units_that_die_on_the_way_down_do_not_hide_the_fall() -> None:
    run = endless(120)
    run["loss"] = np.r_[run["loss"], np.full(60, 2.3)]
    run["norms"] = np.r_[run["norms"], noise(60, 2, 0.1)]

    (found,) = diverged(**run)

    assert "falls without a bound" in found.message
    assert "(step 119)" in found.message or "(step 118)" in found.message


@pytest.mark.parametrize("kind", ["density", "decibels", "steady", "calm", "positive"])
def test_a_loss_below_zero_that_is_learnt_has_a_least_value(kind: str) -> None:
    """Likelihoods of densities, ratios in decibels, returns: below zero, and slower and slower."""
    x, norms = np.linspace(0, 1, 200), noise(200, 2, 0.1)
    loss = {
        "density": 60 - 120 * (1 - np.exp(-5 * x)),
        "decibels": -20 * np.log10(1 + 9 * x),
        "steady": -300 * x - 1,
        "calm": -(1 + 300 * x**2),
        "positive": 400 - 300 * x**2,
    }[kind] * noise(200, 1, 0.02)[:, 0]  # fmt: skip
    grown = norms * (1 + 9 * x[:, None]) if kind in ("density", "decibels") else norms

    assert diverged(loss, norms=grown) == []


# --- one value ------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [0.0, 2.302585, -1.0])
def test_a_loss_of_one_value_is_told(value: float) -> None:
    loss = np.full(60, value)

    (beside,) = diverged(loss)
    (alone,) = diverged(loss, norms=np.empty((60, 0)))

    assert (beside.severity, alone.severity) == ("low", "medium")
    assert "since step 0, to the end, though gradients are not zero" in beside.message
    assert "labels masked" in alone.recommendation


def test_a_loss_that_stops_changing_is_told_and_one_that_is_printed_short_is_not() -> None:
    loss = falling(100)
    loss[70:] = loss[70]
    printed = np.round(np.geomspace(2.0, 0.05, 100), 1)

    (found,) = diverged(loss)

    assert "since step 70" in found.message
    assert level(printed).constant is None
    assert diverged(printed) == []


def hinge(at_once: bool, seed: int = 0) -> np.ndarray:
    """A loss that comes down to zero, or is zero from one step on."""
    loss = falling(120, 1.0, 0.05, seed)
    loss = loss if at_once else np.maximum(loss - 0.1 * noise(120, 1, 1.0, seed)[:, 0], 0)
    loss[80:] = 0
    return loss


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_hinge_loss_that_came_down_to_zero_is_done_and_labels_that_are_masked_are_not(
    seed: int,
) -> None:
    norms = noise(120, 3, 0.1)
    norms[80:] = 0
    done, masked = (
        analyze_flow(made(norms, loss=hinge(at_once, seed))).findings for at_once in (False, True)
    )

    (info,) = done
    assert (info.name, info.severity) == ("dead-zone", "info")
    assert "come down to 0" in info.message
    (high,) = masked
    assert (high.name, high.severity) == ("dead-zone", "high")
    assert "labels" in high.recommendation


def test_a_network_that_stands_still_once_its_loss_is_zero_has_converged() -> None:
    """Steps of Adam go on for a while after the last gradient."""
    norms = noise(120, 3, 0.1)
    norms[80:] = 0
    steps = {"param_l2": np.ones((120, 3)), "update_l2": np.full((120, 3), 1e-3)}
    steps["update_l2"][90:] = 1e-9

    found = analyze_flow(made(norms, loss=hinge(at_once=False), **steps)).findings

    assert {f.severity for f in found} == {"info"}
    assert "stagnation" in {f.name for f in found}
