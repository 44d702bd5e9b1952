"""Directions: pairs of records, estimates from sketches, and what a window of cosines means."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from gradscope.flow.directions import Window, cosines, estimate, pairwise_cosine, turned
from gradscope.flow.graph import graph_of
from gradscope.flow.joining import series
from gradscope.flow.layers import noise_scale, signal_of
from gradscope.flow.levels import levels
from gradscope.flow.temporal import directions, recent_records, stability, temporal
from gradscope.histories.history import Exact, History, Sketches, Status

from .made import made, noise, of_vectors


def exact(cosine: np.ndarray, **fields: object) -> History:
    """A history of norms one with exact cosines to the record before."""
    values = np.asarray(cosine, dtype=np.float64).reshape(len(cosine), -1)
    lag = np.where(np.isfinite(values), 1, 0)
    norms = fields.pop("l2", np.ones(values.shape))
    return made(norms, exact=Exact(values, lag), **fields)


def label(history: History, window: int = 32) -> list[str]:
    """The direction of each layer at the last record."""
    s = series(history)
    last = np.array([len(s.steps) - 1])
    found = directions(s, levels(s, graph_of(s)), cosines(s), last, window)
    return found.direction[0].tolist()


# --- cosines --------------------------------------------------------------------------------------


def test_exact_cosines_are_paired_at_the_commonest_distance_in_steps() -> None:
    cosine = np.linspace(-1, 1, 10)
    cosine[0] = np.nan
    steps = np.r_[np.arange(5) * 2, 20 + np.arange(5) * 2]

    found = cosines(series(exact(cosine, steps=steps)))

    assert (found.lag, found.basis) == (2, "exact")
    assert found.after.tolist() == [1, 2, 3, 4, 6, 7, 8, 9]
    assert (found.after - found.before).tolist() == [1] * 8
    np.testing.assert_allclose(found.cosine[:, 0], cosine[found.after])
    assert (found.error == 0).all()


def test_cosines_of_another_lag_are_left_out() -> None:
    cosine = np.full((8, 2), 0.5)
    lag = np.full((8, 2), 2)
    lag[5, 0], lag[6, 1], cosine[7, 0] = 1, 3, np.nan
    s = series(made(np.ones((8, 2)), exact=Exact(cosine, lag)))

    found = cosines(s)

    assert found.lag == 2
    assert found.after.tolist() == [2, 3, 4, 5, 6, 7]
    assert np.argwhere(np.isnan(found.cosine)).tolist() == [[3, 0], [4, 1], [5, 0]]


def test_sketches_are_paired_with_the_one_before_at_the_commonest_distance() -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(size=(5, 2, 64)) / 8
    s = series(made(np.ones((20, 2)), sketches=Sketches(values, np.array([0, 4, 8, 10, 14]))))

    found = cosines(s)

    assert (found.lag, found.basis) == (4, "sketch")
    assert found.before.tolist() == [0, 4, 10]
    assert found.after.tolist() == [4, 8, 14]
    expected = (1 - found.cosine**2) / np.sqrt(64 * (1 + found.cosine**2))
    np.testing.assert_allclose(found.error, expected)


def test_exact_cosines_come_before_sketches_and_one_sketch_is_none() -> None:
    sketches = Sketches(np.ones((2, 1, 4)), np.array([0, 1]))
    both = exact(np.array([np.nan, 0.3]), sketches=sketches)
    assert cosines(series(both)).basis == "exact"
    unknown = exact(np.array([np.nan, np.nan]), sketches=sketches)
    assert cosines(series(unknown)).basis == "sketch"
    alone = made(np.ones((2, 1)), sketches=Sketches(np.ones((1, 1, 4)), np.array([1])))
    assert cosines(series(alone)) is None
    assert cosines(series(made(np.ones((2, 1))))) is None


@pytest.mark.parametrize("seed", range(20))
def test_an_estimate_is_the_root_of_the_likelihoods_cubic(seed: int) -> None:
    rng = np.random.default_rng(seed)
    s, t = rng.normal(size=(2, 128)) / np.sqrt(128)
    t += rng.uniform(-1, 1) * s
    d, m1, m2 = s @ t, s @ s, t @ t
    roots = np.roots([1, -d, m1 + m2 - 1, -d])
    real = [r.real for r in roots if abs(r.imag) < 1e-9 and -1 <= r.real <= 1]

    found = estimate(*(np.array([[x]]) for x in (d, m1, m2)))[0, 0]

    assert min(abs(found - root) for root in real) < 1e-9


def test_a_sketch_of_zeros_has_no_cosine() -> None:
    zero, one = np.zeros((1, 1)), np.ones((1, 1))

    assert np.isnan(estimate(zero, zero, one)).all()
    assert np.isnan(estimate(zero, one, zero)).all()
    assert estimate(zero, one, one)[0, 0] == pytest.approx(0, abs=1e-9)


def test_the_mean_pairwise_cosine_is_that_of_a_double_loop() -> None:
    rng = np.random.default_rng(0)
    values = (rng.normal(size=(9, 3, 16)) + np.array([0, 0.5, 2])[:, None]).astype(np.float32)
    values[4, 1] = 0
    values[1:, 2] = 0

    found = pairwise_cosine(Window(values))

    for row in (0, 1):
        vectors = [v for v in values[:, row].astype(np.float64) if v.any()]
        pairs = [a @ b for i, a in enumerate(vectors) for j, b in enumerate(vectors) if i != j]
        assert found[row] == pytest.approx(np.clip(np.mean(pairs), -1, 1), rel=1e-5)
    assert np.isnan(found[2])


def test_windows_are_compared_by_the_cosine_of_their_sums() -> None:
    rng = np.random.default_rng(0)
    now, before = rng.normal(size=(2, 5, 2, 8)).astype(np.float32)
    a, b = now.sum(axis=0), before.sum(axis=0)

    found = turned(Window(now), Window(before))

    for row in range(2):
        expected = a[row] @ b[row] / np.linalg.norm(a[row]) / np.linalg.norm(b[row])
        assert found[row] == pytest.approx(expected, rel=1e-4)


# --- labels by cosine -----------------------------------------------------------------------------


def by_hand(inside: np.ndarray) -> str:
    """One window of cosines: mean against the greater of 0.1 and three standard errors."""
    known = inside[np.isfinite(inside)]
    fours = inside[len(inside) % 4 :].reshape(-1, 4)
    means = np.array([np.nanmean(four) for four in fours if np.isfinite(four).any()])
    if len(known) < 8 or len(means) < 2:
        return "indeterminate"
    limit = max(0.1, 3 * stats.sem(means))
    mean = known.mean()
    return "oscillating" if mean < -limit else "forward" if mean > limit else "indeterminate"


@pytest.mark.parametrize("window", [12, 18, 32])
def test_a_label_is_the_mean_cosine_against_three_errors_of_means_of_four(window: int) -> None:
    rng = np.random.default_rng(window)
    count = 150
    centre, wide = rng.uniform(-0.4, 0.4, count), rng.uniform(0.05, 0.6, count)
    cosine = np.clip(centre + wide * rng.normal(size=(50, count)), -1, 1)
    cosine[rng.random(cosine.shape) < 0.3] = np.nan
    cosine[40:, 0] = np.nan
    cosine[:-9, 1], cosine[:-8, 2] = np.nan, np.nan

    found = label(exact(cosine), window)

    expected = [by_hand(cosine[-window:, row]) for row in range(count)]
    assert found == expected
    assert set(found) == {"oscillating", "forward", "indeterminate"}


def test_a_mean_within_a_tenth_of_zero_is_noise_however_steady() -> None:
    cosine = np.tile([0.099, 0.101, -0.099, -0.101], (40, 1))

    assert label(exact(cosine)) == ["indeterminate", "forward", "indeterminate", "oscillating"]


def test_eight_cosines_are_needed() -> None:
    assert label(exact(np.r_[np.nan, np.full(7, 0.9)])) == ["indeterminate"]
    assert label(exact(np.r_[np.nan, np.full(8, 0.9)])) == ["forward"]


def test_a_window_ends_at_its_own_record() -> None:
    cosine = np.where(np.arange(60) < 30, 0.9, -0.9)
    s = series(exact(cosine))
    records = np.array([3, 29, 45, 59])

    found = directions(s, levels(s, graph_of(s)), cosines(s), records, 16)

    assert found.direction[:, 0].tolist() == [
        "indeterminate",
        "forward",
        "oscillating",
        "oscillating",
    ]
    np.testing.assert_allclose(found.cosine[1:, 0], [0.9, -0.9, -0.9])
    assert np.isnan(found.cosine[0, 0])


def test_a_window_that_undoes_the_one_before_goes_backward_unless_it_oscillates() -> None:
    rng = np.random.default_rng(0)
    fixed = rng.normal(size=50)

    def history(after: float, records: int = 64) -> History:
        return of_vectors(
            [[rng.normal(size=50) + fixed * (0.5 if t < 32 else after)] for t in range(records)]
        )

    assert label(history(-0.5)) == ["backward"]
    assert label(history(0.5)) != ["backward"]
    assert label(history(-0.5, records=63), window=32) != ["backward"]


# --- labels by norm -------------------------------------------------------------------------------


def norm_label(logs: np.ndarray) -> str:
    """One window of ln norms, by SciPy and loops."""
    known = np.flatnonzero(np.isfinite(logs))
    if len(known) < 8:
        return "indeterminate"
    y = logs[known]
    slope = stats.theilslopes(y, known).slope
    n = len(y)
    score = sum(np.sign(y[j] - y[i]) for i in range(n) for j in range(i + 1, n))
    z = max(0.0, abs(score) - 1) / math.sqrt(n * (n - 1) * (2 * n + 5) / 18)
    line = np.polyfit(known, y, 1)
    if 2 * stats.norm.sf(z) < 0.01 and abs(slope) * (len(logs) - 1) > math.log(2):
        return "forward" if slope > 0 else "backward"
    rest = dict(zip(known.tolist(), y - np.polyval(line, known), strict=True))
    repeat = sum(rest[t] * rest[t + 1] for t in rest if t + 1 in rest) / sum(
        value**2 for value in rest.values()
    )
    error = (1 - repeat**2) / math.sqrt(n)
    return "oscillating" if repeat < -0.5 - 3 * error else "indeterminate"


def test_by_norms_a_label_is_a_trend_or_an_autocorrelation() -> None:
    rng = np.random.default_rng(5)
    count, at = 240, np.arange(32)[:, None]
    rate = rng.uniform(-0.08, 0.08, count) * (rng.random(count) < 0.6)
    swing = rng.uniform(0, 1.5, count) * (rng.random(count) < 0.4) * (-1.0) ** at
    logs = rate * at + swing + rng.uniform(0.05, 0.5, count) * rng.normal(size=(32, count))
    norms = np.exp(logs).astype(np.float32)
    norms[rng.random(norms.shape) < np.linspace(0, 0.5, count)] = 0
    norms[:24, 0], norms[:25, 1] = 0, 0
    s = series(made(norms, numel=1))

    found = label(made(norms, numel=1))

    for row in range(count):
        if norms[-1, row] > 0:
            assert found[row] == norm_label(s.finite_log[:, row]), row
        else:
            assert found[row] == "stagnant"
    assert {"forward", "backward", "oscillating", "indeterminate"} <= set(found)


def test_a_trend_through_many_unknown_records_is_still_a_trend() -> None:
    norms = np.exp(0.05 * np.arange(32))[:, None] * np.ones((1, 2))
    norms[np.random.default_rng(0).random((32, 2)) < 0.5] = np.nan
    norms[-1] = 5.0
    status = np.where(np.isnan(norms), Status.NOT_RECORDED, Status.RECORDED).astype(np.uint8)

    assert label(made(norms, status=status)) == ["forward", "forward"]


@pytest.mark.parametrize(("records", "expected"), [(7, "indeterminate"), (8, "forward")])
def test_eight_records_make_a_trend(records: int, expected: str) -> None:
    norms = np.exp(0.3 * np.arange(records))[:, None]

    assert label(made(norms)) == [expected]


# --- standing still -------------------------------------------------------------------------------


def test_a_layer_at_zero_or_without_steps_is_stagnant_and_one_not_recorded_is_unknown() -> None:
    norms = np.ones((40, 4))
    norms[-1, 0] = 0
    status = np.full((40, 4), Status.RECORDED, np.uint8)
    status[-1, 3] = Status.NOT_RECORDED
    updates = np.tile([1e-3, 9e-7, 1.1e-6, 1e-9], (40, 1))
    history = made(norms, status=status, numel=1, param_l2=np.ones((40, 4)), update_l2=updates)

    assert label(history) == ["stagnant", "stagnant", "indeterminate", "indeterminate"]


def test_steps_that_began_half_a_window_ago_are_steps() -> None:
    updates = np.where(np.arange(40) < 29, 1e-9, 1e-3)[:, None]
    history = made(np.ones((40, 1)), numel=1, param_l2=np.ones((40, 1)), update_l2=updates)

    assert label(history, window=20) == ["indeterminate"]
    assert label(history, window=23) == ["stagnant"]


def test_epsilon_makes_a_layer_stagnant_where_steps_are_not_recorded() -> None:
    adam = {"optimizer": {"class": "Adam", "eps": 1.0}}
    norms = np.tile([0.9, 1.1], (40, 1))
    updates = {"param_l2": np.ones((40, 2)), "update_l2": np.full((40, 2), 1e-3)}

    assert label(made(norms, numel=1, meta=adam)) == ["stagnant", "indeterminate"]
    assert label(made(norms, numel=1, meta=adam, **updates)) == ["indeterminate"] * 2


# --- rows and scores ------------------------------------------------------------------------------


def test_stability_is_the_spread_of_changes_per_step_in_the_window() -> None:
    steps = np.cumsum(np.random.default_rng(1).integers(1, 4, 40))
    s = series(made(noise(40, 3), steps=steps))
    changes = np.diff(s.finite_log, axis=0) / np.diff(steps)[:, None]

    found = stability(s, np.array([4, 5, 39]), window=12)

    assert np.isnan(found[0]).all()
    for row, inside in ((1, changes[:5]), (2, changes[27:39])):
        expected = np.exp(-1.4826 * stats.median_abs_deviation(inside, axis=0))
        np.testing.assert_allclose(found[row], expected)


def test_stability_takes_five_known_changes() -> None:
    norms = noise(10, 2)
    norms[2, 0] = 0
    norms[1, 1] = 0
    s = series(made(norms))

    found = stability(s, np.array([7]), window=7)

    # One unknown value costs two changes.
    assert np.isfinite(found[0, 0])
    assert np.isfinite(found[0, 1])
    assert np.isnan(stability(s, np.array([6]), window=6)[0]).all()


def test_there_is_a_row_for_each_layer_that_was_recorded_or_should_have_been() -> None:
    norms = noise(12, 3)
    status = np.full((12, 3), Status.RECORDED, np.uint8)
    status[3, 0], status[4, 1], status[5, 2] = Status.NOT_RECORDED, Status.NONE, Status.FROZEN
    norms[6, 1] = np.inf
    s = series(made(norms, status=status, steps=np.arange(12) * 2))

    flows = directions(s, levels(s, graph_of(s)), None, np.arange(3, 7), 8)
    rows = list(temporal(s, flows, 8))

    assert [(r.step, r.layer_name) for r in rows[:3]] == [
        (6, "layers.1"),
        (6, "layers.2"),
        (8, "layers.0"),
    ]
    assert len(rows) == 11
    by_place = {(r.step, r.layer_name): r.gradient_magnitude for r in rows}
    assert by_place[8, "layers.1"] is None
    assert math.isnan(by_place[12, "layers.1"])
    assert by_place[6, "layers.2"] == pytest.approx(norms[3, 2], rel=1e-6)


def test_recent_records_are_as_many_as_rows_allow() -> None:
    s = series(made(noise(50, 4)))

    assert list(recent_records(s, 20)) == [45, 46, 47, 48, 49]
    assert list(recent_records(s, 23)) == [45, 46, 47, 48, 49]
    assert list(recent_records(s, 1)) == [49]
    assert len(recent_records(s, 10**6)) == 50


# --- signal and noise -----------------------------------------------------------------------------


def test_the_signal_is_the_mean_product_over_the_mean_square() -> None:
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(30, 20)) + 0.8
    norms = np.linalg.norm(vectors, axis=1)
    cosine = np.r_[
        np.nan, [vectors[t] @ vectors[t - 1] / norms[t] / norms[t - 1] for t in range(1, 30)]
    ]
    s = series(exact(cosine, l2=norms[:, None], meta={"batch_size": 8}))

    signal = signal_of(s, cosines(s), 0, window=12)

    pairs = [(t - 1, t) for t in range(18, 30)]
    products = np.array([vectors[a] @ vectors[b] for a, b in pairs])
    power = np.mean([norms[a] ** 2 + norms[b] ** 2 for a, b in pairs]) / 2
    assert signal.share == pytest.approx(np.mean(products) / power)
    assert signal.error == pytest.approx(stats.sem(products / power))
    expected = 8 * (1 - signal.share) / signal.share
    assert noise_scale(s, signal) == pytest.approx(expected)
    assert noise_scale(series(exact(cosine, l2=norms[:, None])), signal) is None


def test_a_signal_takes_five_pairs_and_a_gradient() -> None:
    cosine = np.full(12, np.nan)
    cosine[-4:] = 0.5
    s = series(exact(cosine))
    assert signal_of(s, cosines(s), 0, window=32) is None
    cosine[-5:] = 0.5
    s = series(exact(cosine))
    assert signal_of(s, cosines(s), 0, window=32).share == pytest.approx(0.5)
    s = series(exact(cosine, l2=np.zeros((12, 1))))
    assert signal_of(s, cosines(s), 0, window=32) is None
