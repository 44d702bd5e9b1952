"""How alike maps are, by SciPy; how concentrated, by closed forms."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import stats

from gradscope.attribution.evaluation.similarity import (
    agreement,
    complexity,
    concentration,
    sparseness,
    spearman,
)

maps = hnp.arrays(np.float64, (4, 5), elements=st.integers(-3, 3).map(float))


@given(maps, maps)
def test_rank_correlation_is_scipys_and_zero_for_constant_maps(a: Any, b: Any) -> None:
    found = spearman(torch.from_numpy(a), torch.from_numpy(b))

    if np.ptp(a) == 0 or np.ptp(b) == 0:
        assert found == 0
    else:
        assert found == pytest.approx(stats.spearmanr(a.ravel(), b.ravel()).statistic, abs=1e-12)


def test_concentration_is_the_share_of_the_strongest_tenth() -> None:
    assert concentration(torch.ones(10, 10)) == pytest.approx(0.1)
    point = torch.zeros(10, 10)
    point[3, 4] = -2
    assert concentration(point) == 1
    assert concentration(torch.zeros(10, 10)) is None
    assert concentration(torch.full((2, 2), torch.nan)) is None


@given(maps)
def test_sparseness_is_half_the_mean_difference_of_pixels_over_their_mean(a: Any) -> None:
    size = np.abs(a).ravel()
    found = sparseness(torch.from_numpy(a))

    if size.sum() == 0:
        assert found is None
    else:
        apart = np.abs(size[:, None] - size[None]).mean()
        assert found == pytest.approx(apart / 2 / size.mean(), abs=1e-12)


def test_sparseness_goes_from_flat_to_a_point() -> None:
    point = torch.zeros(10, 10)
    point[3, 4] = -2

    assert sparseness(torch.ones(10, 10)) == pytest.approx(0)
    assert sparseness(point) == pytest.approx(0.99)
    assert sparseness(torch.full((2, 2), torch.nan)) is None


def test_complexity_is_the_entropy_of_a_hundred_bins() -> None:
    values = torch.randn((20, 30), generator=torch.Generator().manual_seed(0))

    wanted = stats.entropy(np.histogram(values.numpy(), 100)[0])

    assert complexity(values) == pytest.approx(wanted, rel=1e-12)
    assert complexity(torch.ones(4, 4)) == 0


def test_agreement_compares_what_speaks_for_the_target() -> None:
    a = torch.tensor([[1.0, 2.0], [-3.0, 0.0]])

    found = agreement({"x": a, "y": a.clamp(min=0), "z": -a})

    assert found["x"]["y"] == pytest.approx(1)
    assert found["x"]["z"] < 0
    assert set(found["z"]) == {"x", "y"}
