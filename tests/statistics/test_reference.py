"""The norm that dead units are told by: who may be the majority, and who may not."""

from __future__ import annotations

import numpy as np
import pytest

from gradscope.statistics.units import DEAD, Norms, reference


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def dead(norms: Norms) -> list[int]:
    return [int(i) for i in np.flatnonzero((norms < DEAD * reference(norms)) | (norms == 0))]


def healthy(n: int, scale: float = 0.5) -> Norms:
    return scale * rng(n).uniform(0.7, 1.4, n)


@pytest.mark.parametrize("share", [0.0, 5e-4, 1e-6, 1e-30])
@pytest.mark.parametrize("lost", [0.3, 0.6, 2 / 3, 0.8, 0.9, 0.95, 0.99, 1.0])
@pytest.mark.parametrize("n", [2, 3, 5, 8, 10, 11, 16, 64, 384, 5000])
def test_the_living_tell_the_dead_whatever_their_share(n: int, lost: float, share: float) -> None:
    norms = healthy(n)
    many = min(int(lost * n), n - 1)  # all but one at most
    norms[:many] *= share
    assert dead(norms) == list(range(many))


@pytest.mark.parametrize("giants", [1, 2, 6])
@pytest.mark.parametrize("n", [2, 3, 5, 8, 10, 11, 16, 64, 384])
def test_a_few_giants_make_no_other_unit_dead(n: int, giants: int) -> None:
    norms = healthy(n)
    norms[: min(giants, max(1, n // 10))] *= 1e4
    assert dead(norms) == []


@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1.0, 1e3, 1e6])
@pytest.mark.parametrize("n", [1, 2, 9, 10, 100])
def test_units_of_one_kind_are_alive_at_any_scale(n: int, scale: float) -> None:
    assert dead(healthy(n, scale)) == []


def test_units_of_very_different_norms_are_alive() -> None:
    norms = np.exp(2 * rng().normal(size=1000))
    assert len(dead(norms)) <= 30  # those below a hundredth of the median
    assert dead(np.exp(rng().normal(size=1000))) == []


def test_a_dead_majority_beside_a_giant_is_told_by_the_living() -> None:
    norms = healthy(1000)
    norms[:985] *= 1e-4
    norms[999] = 500.0
    assert dead(norms) == list(range(985))


def test_units_of_zeros_alone_have_no_reference() -> None:
    assert reference(np.zeros(5)) == 0.0


def test_a_unit_is_dead_below_a_thousandth_and_not_on_it() -> None:
    norms = np.ones(20)
    norms[3], norms[4] = 1e-3, np.nextafter(1e-3, 0)
    assert dead(norms) == [4]
