"""Whether the network moves: steps, standstill, convergence, gradients that are not there."""

from __future__ import annotations

import math

import numpy as np
import pytest

from gradscope import analyze_flow
from gradscope.flow.graph import graph_of
from gradscope.flow.joining import series
from gradscope.flow.levels import levels
from gradscope.flow.motion import convergence, missing, stagnation, update_ratios
from gradscope.flow.nonfinite import nonfinite
from gradscope.flow.oscillation import current_rate, oscillations
from gradscope.flow.records.steps import Stagnation
from gradscope.histories.history import History, Status

from .made import made, noise, quadratic


def moved(updates: np.ndarray, **fields: object) -> History:
    norms = fields.pop("l2", noise(*updates.shape))
    return made(norms, numel=1, param_l2=np.ones(updates.shape), update_l2=updates, **fields)


# --- update ratios --------------------------------------------------------------------------------


def test_large_steps_are_told_by_their_median_after_warm_up() -> None:
    updates = np.tile([0.06, 0.05, 0.04, 0.06], (40, 1))
    updates[:10] = 5.0
    updates[17, 0] = 0.9
    updates[10:38, 3] = np.nan
    sizes = {"steps": np.arange(40) * 2}

    (only,) = update_ratios(series(moved(updates, **sizes)))

    assert only.layer_name == "layers.0"
    assert only.median == pytest.approx(0.06)
    assert only.peak == pytest.approx(0.9)
    assert only.step == 34
    updates[37, 3] = 0.06
    assert [u.layer_name for u in update_ratios(series(moved(updates)))] == ["layers.0", "layers.3"]
    assert list(update_ratios(series(made(noise(40, 2))))) == []


# --- convergence ----------------------------------------------------------------------------------


def falling(decades: float, records: int = 200, **fields: object) -> History:
    norms = np.ones((records, 3))
    norms[-records // 4 :] *= 10.0**-decades
    return made(norms, **fields)


@pytest.mark.parametrize(("decades", "found"), [(0.99, False), (1.01, True)])
def test_a_network_converges_when_its_median_falls_a_decade(decades: float, found: bool) -> None:
    converged = convergence(series(falling(decades)))

    assert (converged is not None) is found
    if converged is not None:
        assert converged.decades == pytest.approx(decades, rel=1e-4)


@pytest.mark.parametrize(
    ("loss", "fell"),
    [
        (None, None),
        (np.full(200, np.nan), None),
        (np.linspace(2, 1, 200), True),
        (np.ones(200), False),
        (np.where(np.arange(200) < 193, np.nan, 1.0), None),
        # The first and the last tenth are compared.
        (np.where(np.arange(200) >= 180, 0.5, np.where(np.arange(200) < 20, 1.0, 9.0)), True),
        (np.where(np.arange(200) >= 191, 0.5, 1.0), False),
        (np.where(np.arange(200) >= 190, 0.5, 1.0), True),
    ],
)
def test_whether_the_loss_fell_is_told_by_its_tenths(
    loss: np.ndarray | None, fell: bool | None
) -> None:
    found = convergence(series(falling(2.0, loss=loss)))

    assert found is not None
    assert found.loss_fell is fell


def test_the_end_is_the_last_thirty_two_records_or_a_quarter() -> None:
    norms = np.ones((400, 2))
    norms[-17:] = 1e-3
    assert convergence(series(made(norms))) is not None
    norms[-17] = 1
    assert convergence(series(made(norms))).decades == pytest.approx(1.5)
    norms[-16] = 1
    assert convergence(series(made(norms))) is None
    short = np.ones((40, 2))
    short[-6:] = 1e-3
    assert convergence(series(made(short))) is not None


def test_convergence_is_not_known_without_an_early_or_a_late_level() -> None:
    norms = np.ones((40, 2))
    norms[10:20] = 0
    norms[12:19] = 1
    norms[30:] = 1e-3
    assert convergence(series(made(norms))) is None
    norms[19] = 1
    assert convergence(series(made(norms))) is not None
    norms[30:] = 0
    assert convergence(series(made(norms))) is None
    assert convergence(series(made(np.empty((0, 2))))) is None


# --- stagnation -----------------------------------------------------------------------------------


def standing(history: History) -> Stagnation | None:
    s = series(history)
    return stagnation(s, levels(s, graph_of(s)), convergence(s))


def test_a_network_stands_still_when_its_median_step_is_below_a_millionth() -> None:
    updates = np.full((60, 3), 1e-3)
    updates[40:, :2] = 9e-7
    updates[50, 0] = 5e-7
    updates[50, 1] = 8e-7

    found = standing(moved(updates))

    assert found is not None
    assert (found.reason, found.onset) == ("update", (39, 40))
    assert found.update_ratio == pytest.approx(9e-7)
    assert found.fastest == pytest.approx(9e-7)
    assert not found.converged


@pytest.mark.parametrize(("records", "found"), [(7, False), (8, True)])
def test_standing_still_takes_the_last_eight_records(records: int, found: bool) -> None:
    updates = np.full((60, 3), 1e-3)
    updates[-records:] = 1e-9
    assert (standing(moved(updates)) is not None) is found
    updates[-1] = 1e-3
    assert standing(moved(updates)) is None


def test_epsilon_stops_a_network_whose_steps_are_not_recorded() -> None:
    norms = np.tile([0.9, 0.9, 5.0], (60, 1))
    adam = {"optimizer": {"class": "Adam", "eps": 1.0}}

    found = standing(made(norms * noise(60, 3, 0.01), numel=1, meta=adam))

    assert found is not None
    assert (found.reason, found.onset) == ("epsilon", (None, 0))
    assert found.update_ratio is None
    assert found.fastest is None
    assert standing(made(norms[:, ::-1] * noise(60, 3, 0.01) * 2, numel=1, meta=adam)) is None
    assert standing(moved(np.full((60, 3), 1e-3), l2=norms * noise(60, 3, 0.01), meta=adam)) is None


def test_norms_that_repeat_to_the_bit_are_a_network_that_was_not_updated() -> None:
    norms = noise(60, 3)
    norms[40:] = norms[40]

    found = standing(made(norms))

    assert found is not None
    assert (found.reason, found.onset) == ("repeats", (40, 41))
    norms[50, 2] *= 1.001
    norms[51:, 2] = norms[50, 2]
    assert standing(made(norms)) is not None
    norms[45:, 1] = np.linspace(1, 2, 15)
    assert standing(made(norms)) is None


def test_layers_at_zero_do_not_make_the_rest_repeat_and_zeros_alone_repeat_nothing() -> None:
    norms = noise(60, 3)
    norms[30:, 0] = 0
    assert standing(made(norms)) is None
    norms[40:, 1:] = norms[40, 1:]
    assert standing(made(norms)).reason == "repeats"
    norms[30:] = 0
    assert standing(made(norms)) is None
    assert standing(made(noise(1, 3))) is None
    assert standing(made(np.empty((20, 0)))) is None


@pytest.mark.parametrize(
    ("updates", "fields", "reason"),
    [
        (0.0, {}, "unmoved"),
        (0.0, {"lr": np.full((60, 1), 1e-3)}, "unmoved"),
        (0.0, {"lr": np.zeros((60, 1))}, "rate"),
        (0.0, {"lr": np.r_[np.full((20, 1), 1.0), np.zeros((40, 1))]}, "schedule"),
        (0.0, {"meta": {"precision": {"param": "bfloat16"}}}, "rounded"),
        (1e-9, {"lr": np.full((60, 1), 1e-3)}, "update"),
    ],
)
def test_a_network_that_does_not_move_at_all_is_told_by_why(
    updates: float, fields: dict[str, object], reason: str
) -> None:
    """Gradients zeroed before the step, a rate of zero, steps that are rounded away, small ones."""
    run = moved(np.full((60, 3), updates), **fields)
    if reason == "schedule":
        run.update_l2[:20] = 1e-3

    found = standing(run)
    (finding,) = (f for f in analyze_flow(run).findings if f.name == "stagnation")

    assert found is not None
    assert (found.reason, finding.severity) == (reason, "medium")
    assert ("zero_grad" in finding.recommendation) is (reason == "unmoved")


@pytest.mark.parametrize("steps", [0, 60])
@pytest.mark.parametrize("weights", ["still", "moving"])
def test_an_optimizer_that_never_stepped_is_told_where_the_weights_never_changed(
    steps: int, weights: str
) -> None:
    norms = np.ones((60, 3)) if weights == "still" else np.linspace([1, 1, 1], [2, 1, 1], 60)
    meta = {"captures": 60, "optimizer_steps": steps}

    report = analyze_flow(made(noise(60, 3), param_l2=norms, meta=meta))

    found = {f.name: f for f in report.findings}
    never = steps == 0 and weights == "still"
    assert ("stagnation" in found) is never
    assert ("carried-over" in found) is (steps == 0 and not never)
    if never:
        assert "in 60 captures the optimizer never stepped" in found["stagnation"].message
        assert "optimizer.step()" in found["stagnation"].recommendation


def test_steps_that_repeat_have_their_ratio_told() -> None:
    norms = noise(60, 2)
    norms[40:] = norms[40]
    updates = np.full((60, 2), 1e-3)
    updates[:41] = 5e-2

    found = standing(moved(updates, l2=norms))

    assert found is not None
    assert found.reason == "repeats"
    assert found.update_ratio == pytest.approx(1e-3)
    assert found.fastest is None
    updates[41:] = np.nan
    assert standing(moved(updates, l2=norms)).update_ratio is None


@pytest.mark.parametrize(
    ("loss", "converged"),
    [(None, True), (np.linspace(2, 1, 200), True), (np.linspace(1, 2, 200), False)],
)
def test_a_network_that_stands_still_after_its_gradients_fell_has_converged_unless_its_loss_rose(
    loss: np.ndarray | None, converged: bool
) -> None:
    norms = np.ones((200, 3)) * noise(200, 3, 0.01)
    norms[150:] *= 1e-3
    updates = np.where(np.arange(200)[:, None] < 150, 1e-3, 1e-8) * np.ones((1, 3))

    found = standing(moved(updates, l2=norms, loss=loss))

    assert found is not None
    assert found.converged is converged


# --- missing --------------------------------------------------------------------------------------


def test_what_is_missing_is_told_by_why_and_how_often() -> None:
    status = np.full((10, 6), Status.RECORDED, np.uint8)
    status[:, 1] = Status.NONE
    status[:, 2] = Status.FROZEN
    status[:, 3] = Status.NOT_RECORDED
    status[2:5, 4] = Status.FROZEN
    status[:9, 5], status[9, 5] = Status.FROZEN, Status.NONE
    sizes = [1, 2, 3, 4, 5, 6]

    found = list(missing(series(made(noise(10, 6), status=status, numel=sizes))))

    assert [(m.layer_name, m.state, m.records, m.numel) for m in found] == [
        ("layers.1", "unused", 10, 2),
        ("layers.2", "frozen", 10, 3),
        ("layers.3", "not-recorded", 10, 4),
        ("layers.4", "partly", 3, 5),
        ("layers.5", "unused", 10, 6),
    ]


def test_frozen_and_not_recorded_in_turn_is_frozen_and_one_record_is_partly() -> None:
    status = np.full((10, 2), Status.NOT_RECORDED, np.uint8)
    status[4, 0] = Status.FROZEN
    status[4, 1] = Status.RECORDED

    found = list(missing(series(made(noise(10, 2), status=status))))

    assert [(m.state, m.records) for m in found] == [("frozen", 10), ("partly", 9)]


# --- non-finite gradients -------------------------------------------------------------------------


def test_stretches_of_gradients_that_are_not_finite_bridge_two_records() -> None:
    norms = noise(60, 5)
    norms[20, 3], norms[23, 1], norms[27, 2] = np.nan, np.inf, np.nan
    s = series(made(norms, steps=np.arange(60) * 10))

    first, second = nonfinite(s, graph_of(s))

    assert (first.step, first.origin, first.inherited_by) == (200, "layers.3", ("layers.1",))
    assert first.records == 2
    assert first.last_finite_step == 190
    assert (second.step, second.origin, second.last_finite_step) == (270, "layers.2", 260)
    assert not first.loss_nonfinite


def test_the_loss_is_the_origin_where_it_and_every_layer_turned_at_once() -> None:
    norms = noise(60, 3)
    norms[30:] = np.nan
    loss = np.where(np.arange(60) >= 30, np.nan, 1.0)

    def origin(history: History) -> tuple[str | None, bool]:
        s = series(history)
        (entry,) = nonfinite(s, graph_of(s))
        return entry.origin, entry.loss_nonfinite

    assert origin(made(norms, loss=loss)) == (None, True)
    assert origin(made(norms)) == ("layers.2", False)
    assert origin(made(norms, loss=np.full(60, np.nan))) == ("layers.2", False)
    assert origin(made(norms, loss=np.where(np.arange(60) >= 31, np.nan, 1.0))) == (
        "layers.2",
        False,
    )
    norms[30, 0] = 1.0
    assert origin(made(norms, loss=loss)) == ("layers.2", True)


def test_skipped_steps_are_neither_bad_nor_the_last_good_one() -> None:
    norms = noise(60, 3)
    norms[28:32] = np.inf
    skipped = np.zeros(60, np.uint8)
    skipped[28:30] = 1
    s = series(made(norms, skipped=skipped))

    (entry,) = nonfinite(s, graph_of(s))

    assert (entry.step, entry.records, entry.last_finite_step) == (30, 2, 27)
    first = noise(5, 2)
    first[0] = np.nan
    s = series(made(first))
    assert nonfinite(s, graph_of(s))[0].last_finite_step is None


def test_growth_before_is_the_last_total_norm_over_its_level_after_warm_up() -> None:
    norms = noise(80, 2)
    norms[60:64, 1] = [2, 4, 8, 1000]
    norms[64, 1] = np.nan
    norms[40, 1] = 0
    s = series(made(norms))

    (entry,) = nonfinite(s, graph_of(s))

    total = np.linalg.norm(s.norm, axis=1)
    level = np.median(total[20:40])
    assert entry.growth_before == pytest.approx(total[63] / level, rel=1e-6)
    first = next(t for t in range(63, 0, -1) if total[t - 1] <= 4 * level)
    assert entry.growing_since == (first - 1, first)


@pytest.mark.parametrize(("records", "known"), [(7, False), (8, True)])
def test_growth_before_takes_eight_records(records: int, known: bool) -> None:
    norms = noise(20, 1)
    norms[records - 1] *= 100
    norms[records:] = np.nan
    s = series(made(norms))

    assert (nonfinite(s, graph_of(s))[0].growth_before is not None) is known


# --- oscillation ----------------------------------------------------------------------------------


def waves(cosine: np.ndarray, window: int = 16, **fields: object):
    from gradscope.flow.directions import cosines
    from gradscope.histories.history import Exact

    values = cosine.reshape(len(cosine), -1)
    norms = fields.pop("l2", np.ones(values.shape))
    lags = np.ones(values.shape, np.int64)
    s = series(made(norms, exact=Exact(values, lags), **fields))
    return oscillations(s, levels(s, graph_of(s)), cosines(s), window)


def test_windows_that_follow_each_other_are_one_oscillation() -> None:
    at = np.arange(96)
    cosine = np.where((at >= 32) & (at < 64), -0.8, 0.8)[:, None] * np.ones((1, 3))
    cosine[:, 2] = 0.9

    (found,) = waves(cosine, numel=[100, 300, 400], steps=at * 2)

    assert found.layers == ("layers.0", "layers.1")
    assert found.share_of_layers == 0.5
    assert found.cosine == pytest.approx(-0.8)
    assert found.onset == (62, 64)
    assert not found.ongoing
    assert found.basis == "exact"
    assert found.growth_per_step == 0


def test_windows_apart_are_two_oscillations_and_the_last_is_ongoing() -> None:
    at = np.arange(96)
    cosine = np.where((at < 16) | (at >= 80), -0.8, 0.8)
    growing = np.exp(0.1 * at)[:, None]

    first, last = waves(cosine, numel=None, l2=growing, steps=at * 2)

    assert (first.onset, first.ongoing) == ((None, 0), False)
    assert (last.onset, last.ongoing) == ((158, 160), True)
    assert last.share_of_layers == 1
    assert last.growth_per_step == pytest.approx(0.05)


def test_growth_is_that_of_the_last_two_windows_of_an_oscillation() -> None:
    at = np.arange(96)
    norms = np.exp(np.where(at < 64, -0.5 * at, -32 + 0.1 * (at - 64)))[:, None]

    (found,) = waves(np.full(96, -0.8), l2=norms)

    assert found.growth_per_step == pytest.approx(0.1)


def test_fewer_than_eight_records_oscillate_nowhere() -> None:
    assert waves(np.full(7, -0.9)) == []
    assert waves(np.full(9, 0.9)) == []
    assert len(waves(np.full(9, -0.9))) == 1


def test_the_current_learning_rate_is_the_greatest_of_the_last_known_record() -> None:
    rates = np.array([[0.1, 0.2], [0.3, 0.05], [np.nan, 0.9]])

    assert current_rate(series(made(noise(3, 1), lr=rates))) == 0.3
    assert current_rate(series(made(noise(3, 1)))) is None
    assert current_rate(series(made(noise(3, 1), lr=np.empty((3, 0))))) is None
    assert current_rate(series(made(noise(3, 1), lr=np.full((3, 1), np.nan)))) is None


def test_only_a_record_at_every_step_gives_a_factor() -> None:
    from gradscope import analyze_flow

    def advice(steps: np.ndarray):
        return analyze_flow(quadratic(1.5, steps=steps)).result.learning_rate

    assert advice(np.arange(80)).divide_by == pytest.approx(1.5, rel=0.01)
    assert advice(np.arange(80) * 2).divide_by is None
    assert math.isclose(advice(np.arange(80)).current, 0.75)


@pytest.mark.parametrize("every", [1, 2])
def test_records_without_an_update_norm_do_not_end_a_standstill(every: int) -> None:
    updates = np.full((60, 3), 1e-8)
    updates[:10] = 1e-3
    updates[1::every] = updates[1::every] if every == 1 else np.nan
    s = series(made(noise(60, 3), numel=1, param_l2=np.ones((60, 3)), update_l2=updates))

    found = stagnation(s, levels(s, graph_of(s)), None)

    assert found is not None
    assert found.onset[1] == 10


def test_one_step_that_replaces_the_weights_is_told_also_at_the_start() -> None:
    updates = np.full((60, 3), 1e-3)
    updates[2] = 5.0
    history = made(noise(60, 3), numel=1, param_l2=np.ones((60, 3)), update_l2=updates)

    (found,) = [f for f in analyze_flow(history).findings if f.name == "update-ratio"]

    assert (found.severity, found.evidence["step"]) == ("medium", 2)
    assert "500%" in found.message
    assert "warm" in found.recommendation
    updates[2] = 0.9
    assert analyze_flow(history).findings == ()


@pytest.mark.parametrize(("starved", "told"), [(20, False), (13, False), (8, True)])
def test_a_network_most_of_which_is_starved_does_not_also_stand_still(
    starved: int, told: bool
) -> None:
    """Deep plain layers: each keeps a part of the gradient, and the first ones get next to none."""
    norms = noise(100, 24, 0.1)
    norms[:, :starved] *= 10.0 ** -np.linspace(8, 6, starved)
    ratio = np.where(np.arange(24) < max(starved, 13), 1e-9, 1e-3) * np.ones((100, 1))

    report = analyze_flow(made(norms, param_l2=np.ones((100, 24)), update_l2=ratio))

    names = {f.name for f in report.findings}
    assert "vanishing-gradient" in names
    assert ("stagnation" in names) is told


@pytest.mark.parametrize(("died", "told"), [(20, False), (4, True)])
def test_a_network_most_of_which_died_before_does_not_also_stand_still(
    died: int, told: bool
) -> None:
    """Units die at record 20, a few live on; at the end no step moves any layer."""
    norms, zeros = noise(100, 24, 0.1), np.zeros((100, 24))
    norms[20:, :died] *= 0.01
    zeros[20:, :died] = 0.999
    ratio = np.full((100, 24), 1e-3)
    ratio[60:] = 1e-9

    history = made(norms, zero_fraction=zeros, param_l2=np.ones((100, 24)), update_l2=ratio)
    names = {f.name for f in analyze_flow(history).findings}

    assert ("stagnation" in names) is told
