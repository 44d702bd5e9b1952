"""Where the spectrum of noise ends, told from noise, signal and the closed form."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest
import scipy.integrate

from gradscope.spectra.marchenko import bulk, random_rank

Values = npt.NDArray[np.float64]


def eigenvalues(w: Values) -> Values:
    return np.sort(np.linalg.svd(w, compute_uv=False) ** 2)


def noise(m: int, n: int, seed: int = 0, scale: float = 0.05) -> Values:
    return np.random.default_rng(seed).normal(0, scale, (m, n))


def median_of_law(ratio: float) -> float:
    """By SciPy's quadrature of the density, in units of the variance times the long side."""
    a, b = (1 - math.sqrt(ratio)) ** 2, (1 + math.sqrt(ratio)) ** 2
    density = lambda x: math.sqrt((b - x) * (x - a)) / (2 * math.pi * ratio * x)  # noqa: E731
    share = lambda x: scipy.integrate.quad(density, a, x, limit=200)[0] - 0.5  # noqa: E731
    return float(scipy.optimize.brentq(share, a + 1e-9, b))


@pytest.mark.parametrize(("m", "n"), [(100, 100), (100, 300), (40, 4000), (300, 100), (1000, 999)])
def test_the_edge_of_noise_is_that_of_its_scale(m: int, n: int) -> None:
    found = bulk(eigenvalues(noise(m, n)), m, n)

    assert found is not None
    assert found.scale == pytest.approx(0.05, rel=0.02)
    assert found.edge == pytest.approx(found.scale * (math.sqrt(m) + math.sqrt(n)))
    assert found.spikes == 0
    assert found.distance < 4 / min(m, n)


@pytest.mark.parametrize("ratio", [0.01, 0.1, 0.5, 0.9])
def test_the_median_is_that_of_the_density(ratio: float) -> None:
    """All eigenvalues at the median: the scale must come out as that of the law."""
    n = 1000
    m = round(ratio * n)

    found = bulk(np.full(m, 7.0), m, n)

    assert found is not None
    assert found.scale**2 == pytest.approx(7.0 / (n * median_of_law(ratio)), rel=1e-4)


def test_noise_hardly_ever_has_spikes() -> None:
    counts = [bulk(eigenvalues(noise(60, 150, seed)), 60, 150).spikes for seed in range(100)]

    assert sum(count > 0 for count in counts) <= 5


@pytest.mark.parametrize("spikes", [1, 5])
def test_signal_is_counted_and_does_not_move_the_edge(spikes: int) -> None:
    rng = np.random.default_rng(1)
    signal = rng.normal(0, 0.3, (200, spikes)) @ rng.normal(0, 1.0, (spikes, 500))

    alone = bulk(eigenvalues(noise(200, 500)), 200, 500)
    found = bulk(eigenvalues(noise(200, 500) + signal), 200, 500)

    assert alone is not None
    assert found is not None
    assert found.spikes == spikes
    assert found.edge == pytest.approx(alone.edge, rel=0.03)
    assert found.distance > 0.3


def test_the_edge_scales_with_the_matrix() -> None:
    values = eigenvalues(noise(50, 80))
    one, many = bulk(values, 50, 80), bulk(values * 1e-12, 50, 80)

    assert one is not None
    assert many is not None
    assert many.edge == pytest.approx(one.edge * 1e-6)
    assert many.spikes == one.spikes
    assert many.distance == pytest.approx(one.distance)


@pytest.mark.parametrize("rank", [0, 3, 20])
def test_of_a_matrix_of_few_ranks_there_is_no_bulk(rank: int) -> None:
    w = noise(50, rank) @ noise(rank, 80) if rank else np.zeros((50, 80))

    assert bulk(eigenvalues(w), 50, 80) is None


@pytest.mark.parametrize(("rows", "columns"), [(16, 64), (64, 64), (64, 768), (128, 96)])
def test_the_rank_of_a_random_matrix_is_that_of_drawn_ones(rows: int, columns: int) -> None:
    drawn = []
    for seed in range(8):
        s = np.linalg.svd(
            np.random.default_rng(seed).normal(size=(rows, columns)), compute_uv=False
        )
        drawn.append(np.exp(-(s / s.sum() * np.log(s / s.sum())).sum()))

    assert random_rank(rows, columns) == pytest.approx(np.mean(drawn), rel=0.01)
