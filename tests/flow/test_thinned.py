"""A verdict does not depend on how often was recorded: the same run, every n-th record of it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from gradscope.flow.analysis import analyze_flow
from gradscope.flow.result import FlowReport
from gradscope.histories.history import History, Status

from .made import made, noise

Run = Callable[[int, int], History]
RECORDS = 1000
STEPS = np.arange(RECORDS)
AFTER = np.clip(STEPS - 600, 0, None)


def kept(norms: np.ndarray, every: int, **by_record: np.ndarray) -> History:
    fields = {name: values[::every] for name, values in by_record.items()}
    return made(norms[::every], steps=STEPS[::every], **fields)


def exploding(layers: int, every: int) -> History:
    """Every layer at once, smoothly, from step 600 on; without a loss."""
    return kept(noise(RECORDS, layers, 0.1) * np.exp(0.02 * AFTER)[:, None], every)


def exploding_with_the_loss(layers: int, every: int) -> History:
    growth = np.exp(0.02 * AFTER)
    loss = 2 * np.exp(-STEPS / 300) + 0.1 * AFTER + 0.1
    return kept(noise(RECORDS, layers, 0.1) * growth[:, None], every, loss=loss)


def exploding_under_a_falling_loss(layers: int, every: int) -> History:
    growth = np.exp(0.02 * AFTER)
    return kept(noise(RECORDS, layers, 0.1) * growth[:, None], every, loss=2 * np.exp(-STEPS / 300))


def vanishing(layers: int, every: int) -> History:
    """All layers but the two next to the loss fall by seven decades from step 600 on."""
    norms = noise(RECORDS, layers, 0.1)
    norms[:, : layers - 2] *= 10 ** -np.minimum(AFTER / 30, 7)[:, None]
    return kept(norms, every)


def dying(layers: int, every: int) -> History:
    norms = noise(RECORDS, layers, 0.1)
    norms[600:, : layers // 2] = 0
    return kept(norms, every)


def verdict(history: History) -> set[tuple[str, str]]:
    return {(f.name, str(f.severity)) for f in analyze_flow(history).findings}


@pytest.mark.parametrize("layers", [4, 8])
@pytest.mark.parametrize(
    ("run", "told"),
    [
        (exploding, ("exploding-gradient", "critical")),
        (exploding_with_the_loss, ("exploding-gradient", "critical")),
        (exploding_under_a_falling_loss, ("exploding-gradient", "high")),
        (vanishing, ("vanishing-gradient", "critical")),
        (dying, ("dead-zone", "high")),
    ],
)
def test_every_second_and_every_third_record_tell_the_same(
    run: Run, told: tuple[str, str], layers: int
) -> None:
    whole = verdict(run(layers, 1))

    assert told in whole
    assert all(verdict(run(layers, every)) == whole for every in (2, 3, 5))


def test_slow_growth_is_found_however_densely_it_is_recorded() -> None:
    norms = noise(RECORDS, 2, 0.1) * np.exp(0.005 * AFTER)[:, None]

    found = [verdict(kept(norms, every)) for every in (1, 2, 3, 10)]

    assert found == [{("exploding-gradient", "low")}] * 4


def test_noise_is_not_growth_at_any_density() -> None:
    assert [verdict(kept(noise(RECORDS, 8, 0.3), every)) for every in (1, 2, 3, 10)] == [set()] * 4


# --- spikes beside what lasts ---------------------------------------------------------------------

EVERY = (1, 2, 5, 10, 50)
#: Steps that a recorder with any of these keeps: it writes two records each time.
SPIKED = (300, 400, 850)


def recorded(norms: np.ndarray, every: int, **by_record: np.ndarray) -> FlowReport:
    at = np.flatnonzero((STEPS % every == 0) | (STEPS % every == 1))
    fields = {name: values[at] for name, values in by_record.items()}
    return analyze_flow(made(norms[at], steps=STEPS[at], **fields))


def jumping(norms: np.ndarray) -> None:
    norms[600:] *= 150


def climbing(norms: np.ndarray) -> None:
    norms *= np.exp(np.minimum(0.03 * AFTER, 6))[:, None]


def collapsing(norms: np.ndarray) -> None:
    norms[600:] /= 150


def told_spikes(report: FlowReport) -> tuple[list[tuple[str, str]], list[int]]:
    told = [(f.name, str(f.severity)) for f in report.findings]
    return sorted(told), [s.step for s in report.result.spikes if not s.stayed]


@pytest.mark.parametrize("every", EVERY)
@pytest.mark.parametrize("where", [slice(None), slice(2, 3)], ids=["all-layers", "one-layer"])
@pytest.mark.parametrize("lasting", [jumping, climbing])
@pytest.mark.parametrize("spiked", [(300,), (850,), SPIKED], ids=str)
def test_spikes_before_and_inside_an_explosion_are_told_beside_it(
    spiked: tuple[int, ...], lasting: Callable[[np.ndarray], None], where: slice, every: int
) -> None:
    norms = noise(RECORDS, 6, 0.15)
    lasting(norms)
    for step in spiked:
        norms[step, where] *= 200

    told, spikes = told_spikes(recorded(norms, every))

    assert told == [("exploding-gradient", "critical"), ("gradient-spike", "medium")]
    assert set(spiked) <= set(spikes)


@pytest.mark.parametrize("every", EVERY)
@pytest.mark.parametrize("lasting", [jumping, climbing])
def test_what_lasts_is_no_spike(lasting: Callable[[np.ndarray], None], every: int) -> None:
    norms = noise(RECORDS, 6, 0.15)
    lasting(norms)

    assert told_spikes(recorded(norms, every))[0] == [("exploding-gradient", "critical")]


@pytest.mark.parametrize("every", EVERY)
@pytest.mark.parametrize("where", [slice(None), slice(2, 3)], ids=["all-layers", "one-layer"])
def test_spikes_below_a_level_that_was_left_are_told(where: slice, every: int) -> None:
    norms = noise(RECORDS, 6, 0.15)
    collapsing(norms)
    norms[850, where] *= 100

    report = recorded(norms, every)

    (spike,) = report.result.spikes
    assert (spike.step, spike.stayed) == (850, False)
    assert 60 < spike.ratio < 160
    quiet = noise(RECORDS, 6, 0.15)
    collapsing(quiet)
    assert recorded(quiet, every).result.spikes == ()


@pytest.mark.parametrize("every", [1, 2, 5, 10])
@pytest.mark.parametrize("spike", [10, 50, 90])
def test_an_early_spike_and_an_early_explosion_hide_neither_each_other(
    spike: int, every: int
) -> None:
    norms = noise(RECORDS, 6, 0.15)
    norms[spike] *= 1600
    norms[120:] *= 150

    told, spikes = told_spikes(recorded(norms, every))

    assert told == [("exploding-gradient", "critical"), ("gradient-spike", "medium")]
    assert spike in spikes


@pytest.mark.parametrize("every", EVERY)
@pytest.mark.parametrize("where", [slice(None), slice(2, 4)], ids=["all-layers", "two-layers"])
@pytest.mark.parametrize("at", [100, 150, 300])
def test_a_jump_within_the_first_records_is_told(at: int, where: slice, every: int) -> None:
    """A coarse recording has four of the first hundred steps."""
    norms = noise(RECORDS, 6, 0.15)
    norms[at:, where] *= 150

    report = recorded(norms, every)

    assert told_spikes(report)[0] == [("exploding-gradient", "critical")]
    (region,) = report.result.exploding_regions
    assert region.extent.onset[0] < at <= region.extent.onset[1]


@pytest.mark.parametrize("every", EVERY)
def test_the_first_steps_may_climb_as_far(every: int) -> None:
    climb = np.minimum(np.exp(0.05 * STEPS), 150)[:, None]

    assert recorded(noise(RECORDS, 6, 0.15) * climb, every).gate.exit_code == 0


def leaving(until: int, power: int) -> np.ndarray:
    """Two layers behind a branch that starts from zero, under a learning rate that warms up."""
    norms = noise(RECORDS, 6, 0.15)
    norms[:, 1:3] *= np.minimum(STEPS / until, 1)[:, None] ** power
    return norms


@pytest.mark.parametrize("every", EVERY)
@pytest.mark.parametrize("power", [1, 2, 3])
@pytest.mark.parametrize("until", [20, 100, 200])
def test_a_branch_that_leaves_zero_does_not_explode(until: int, power: int, every: int) -> None:
    assert recorded(leaving(until, power), every).findings == ()


@pytest.mark.parametrize("every", EVERY)
def test_one_that_goes_on_beyond_the_others_does(every: int) -> None:
    norms = leaving(100, 2)
    norms[600:, 1:3] *= 150

    assert told_spikes(recorded(norms, every))[0] == [("exploding-gradient", "critical")]


@pytest.mark.parametrize("every", EVERY)
def test_gradients_that_fall_from_the_first_step_on_are_no_spike(every: int) -> None:
    norms = noise(RECORDS, 6, 0.15) * (1 + 200 * np.exp(-STEPS / 20))[:, None]

    assert recorded(norms, every).findings == ()


@pytest.mark.parametrize("every", EVERY)
def test_a_jump_that_stays_and_does_no_harm_is_said_to_stay(every: int) -> None:
    norms = noise(RECORDS, 6, 0.1)
    norms[600:] *= 30

    report = recorded(norms, every, loss=2 * np.exp(-STEPS / 300))

    found = [f for f in report.findings if f.name == "gradient-spike"]
    assert [f.message.endswith("; it has not come back") for f in found] == [True]
    assert report.gate.exit_code == 0


# --- an explosion as a whole ----------------------------------------------------------------------


def explosion_of(history: History) -> tuple[float | None, str]:
    found = analyze_flow(history).result.explosion
    return found.explosion_ratio, found.overall_severity


def test_an_explosion_of_all_layers_has_a_ratio_of_one_and_the_worst_layers_severity() -> None:
    assert explosion_of(exploding(8, 1)) == (1.0, "critical")
    assert explosion_of(exploding_with_the_loss(8, 1)) == (1.0, "critical")
    assert explosion_of(exploding_under_a_falling_loss(8, 1)) == (1.0, "severe")
    assert explosion_of(made(noise(RECORDS, 8, 0.1))) == (0.0, "none")


def test_growth_under_a_falling_loss_takes_ten_times_as_much() -> None:
    loss = 2 * np.exp(-STEPS / 300)

    def grown(factor: float) -> str:
        growth = factor ** (AFTER / AFTER.max())
        return explosion_of(kept(noise(RECORDS, 8, 0.02) * growth[:, None], 1, loss=loss))[1]

    levels = [grown(factor) for factor in (30, 60, 200, 900, 1e5)]
    assert levels == ["none", "mild", "moderate", "severe", "severe"]


# --- too short ------------------------------------------------------------------------------------


def short(records: int, **fields: np.ndarray) -> FlowReport:
    return analyze_flow(made(noise(records, 8), **fields))


@pytest.mark.parametrize("records", [0, 1, 2])
def test_a_history_of_one_or_two_records_is_inconclusive_and_says_why(records: int) -> None:
    report = short(records)

    assert report.gate.exit_code == 4
    assert report.coverage.analyzed == 0
    assert any("judged from 3 records on" in skip.reason for skip in report.coverage.skipped)
    assert analyze_flow(made(noise(records, 8)), allow_empty=True).gate.exit_code == 0


def test_three_records_are_judged() -> None:
    assert short(3).gate.exit_code == 0


def test_records_that_mixed_precision_skipped_do_not_count() -> None:
    report = short(20, skipped=np.ones(20, np.uint8))

    assert report.gate.exit_code == 4
    assert any("skipped 20" in skip.reason for skip in report.coverage.skipped)
    assert short(20, skipped=np.r_[np.ones(17, np.uint8), 0, 0, 0]).gate.exit_code == 0


def test_a_history_without_any_recorded_gradient_is_inconclusive() -> None:
    status = np.full((20, 8), Status.NOT_RECORDED, np.uint8)

    assert short(20, status=status).gate.exit_code == 4


@pytest.mark.parametrize("records", [1, 2, 1000])
def test_nan_in_a_single_record_is_critical_and_fails_the_gate(records: int) -> None:
    norms = noise(records, 8).astype(np.float32)
    norms[-1, 3] = np.nan
    counts = np.zeros((records, 8), np.int64)
    counts[-1, 3] = 17

    report = analyze_flow(made(norms, n_nan=counts, n_inf=np.zeros_like(counts)))

    assert [(f.name, str(f.severity), f.subject) for f in report.findings] == [
        ("non-finite-gradient", "critical", "layers.3")
    ]
    assert report.gate.exit_code == 1
