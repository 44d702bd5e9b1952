"""Median and spread of what came before, against a loop over slices."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from gradscope.flow.trailing import following, leaps, trailing


@pytest.mark.parametrize(("window", "least"), [(1, 1), (5, 2), (8, 8), (16, 3)])
def test_each_record_is_compared_with_the_finite_ones_before_it(window: int, least: int) -> None:
    rng = np.random.default_rng(window)
    values = np.round(rng.normal(size=(60, 4)), 1)
    values[rng.random((60, 4)) < 0.2] = np.nan
    values[5, 0] = np.inf

    medians, spreads = trailing(values, window, least)

    for t in range(60):
        for layer in range(4):
            before = values[:t, layer]
            before = before[np.isfinite(before)][-window:]
            if len(before) < least:
                assert np.isnan(medians[t, layer])
                assert np.isnan(spreads[t, layer])
            else:
                assert medians[t, layer] == pytest.approx(np.median(before))
                deviation = stats.median_abs_deviation(before)
                assert spreads[t, layer] == pytest.approx(1.4826 * deviation)


@pytest.mark.parametrize("window", [1, 3, 8])
def test_the_median_of_what_follows_leaves_the_record_itself_out(window: int) -> None:
    rng = np.random.default_rng(window)
    values = np.round(rng.normal(size=(40, 3)), 1)
    values[rng.random((40, 3)) < 0.2] = np.nan
    where = rng.random((40, 3)) < 0.5

    found = following(values, where, window)

    assert np.isnan(found[~where]).all()
    for t, layer in np.argwhere(where):
        after = values[t + 1 :, layer]
        after = after[np.isfinite(after)][:window]
        assert found[t, layer] == pytest.approx(
            np.median(after) if len(after) else np.nan, nan_ok=True
        )


@pytest.mark.parametrize("share", [0.02, 0.3, 1.0])
def test_some_records_alone_are_compared_as_all_are(share: float) -> None:
    rng = np.random.default_rng(3)
    values = np.round(rng.normal(size=(400, 5)), 1)
    values[rng.random((400, 5)) < 0.2] = np.nan
    where = rng.random((400, 5)) < share

    some, every = trailing(values, 16, 3, where), trailing(values, 16, 3)

    for found, whole in zip(some, every, strict=True):
        np.testing.assert_array_equal(found[where], whole[where])
        assert np.isnan(found[~where]).all()


@pytest.mark.parametrize("gaps", [0.0, 0.2])
@pytest.mark.parametrize("scale", [0.3, 2.0])
def test_a_leap_is_above_the_median_of_the_few_before(gaps: float, scale: float) -> None:
    rng = np.random.default_rng(5)
    values = rng.normal(size=(203, 7)) * scale
    values[rng.random((203, 7)) < gaps] = np.nan
    values[90:, 2] += 3
    if gaps:
        values[50, 1] = np.inf

    found = leaps(values, 8, 1.2)

    assert found.any()
    for t in range(203):
        for layer in range(7):
            before = values[:t, layer][np.isfinite(values[:t, layer])][-8:]
            leapt = len(before) and np.isfinite(values[t, layer])
            expected = bool(leapt and values[t, layer] - np.median(before) > 1.2)
            assert found[t, layer] == expected
