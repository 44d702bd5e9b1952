"""The tests for vanishing and exploding gradients, cell by cell."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from gradscope import analyze_flow
from gradscope.flow.exploding import exploding, loss_rises
from gradscope.flow.graph import graph_of
from gradscope.flow.joining import series
from gradscope.flow.levels import levels
from gradscope.flow.result import FlowResult
from gradscope.flow.vanishing import vanishing
from gradscope.histories.history import History

from .made import made, noise


def vanish(history: History, test: str) -> np.ndarray:
    s = series(history)
    return vanishing(s, levels(s, graph_of(s))).tests[test]


def explode(history: History, test: str) -> np.ndarray:
    s = series(history)
    return exploding(s, levels(s, graph_of(s))).tests[test]


def flat(records: int, layers: int) -> np.ndarray:
    return np.ones((records, layers))


def result(history: History) -> FlowResult:
    found = analyze_flow(history).result
    assert found is not None
    return found


# --- vanishing ------------------------------------------------------------------------------------


def test_depth_enters_at_three_decades_and_leaves_half_a_decade_inside() -> None:
    norms = flat(12, 4)
    norms[:, 1] = 10.0 ** -np.array([2, 2.6, 2.9, 3.01, 2.6, 2.4, 2.6, 2.6, 3.5, 2.51, 2.49, 0])

    found = vanish(made(norms), "depth")

    assert found[:, 1].tolist() == [t in (1, 2, 3, 4, 6, 7, 8, 9) for t in range(12)]
    assert not found[:, [0, 2, 3]].any()


@pytest.mark.parametrize("layers", [2, 3, 7])
def test_a_batch_whose_loss_is_zero_is_no_fall_of_single_layers(layers: int) -> None:
    """Triplets that are all told apart: the whole network is at zero for a few records."""
    norms = flat(100, layers)
    norms[[60, 62, 63, 64, 70, 71]] = 0

    assert not vanish(made(norms), "time").any()
    norms[60:65, :-1], norms[60:65, -1] = 0, 1.0
    assert vanish(made(norms), "time")[60:65, :-1].all()


def test_time_is_a_fall_below_the_own_level_that_the_network_does_not_share() -> None:
    norms = flat(100, 5)
    norms[60:70, 4] *= 10**-3.2
    norms[80:90] *= 10**-1.1
    norms[80:90, 4] *= 10**-3.0
    one = made(norms)

    found = vanish(one, "time")

    assert np.flatnonzero(found[:, 4]).tolist() == list(range(60, 70))
    assert not found[:, :4].any()


@pytest.mark.parametrize(("network", "fires"), [(0.9, True), (1.0, False)])
def test_a_network_that_falls_a_decade_falls_together(network: float, fires: bool) -> None:
    norms = flat(100, 5)
    norms[60:] *= 10**-network * 0.9999
    norms[60:, 2] *= 10**-2.5

    assert bool(vanish(made(norms), "time")[60:, 2].all()) is fires


def test_layers_at_zero_do_not_pull_the_network_down() -> None:
    norms = flat(100, 7)
    norms[60:, :3] = 0
    norms[60:, 3] *= 10**-3.5

    assert vanish(made(norms), "time")[60:, 3].all()


@pytest.mark.parametrize(
    ("ratio", "network", "fires"),
    [(9e-7, 2e-5, True), (1.1e-6, 2e-5, False), (9e-7, 9e-6, False)],
)
def test_a_layer_stands_still_while_the_median_layer_moves(
    ratio: float, network: float, fires: bool
) -> None:
    updates = np.tile([ratio, network, network], (10, 1))
    history = made(flat(10, 3), numel=1, param_l2=flat(10, 3), update_l2=updates)

    assert bool(vanish(history, "update")[:, 0].all()) is fires
    assert not vanish(history, "update")[:, 1:].any()


def test_a_gradient_of_zero_is_dead_rather_than_standing_still() -> None:
    norms = flat(10, 3)
    norms[4, 0] = 0
    updates = np.tile([0.0, 1e-3, 1e-3], (10, 1))

    found = vanish(made(norms, numel=1, param_l2=flat(10, 3), update_l2=updates), "update")

    assert found[:, 0].tolist() == [t != 4 for t in range(10)]


def test_epsilon_holds_a_layer_back_while_it_does_not_the_others() -> None:
    norms = np.tile([0.9, 1.1, 5.0, 5.0], (10, 1))
    adam = {"optimizer": {"class": "Adam", "eps": 1.0}}

    assert (
        vanish(made(norms, numel=1, meta=adam), "update").tolist()
        == [[True, False, False, False]] * 10
    )
    assert not vanish(made(norms * 0.1, numel=1, meta=adam), "update").any()
    assert not vanish(made(norms, numel=1), "update").any()


@pytest.mark.parametrize("name", ["float16", "torch.float16", "half", "fp16"])
def test_half_precision_underflows_near_its_smallest_number_or_by_zeros(name: str) -> None:
    norms = np.tile([6.0e-4, 6.2e-4, 1.0, 1.0], (10, 1))
    zeros = np.tile([0.1, 0.5, 0.51, 0.999], (10, 1))
    meta = {"precision": {"grad": name}}

    # Ten times 2^-14 is 6.1e-4.
    assert vanish(made(norms, numel=1, meta=meta), "numeric")[0].tolist() == [
        True,
        False,
        False,
        False,
    ]
    told = vanish(made(norms, numel=1, meta=meta, zero_fraction=zeros), "numeric")
    assert told[0].tolist() == [True, False, True, False]
    unknown = made(norms, numel=None, meta=meta, zero_fraction=zeros)
    assert vanish(unknown, "numeric")[0].tolist() == [False, False, True, False]


@pytest.mark.parametrize("meta", [{}, {"precision": {"grad": "bfloat16"}}, {"precision": "fp16"}])
def test_wider_types_do_not_underflow(meta: dict[str, Any]) -> None:
    zeros = np.full((10, 2), 0.7)

    assert not vanish(made(flat(10, 2) * 1e-9, meta=meta, zero_fraction=zeros), "numeric").any()


def test_records_that_were_skipped_or_are_not_finite_fail_no_test() -> None:
    norms = flat(20, 4)
    norms[:, 1] = 1e-5
    norms[5, 1] = np.nan
    skipped = np.zeros(20, np.uint8)
    skipped[9] = 1

    found = vanish(made(norms, skipped=skipped), "depth")

    assert found[:, 1].tolist() == [t not in (5, 9) for t in range(20)]


def test_a_region_tells_its_peak_and_what_is_dead_is_not_part_of_it() -> None:
    norms = flat(60, 8)
    norms[10:40, 2] = 1e-4
    norms[20, 2] = 1e-6
    norms[30:36, 2] = 0
    norms[45:, 5] = 0

    first, second = result(made(norms, steps=np.arange(60) * 3)).vanishing_regions

    assert (first.peak.value, first.peak.step) == (pytest.approx(6), 60)
    assert (first.extent.onset, first.extent.end) == ((27, 30), 87)
    assert second.extent.onset == (105, 108)
    assert second.peak.layer_name == "layers.2"


def test_regions_by_steps_alone_have_no_peak() -> None:
    updates = np.tile([1e-8, 1e-3, 1e-3], (30, 1))

    (region,) = result(made(flat(30, 3), param_l2=flat(30, 3), update_l2=updates)).vanishing_regions

    assert region.peak is None
    assert region.tests == ("update",)
    assert region.update_ratio == pytest.approx(1e-8)
    assert region.severity_level == "moderate"


def test_a_stack_is_systemic_only_where_depth_lost_the_gradient() -> None:
    norms = flat(60, 10) * 10.0 ** (-0.6 * np.arange(10)[::-1])
    adam = {"optimizer": {"class": "Adam", "eps": 1e-20}}

    regions = result(made(norms, meta=adam)).vanishing_regions

    assert [r.systemic for r in regions] == [True]
    assert regions[0].severity_level == "severe"
    assert all(f.nats_per_layer == pytest.approx(0.6 * math.log(10)) for f in regions[0].facts)
    assert all(f.attenuation == pytest.approx(1) for f in regions[0].facts)


# --- exploding ------------------------------------------------------------------------------------


def test_a_level_lasts_eight_records_ten_times_above_its_own() -> None:
    norms = flat(200, 3)
    norms[100:107, 0] = 20
    norms[100:108, 1] = 11
    norms[100:120, 2] = 9

    found = explode(made(norms), "level")

    assert not found[:, [0, 2]].any()
    assert np.flatnonzero(found[:, 1]).tolist() == list(range(100, 108))


def test_a_level_holds_on_until_a_third() -> None:
    norms = flat(200, 1)
    norms[100:120, 0], norms[110, 0] = 3.4, 10.5
    norms[120:130, 0] = 3.3

    assert np.flatnonzero(explode(made(norms), "level")).tolist() == list(range(100, 120))


def test_depth_is_seventy_times_the_loss_side_and_holds_on_for_a_nat() -> None:
    norms = flat(8, 4)
    norms[:, 0] = [1, 26, 30, 71, 26, 25, 26, 69]

    assert np.flatnonzero(explode(made(norms), "depth")[:, 0]).tolist() == [1, 2, 3, 4]


def test_steps_are_large_above_a_tenth_and_after_warm_up() -> None:
    updates = np.tile([0.11, 0.1, 0.05], (40, 1))

    found = explode(made(flat(40, 3), numel=1, param_l2=flat(40, 3), update_l2=updates), "update")

    assert np.flatnonzero(found[:, 0]).tolist() == list(range(10, 40))
    assert not found[:, 1:].any()


@pytest.mark.parametrize("length", [1, 2, 3])
def test_a_burst_of_gradients_that_are_not_finite_is_a_region_however_short(length: int) -> None:
    norms = noise(60, 6)
    norms[30 : 30 + length, 2] = np.nan
    norms[50, 5] = np.inf

    first, second = result(made(norms)).exploding_regions

    assert first.affected_layers == ("layers.2",)
    assert first.tests == ("non-finite",)
    assert first.severity_level == "critical"
    assert first.extent.onset == (29, 30)
    assert first.extent.records == length
    assert math.isnan(first.peak.value)
    assert (second.affected_layers, second.extent.records) == (("layers.5",), 1)


def test_a_burst_inside_a_lasting_region_is_a_region_of_its_own_and_does_not_end_it() -> None:
    norms = noise(200, 6, scale=0.05)
    norms[100:140, 1] *= 40
    norms[120, 1] = np.nan
    norms[160, 1] = np.nan
    norms[120, 5] = np.nan

    regions = result(made(norms)).exploding_regions

    assert [(r.affected_layers, r.extent.records) for r in regions] == [
        (("layers.1",), 40),
        (("layers.1",), 1),
        (("layers.5",), 1),
        (("layers.1",), 1),
    ]
    assert "level" in regions[0].tests
    assert all(region.tests == ("non-finite",) for region in regions[1:])
    assert regions[0].peak.value == pytest.approx(np.nanmax(norms[100:140, 1]))


def test_a_skipped_step_does_not_explode() -> None:
    norms = noise(60, 3)
    norms[30] = np.inf
    skipped = np.zeros(60, np.uint8)
    skipped[30] = 1

    assert result(made(norms, skipped=skipped)).exploding_regions == ()


@pytest.mark.parametrize(
    ("loss", "rises"),
    [
        (None, None),
        (np.full(40, np.nan), None),
        (np.linspace(2, 1, 40), False),
        (np.linspace(1, 2, 40), True),
        (np.ones(40), False),
        (np.where(np.arange(40) == 29, np.nan, 1.0), True),
        (np.where(np.arange(40) < 20, np.nan, 1.0), None),
        # By more than twice the spread of the records before.
        (np.where(np.arange(40) < 20, 1 + 0.1 * (-1.0) ** np.arange(40), 1.25), True),
        (np.where(np.arange(40) < 20, 1 + 0.1 * (-1.0) ** np.arange(40), 1.15), False),
    ],
)
def test_the_loss_rises_against_as_many_records_before(
    loss: np.ndarray | None, rises: bool | None
) -> None:
    assert loss_rises(loss, 20, 30) is rises


def test_the_end_of_a_region_counts_and_the_start_of_a_history_is_its_own_past() -> None:
    late = np.r_[np.ones(30), np.full(10, 9.0)]
    assert loss_rises(late, 20, 31) is False
    assert loss_rises(late, 20, 36) is True
    assert loss_rises(np.r_[1.0, 1, 1, np.full(20, 5.0)], 0, 20) is True
    assert loss_rises(np.r_[np.full(8, 9.0), np.ones(12), np.full(20, 5.0)], 20, 30) is True


def test_growth_and_levels_are_told_with_the_rate_and_the_ratio_they_hold() -> None:
    norms = noise(300, 5, scale=0.02)
    norms[200:] *= np.exp(0.04 * np.arange(100))[:, None]

    (region,) = result(made(norms, steps=np.arange(300) * 4)).exploding_regions

    facts = region.facts[0]
    assert len(region.facts) == 5
    assert facts.growth == pytest.approx(0.01, rel=0.05)
    assert facts.own_ratio == pytest.approx(math.exp(0.04 * 97), rel=0.15)
    assert facts.depth_nats == -math.inf
    assert facts.update_ratio == -math.inf
    assert {"growth", "level"} <= set(facts.held_tests)


@pytest.mark.parametrize(("end", "regions"), [(15, 0), (25, 1)])
def test_a_layer_behind_a_branch_that_starts_from_zero_does_not_vanish(
    end: int, regions: int
) -> None:
    norms = noise(200, 6, scale=0.05)
    norms[:end, 2] *= 1e-5

    assert len(result(made(norms)).vanishing_regions) == regions


@pytest.mark.parametrize("kind", ["matrix", "embedding"])
@pytest.mark.parametrize("share", [0.5, 0.95])
def test_the_share_of_elements_without_a_gradient_is_the_median_of_the_region(
    share: float, kind: str
) -> None:
    """Most of the units behind a layer are dead; of an embedding a batch touches few rows."""
    norms, zeros = noise(100, 6), np.full((100, 6), 0.1)
    norms[60:, 2] *= 1e-5
    zeros[60:, 2] = np.linspace(share - 0.02, share + 0.02, 40)
    kinds = ["matrix"] * 6
    kinds[2] = kinds[5] = kind

    (region,) = result(made(norms, zero_fraction=zeros, kinds=kinds)).vanishing_regions

    (facts,) = region.facts
    assert facts.zeros == (None if kind == "embedding" else pytest.approx(share, abs=1e-6))
    assert ("units are dead" in region.cause) is (kind == "matrix" and share > 0.9)
