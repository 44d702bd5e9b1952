"""What gradients are measured against."""

from __future__ import annotations

import math

import numpy as np
import pytest

from gradscope.flow.graph import graph_of
from gradscope.flow.joining import series
from gradscope.flow.levels import levels, loss_side, own_level, own_records, reference

from .made import made, noise


@pytest.mark.parametrize(
    ("layers", "anchors"),
    [(1, []), (2, [1]), (7, [6]), (8, [6, 7]), (12, [9, 10, 11]), (40, [37, 38, 39])],
)
def test_the_loss_side_is_a_quarter_of_a_kind_and_at_most_three_layers(
    layers: int, anchors: list[int]
) -> None:
    s = series(made(noise(5, layers)))

    assert loss_side(s, graph_of(s), "weight") == anchors


def test_each_kind_has_a_reference_of_its_own() -> None:
    norms = np.tile([1.0, 100.0, 4.0, 25.0, 7.0], (3, 1))
    kinds = ["matrix", "bias", "conv", "bias", "norm"]
    s = series(made(norms, kinds=kinds, numel=[1, 1, 4, 1, 1]))

    found = np.exp(reference(s, graph_of(s)))

    # The single norm layer has nothing to be compared with.
    np.testing.assert_allclose(found, np.tile([2.0, 25.0, 2.0, 25.0, np.nan], (3, 1)))


def test_the_reference_is_that_of_the_same_record_and_leaves_out_zeros() -> None:
    norms = noise(6, 12)
    norms[2, 10] = 0.0
    norms[3, 9:] = 0.0
    s = series(made(norms, numel=1))

    found = reference(s, graph_of(s))[:, 0]

    logs = np.log(np.where(s.norm[:, 9:] > 0, s.norm[:, 9:], np.nan))
    assert np.isnan(found[3])
    for t in (0, 1, 2, 4, 5):
        assert found[t] == pytest.approx(np.nanmedian(logs[t]))


def test_the_topology_says_what_is_next_to_the_loss() -> None:
    backwards = np.array([[3, 2], [2, 1], [1, 0], [0, 4]])
    s = series(made(noise(5, 4), edges=backwards, topology="given"))

    assert loss_side(s, graph_of(s), "weight") == [0]


@pytest.mark.parametrize(
    ("records", "first", "end"), [(40, 10, 20), (100, 20, 45), (1000, 50, 114), (8, 2, 4)]
)
def test_a_layers_own_level_is_from_the_records_after_warm_up(
    records: int, first: int, end: int
) -> None:
    s = series(made(noise(records, 2)))

    assert (own_records(s).start, own_records(s).stop) == (first, end)


def test_an_own_level_takes_eight_records() -> None:
    norms = noise(100, 3)
    norms[20:37, 1] = 0
    norms[20:38, 2] = 0
    s = series(made(norms, numel=1))

    found, since = own_level(s)

    assert since.tolist() == [45, 45, 45]
    assert found[0] == pytest.approx(np.median(np.log(s.norm[20:45, 0])))
    assert found[1] == pytest.approx(np.median(np.log(s.norm[37:45, 1])))
    assert np.isnan(found[2])


@pytest.mark.parametrize(
    ("record", "factor", "told"),
    [
        (7, 30, False), (8, 30, True), (30, 30, True), (45, 30, False),
        (3, 100, False), (4, 100, True), (7, 100, True), (45, 100, False),
    ],
)  # fmt: skip
def test_a_layer_that_leaves_its_level_early_for_good_is_compared_with_that_before(
    record: int, factor: float, told: bool
) -> None:
    norms = noise(100, 3, scale=0.05)
    norms[record:, 1] *= factor
    s = series(made(norms, numel=1))

    level, since = own_level(s)

    assert since.tolist() == [45, record if told else 45, 45]
    before = s.norm[max(0, record - 16) : record] if told else s.norm[20:45]
    assert level[1] == pytest.approx(np.median(np.log(before[:, 1])))


@pytest.mark.parametrize("rise", ["brief", "steady", "small"])
def test_a_spike_a_climb_and_a_rise_by_less_than_ten_leave_no_level(rise: str) -> None:
    norms = noise(100, 3, scale=0.05)
    norms[:, 1] *= {
        "brief": np.where((np.arange(100) >= 30) & (np.arange(100) < 33), 50, 1),
        "steady": np.exp(np.minimum(0.4 * np.arange(100), 12)),
        "small": np.where(np.arange(100) >= 30, 8, 1),
    }[rise]

    assert own_level(series(made(norms)))[1].tolist() == [45, 45, 45]


def test_levels_are_nats_below_the_loss_side_and_below_the_own_past() -> None:
    norms = np.ones((100, 4))
    norms[:, 0] = math.exp(-2)
    norms[60:, 1] = math.exp(-5)
    norms[70, 2] = 0
    s = series(made(norms, numel=1))

    found = levels(s, graph_of(s))

    np.testing.assert_allclose(found.below_loss[:, 0], 2, rtol=1e-6)
    assert found.below_loss[59, 1] == 0
    assert found.below_own[80, 1] == pytest.approx(5)
    assert found.below_own[80, 0] == pytest.approx(0, abs=1e-6)
    assert found.below_loss[70, 2] == found.below_own[70, 2] == np.inf
    assert np.isnan(found.below_own[:45]).all()
    assert np.isfinite(found.below_own[45]).all()


def test_epsilon_attenuates_adaptive_optimizers_alone() -> None:
    def of(**optimizer: object) -> np.ndarray | None:
        s = series(made(np.full((3, 2), 2e-3), numel=4, meta={"optimizer": optimizer}))
        return levels(s, graph_of(s)).attenuation

    found = of(**{"class": "AdamW", "eps": 3e-3})
    assert found is not None
    np.testing.assert_allclose(found, 0.25, rtol=1e-6)
    assert of(**{"class": "torch.optim.Adam", "eps": 1}) is not None
    assert of(**{"class": "SGD", "eps": 1e-8}) is None
    assert of(**{"class": "Adam", "eps": 0}) is None
    assert of(**{"class": "Adam"}) is None
    s = series(made(np.ones((3, 2)), numel=None, meta={"optimizer": {"class": "Adam", "eps": 1.0}}))
    assert levels(s, graph_of(s)).attenuation is None
    assert levels(series(made(np.ones((3, 2)))), graph_of(s)).attenuation is None
