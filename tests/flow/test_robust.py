"""Robust statistics against SciPy, NumPy and the definitions written out."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from gradscope.flow.norms import middle
from gradscope.flow.robust import (
    column_trends,
    detrended,
    mann_kendall,
    nanmedian,
    r_squared,
    spread,
    steadiness,
    theil_sen,
)


def with_gaps(shape: tuple[int, ...], seed: int, share: float = 0.3) -> np.ndarray:
    rng = np.random.default_rng(seed)
    values = rng.normal(size=shape)
    values[rng.random(shape) < share] = np.nan
    return values


@pytest.mark.parametrize("axis", [0, 1, None])
@pytest.mark.parametrize("rows", [1, 2, 7, 8])
def test_the_median_leaves_out_what_is_not_known(axis: int | None, rows: int) -> None:
    values = with_gaps((rows, 9), seed=rows)
    values[0] = np.arange(9)

    np.testing.assert_array_equal(nanmedian(values, axis), np.nanmedian(values, axis))


def test_the_median_of_nothing_is_nan_and_that_of_infinities_is_infinite() -> None:
    assert math.isnan(nanmedian([]))
    assert math.isnan(nanmedian([np.nan, np.nan]))
    assert np.isnan(nanmedian(np.empty((0, 3)), axis=0)).tolist() == [True] * 3
    assert nanmedian([np.inf, np.inf, 1.0]) == np.inf
    assert nanmedian([-np.inf, -np.inf]) == -np.inf


def test_the_spread_is_the_median_absolute_deviation_of_a_gaussian() -> None:
    values = with_gaps((40, 5), seed=1)
    expected = 1.4826 * stats.median_abs_deviation(values, axis=0, nan_policy="omit")

    np.testing.assert_allclose(spread(values, axis=0), expected)
    assert spread(values) == pytest.approx(
        1.4826 * stats.median_abs_deviation(values, axis=None, nan_policy="omit")
    )


def test_steadiness_is_the_exponential_of_minus_the_spread_of_changes() -> None:
    logs, steps = np.cumsum(with_gaps((30,), seed=2, share=0)), np.arange(30) * 5.0
    logs[[3, 11]] = np.nan
    known = np.isfinite(logs)
    changes = np.diff(logs[known]) / np.diff(steps[known])

    expected = math.exp(-1.4826 * stats.median_abs_deviation(changes))

    assert steadiness(logs, steps) == pytest.approx(expected)
    assert steadiness(logs[:5], steps[:5]) is None
    assert steadiness(logs[4:9], steps[4:9]) is not None
    assert steadiness(np.arange(5) * 0.25, np.arange(5.0)) == 1.0


@pytest.mark.parametrize("seed", range(5))
def test_the_slope_is_scipys(seed: int) -> None:
    y = with_gaps((25,), seed) + 0.1 * np.arange(25)
    x = np.arange(25.0) ** 1.2
    known = np.isfinite(y)

    line = theil_sen(x, y)

    assert line is not None
    slope, intercept = line
    assert slope == pytest.approx(stats.theilslopes(y[known], x[known]).slope)
    assert intercept == pytest.approx(np.median(y[known] - slope * x[known]))


def test_a_slope_takes_two_places() -> None:
    assert theil_sen(np.array([1.0, 1.0]), np.array([0.0, 2.0])) is None
    assert theil_sen(np.array([1.0, 2.0]), np.array([0.0, np.inf])) is None
    assert theil_sen(np.array([1.0, 1.0, 3.0]), np.array([0.0, 2.0, 5.0])) == (2.0, -1.0)


def kendall_p(y: np.ndarray, ties: bool = True) -> float:
    """Mann's test by two loops."""
    n = len(y)
    score = sum(np.sign(y[j] - y[i]) for i in range(n) for j in range(i + 1, n))
    tied = 0.0
    for value in set(y.tolist()) if ties else ():
        t = int((y == value).sum())
        tied += t * (t - 1) * (2 * t + 5)
    deviation = math.sqrt((n * (n - 1) * (2 * n + 5) - tied) / 18)
    return float(2 * stats.norm.sf(max(0.0, abs(score) - 1) / deviation))


@pytest.mark.parametrize("seed", range(6))
def test_the_trend_test_is_manns_with_ties_corrected(seed: int) -> None:
    rng = np.random.default_rng(seed)
    y = np.round(rng.normal(size=20) + 0.1 * np.arange(20), seed % 2)

    assert mann_kendall(y) == pytest.approx(kendall_p(y))
    assert mann_kendall(np.insert(y, 4, [np.nan, np.inf])) == pytest.approx(kendall_p(y))


def test_the_trend_test_takes_eight_values_and_sees_none_in_a_constant() -> None:
    assert mann_kendall(np.arange(7.0)) is None
    assert mann_kendall(np.arange(8.0)) == pytest.approx(kendall_p(np.arange(8.0)))
    assert mann_kendall(np.ones(12)) == 1.0


def test_column_trends_are_the_slope_and_the_test_of_every_column() -> None:
    values = with_gaps((24, 6), seed=3) + np.arange(24)[:, None] * np.linspace(-0.3, 0.3, 6)

    slopes, p = column_trends(values)

    for column in range(6):
        known = np.isfinite(values[:, column])
        y, x = values[known, column], np.flatnonzero(known)
        assert slopes[column] == pytest.approx(stats.theilslopes(y, x).slope)
        assert p[column] == pytest.approx(kendall_p(y, ties=False))
    slopes, p = column_trends(np.ones((8, 1)))
    assert (slopes[0], p[0]) == (0, 1)


def test_what_a_trend_leaves_is_measured_over_what_is_known() -> None:
    values = with_gaps((32, 8), seed=4, share=0.4) + np.arange(32)[:, None] * 0.2 + 50
    values[:, 7] = np.nan

    residual, slope = detrended(values)

    for column in range(7):
        known = np.flatnonzero(np.isfinite(values[:, column]))
        line = np.polyfit(known, values[known, column], 1)
        assert slope[column] == pytest.approx(line[0])
        np.testing.assert_allclose(
            residual[known, column], values[known, column] - np.polyval(line, known), atol=1e-9
        )
    assert np.isnan(residual[np.isnan(values)]).all()
    assert slope[7] == 0


def test_a_line_explains_all_some_or_less_than_the_mean_does() -> None:
    x = np.arange(10.0)
    y = 2 * x + np.array([1, -1] * 5)
    fit = stats.linregress(x, y)

    assert r_squared(x, y, fit.slope, fit.intercept) == pytest.approx(fit.rvalue**2)
    assert r_squared(x, 3 * x, 3.0, 0.0) == 1.0
    assert r_squared(x, x, -1.0, 0.0) < 0
    assert r_squared(x, np.ones(10), 5.0, 0.0) == 1.0


@pytest.mark.parametrize("count", [1, 2, 7, 8, 1000, 50_001])
@pytest.mark.parametrize("spread_by", [0.0, 0.3, 8.0])
def test_the_middle_of_many_values_is_their_median(count: int, spread_by: float) -> None:
    values = np.exp(np.random.default_rng(count).normal(0, spread_by, count))
    ordered = np.sort(values)  # no sample of neighbours is like the whole

    for some in (values, ordered, np.r_[ordered[1::2], ordered[::2]]):
        assert middle(some) == np.median(some)
        assert middle(some, 1.5) == np.median(np.abs(some - 1.5))


def test_a_sample_that_misleads_costs_a_second_look_only() -> None:
    values = np.ones(3 * 4096)
    values[::3] = 100.0  # what the sample sees

    assert middle(values) == 1.0
