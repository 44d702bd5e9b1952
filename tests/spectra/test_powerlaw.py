"""The fitted tail against the plain loop that weightwatcher runs, and against weightwatcher."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import scipy.stats

from gradscope.spectra import powerlaw
from gradscope.spectra.powerlaw import LEAST, PowerLaw, fit, p_value

Values = npt.NDArray[np.float64]


def pareto(n: int, seed: int) -> Values:
    return np.random.default_rng(seed).pareto(2.0, n) + 1


def with_bulk(n: int, seed: int) -> Values:
    rng = np.random.default_rng(seed)
    return np.concatenate([rng.chisquare(3, n - n // 5), 10 + 10 * rng.pareto(1.5, n // 5)])


def of_matrix(n: int, seed: int) -> Values:
    w = np.random.default_rng(seed).standard_t(3, (n, 2 * n))
    return np.asarray(np.linalg.svd(w, compute_uv=False) ** 2)


def rounded(n: int, seed: int) -> Values:
    """Many equal values: candidates of equal distance."""
    return np.round(np.random.default_rng(seed).lognormal(size=n), 1) + 0.1


KINDS: list[Callable[[int, int], Values]] = [pareto, with_bulk, of_matrix, rounded]


def by_a_loop(eigenvalues: Values) -> PowerLaw:
    """Every beginning tried in full, in scalars."""
    data = sorted(float(x) for x in eigenvalues if x > LEAST)
    best: tuple[float, float, float] | None = None
    for i in range(len(data) - 1):
        tail, n = data[i:], len(data) - i
        logs = math.fsum(math.log(x / data[i]) for x in tail)
        if logs <= 0 or (len(data) < 20 and n < 8):
            continue
        alpha = 1 + (n - (len(data) < 20)) / logs
        if alpha <= 1:
            continue
        fitted = (1 - (x / data[i]) ** (1 - alpha) for x in tail)
        distance = max(abs(f - k / n) for k, f in enumerate(fitted))
        if best is None or distance < best[0] - 1e-13:
            best = distance, alpha, data[i]
    assert best is not None
    distance, alpha, xmin = best
    return PowerLaw(alpha, xmin, distance, sum(x >= xmin for x in data))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [8, 19, 20, 60, 300])
def test_the_fit_is_that_of_trying_every_beginning(kind: Any, n: int) -> None:
    for seed in range(3):
        data = kind(n, seed)
        found, wanted = fit(data), by_a_loop(data)

        assert found is not None
        assert (found.xmin, found.tail) == (wanted.xmin, wanted.tail)
        assert found.alpha == pytest.approx(wanted.alpha, rel=1e-10)
        assert found.distance == pytest.approx(wanted.distance, abs=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [12, 20, 200, 1500])
def test_the_fit_is_that_of_weightwatcher(
    kind: Any, n: int, capsys: pytest.CaptureFixture[str]
) -> None:
    reason = "weightwatcher is not installed (the extra `oracles`)"
    ww = pytest.importorskip("weightwatcher.WW_powerlaw", reason=reason)
    data = kind(n, 5)

    found, theirs = fit(data), ww.WWFit(data)

    assert found is not None
    assert abs(found.alpha - theirs.alpha) < 1e-9
    assert abs(found.distance - theirs.D) < 1e-12
    assert found.xmin == theirs.xmin


def test_few_distances_are_computed_in_full(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    whole = powerlaw._distance

    def counted(data: Values, alpha: float, first: int) -> float:
        calls.append(first)
        return whole(data, alpha, first)

    monkeypatch.setattr(powerlaw, "_distance", counted)

    fit(of_matrix(500, 0))

    assert len(calls) < 60


def test_the_exponent_of_a_power_law_is_found() -> None:
    data = scipy.stats.pareto(b=1.5).rvs(20_000, random_state=1)  # density x^-2.5

    found = fit(data)

    assert found is not None
    assert abs(found.alpha - 2.5) < 4 * 1.5 / math.sqrt(found.tail)


@pytest.mark.parametrize(
    "data", [[], [1.0], [0.0, 0.0, 0.0], [1e-6] * 50, [2.0] * 50, [1.0, 2.0, 3.0]]
)
def test_what_has_no_tail_has_no_fit(data: list[float]) -> None:
    assert fit(np.array(data)) is None


def test_a_power_law_is_not_ruled_out_and_another_law_is() -> None:
    straight = pareto(300, 1)
    rng = np.random.default_rng(2)
    curved = np.concatenate([np.full(150, 5.0) + rng.random(150), np.full(150, 9.0)])

    for data, ruled_out in ((straight, False), (curved, True)):
        found = fit(data)
        assert found is not None
        assert (p_value(data, found, 40) < 0.1) is ruled_out


def test_a_p_value_is_the_same_again() -> None:
    data = with_bulk(200, 3)
    found = fit(data)

    assert found is not None
    assert p_value(data, found, 20) == p_value(data, found, 20)
