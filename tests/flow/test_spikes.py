"""Jumps and growth, against loops over records."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from gradscope import analyze_flow
from gradscope.flow.growth import growing, growth_rate
from gradscope.flow.joining import series
from gradscope.flow.judgement import lasting
from gradscope.flow.records.events import Spike
from gradscope.flow.spikes import jumps, spikes

from .made import made, noise


def spiked(before: np.ndarray, value: float) -> tuple[float, float, bool]:
    """Ratio, z and verdict for a value after some records, by the definition."""
    window = before[-128:]
    centre = np.median(window)
    wide = max(1.4826 * stats.median_abs_deviation(window), 0.05)
    ratio, z = math.exp(value - centre), (value - centre) / wide
    sudden = value - np.median(before[-8:]) > math.log(4)
    return ratio, z, bool(z > 6 and ratio > 4 and sudden and len(before) >= 16)


def test_a_spike_is_six_deviations_and_four_times_above_the_records_before() -> None:
    rng = np.random.default_rng(0)
    logs = rng.standard_t(2, size=(400, 6)) * np.array([0.05, 0.1, 0.2, 0.3, 0.6, 1.0])
    logs[rng.integers(20, 400, 20), rng.integers(0, 6, 20)] += rng.uniform(1, 4, 20)

    found = jumps(logs)

    hits = 0
    for t in range(16, 400):
        for row in range(6):
            ratio, z, spike = spiked(logs[:t, row], logs[t, row])
            assert found.spike[t, row] == spike
            hits += spike
            if spike:
                column = found.rows.tolist().index(row)
                assert found.ratio[t, column] == pytest.approx(ratio)
                assert found.z[t, column] == pytest.approx(z)
    assert hits > 20
    assert not found.spike[:16].any()


@pytest.mark.parametrize(("height", "spikes"), [(3.9, 0), (4.1, 1)])
def test_the_least_spike_is_four_times_a_steady_norm(height: float, spikes: int) -> None:
    norms = np.ones((60, 1))
    norms[40] = height

    assert int(jumps(np.log(norms)).spike.sum()) == spikes


def test_a_rise_that_takes_a_few_records_is_not_a_spike() -> None:
    logs = np.zeros((80, 1))
    logs[40:50, 0] = np.linspace(0.3, 3, 10)
    logs[50:, 0] = 3

    assert not jumps(logs).spike[:, 0].any()


def events(norms: np.ndarray, **fields: object) -> list[Spike]:
    result = analyze_flow(made(norms, **fields)).result
    return list(result.spikes)


def test_spikes_within_three_records_are_one_event_named_by_the_tallest_layer() -> None:
    norms = np.ones((200, 4))
    norms[100, 1], norms[103, 2], norms[103, 3] = 10, 30, 20
    norms[107, 1] = 8

    first, second = events(norms, steps=np.arange(200) * 5)

    assert (first.step, first.layer_name, first.layers) == (515, "layers.2", 3)
    assert first.ratio == pytest.approx(30)
    assert first.z == pytest.approx(math.log(30) / 0.05)
    assert (second.step, second.layer_name, second.layers) == (535, "layers.1", 1)


def test_a_spike_leaves_a_trace_where_a_severe_region_holds_its_step() -> None:
    norms = noise(300, 5, scale=0.05)
    norms[100] *= 60
    norms[200] *= 300
    norms[201:] *= 200
    s = series(made(norms, steps=np.arange(300) * 2))
    result = analyze_flow(made(norms, steps=np.arange(300) * 2)).result

    assert [(spike.step, spike.left_a_trace) for spike in result.spikes] == [
        (200, False),
        (400, True),
    ]
    assert lasting(result.exploding_regions)
    found = jumps(s.finite_log)
    assert not any(spike.left_a_trace for spike in spikes(s, found, []))


@pytest.mark.parametrize(
    ("onset", "end", "trace"),
    [
        ((199, 200), 300, True),
        ((200, 202), 300, True),
        ((201, 202), 300, False),
        ((None, 0), 200, True),
        ((None, 0), 199, False),
    ],
)
def test_a_region_holds_what_happens_from_the_record_before_its_onset(
    onset: tuple[int | None, int], end: int, trace: bool
) -> None:
    norms = noise(300, 3, scale=0.05)
    norms[200:] *= 500
    norms[200] *= 2
    (region,) = analyze_flow(made(norms)).result.exploding_regions
    where = region.extent.model_copy(update={"onset": onset, "end": end})
    s = series(made(norms))

    (spike,) = spikes(s, jumps(s.finite_log), [region.model_copy(update={"extent": where})])

    assert spike.step == 200
    assert spike.left_a_trace is trace


# --- growth ---------------------------------------------------------------------------------------


def climbing(rate: float, records: int, begin: int, layers: int = 2, scale: float = 0.05):
    norms = noise(records, layers, scale=scale)
    norms[begin:, 0] *= np.exp(rate * np.arange(records - begin))
    return norms


def test_growth_is_flagged_from_where_it_leaves_its_range() -> None:
    s = series(made(climbing(0.05, 300, 200)))

    found = growing(s, s.finite_log)

    assert not found[:, 1].any()
    assert found[230:, 0].all()
    first = int(np.flatnonzero(found[:, 0])[0])
    assert 200 <= first <= 215


@pytest.mark.parametrize(("factor", "found"), [(3.8, False), (4.2, True)])
def test_growth_within_a_window_is_at_least_fourfold(factor: float, found: bool) -> None:
    s = series(made(climbing(math.log(factor) / 63, 64 + 20, 20, scale=0.01)))

    assert bool(growing(s, s.finite_log).any()) is found


def test_growth_that_returns_to_an_earlier_level_is_not_growth() -> None:
    norms = noise(300, 1, scale=0.02)
    norms[:236, 0] *= 50.0
    norms[236:, 0] *= np.exp(np.linspace(0, math.log(20), 64))
    s = series(made(norms))

    assert not growing(s, s.finite_log)[236:].any()


@pytest.mark.parametrize(("records", "found"), [(15, False), (16, True), (20, False), (21, True)])
def test_the_least_window_is_sixteen_records_after_warm_up(records: int, found: bool) -> None:
    norms = np.exp(0.3 * np.arange(records))[:, None] * noise(records, 1, scale=0.01)
    s = series(made(norms))

    assert bool(growing(s, s.finite_log).any()) is found


def test_growth_is_measured_in_steps_not_records() -> None:
    norms = climbing(0.05, 100, 0)
    s = series(made(norms, steps=np.arange(100) * 10))

    assert growth_rate(s, 0, 0, 100) == pytest.approx(0.005, rel=0.05)
    assert growth_rate(s, 0, 0, 1) is None
    known = stats.theilslopes(np.log(s.rms[36:, 0]), s.steps[36:]).slope
    assert growth_rate(s, 0, 0, 100) == pytest.approx(known)
    later = stats.theilslopes(np.log(s.rms[80:, 0]), s.steps[80:]).slope
    assert growth_rate(s, 0, 80, 100) == pytest.approx(later)


def test_noise_and_a_single_step_up_are_judged_by_significance() -> None:
    s = series(made(noise(300, 30, scale=0.8)))

    assert not growing(s, s.finite_log).any()
