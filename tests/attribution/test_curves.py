"""Insertion, deletion and ROAD: curves that can be written down, controls, early stops."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from torch import Tensor, nn

from gradscope.attribution.evaluation.curves import (
    Canvas,
    _settled,
    areas,
    canvas,
    faithfulness,
    moved,
    ordered,
    orders_of,
)
from gradscope.attribution.subject import Subject
from gradscope.models.forms import as_model


class Additive(nn.Module):
    """The "yes" logit of a picture is made so that its probability is a sum over pixels."""

    def __init__(self, weights: Tensor) -> None:
        super().__init__()
        self.weights = nn.Parameter(weights)

    def forward(self, x: Tensor) -> Tensor:
        share = (x[:, 0] * self.weights).sum((1, 2)).clamp(0, 1)
        return torch.stack([1 - share, share], 1)


def drawn(weights: Tensor, image: Tensor) -> Canvas:
    made = as_model(Additive(weights).requires_grad_(False))
    return canvas(Subject(made, image[None, None], torch.tensor([1])))


def test_four_pixels_give_the_curves_that_can_be_written_down() -> None:
    weights = torch.tensor([[0.1, 0.2], [0.3, 0.4]])
    orders = [torch.tensor([3, 2, 1, 0]), torch.tensor([0, 1, 2, 3])]

    (insertion, deletion), (_, other) = drawn(weights, torch.ones(2, 2)).curves(orders, steps=4)

    # A constant picture is its own blur, so insertion changes nothing.
    assert insertion == pytest.approx([1, 1, 1, 1, 1])
    assert deletion == pytest.approx([1, 0.6, 0.3, 0.1, 0])
    assert other == pytest.approx([1, 0.9, 0.7, 0.4, 0])
    ((_, below),) = areas(np.array([[insertion, deletion]]))
    assert below == pytest.approx((0.5 + 0.6 + 0.3 + 0.1) / 4)
    assert below == pytest.approx(np.trapezoid(deletion, np.linspace(0, 1, 5)))


def test_insertion_goes_from_the_blurred_picture_to_the_picture() -> None:
    image, weights = torch.zeros(16, 16), torch.zeros(16, 16)
    image[8, 8] = 1
    weights[8, 9], weights[8, 8] = 1, 0.5

    ((insertion, deletion),) = drawn(weights, image).curves([torch.arange(256)], steps=2)

    blurred = gaussian_filter(image.double().numpy(), 1.0, mode="mirror", radius=3)
    start = blurred[8, 9] + blurred[8, 8] / 2
    # Half of the pixels are the first eight rows: both that matter come after.
    assert insertion == pytest.approx([start, start, 0.5], rel=1e-5)
    assert deletion == pytest.approx([0.5, 0.5, 0])


def scattered() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    image = (torch.rand((16, 16), generator=generator) > 0.9).float()
    weights = torch.rand((16, 16), generator=generator) * image
    return weights / (weights * image).sum(), image


def test_the_best_order_beats_its_reverse_and_its_control_on_both_curves() -> None:
    weights, image = scattered()
    seen = drawn(weights, image)

    best, worst = (faithfulness(seen, values, 0) for values in (weights, -weights))

    assert best.insertion > worst.insertion + 0.05
    assert best.deletion < worst.deletion - 0.05
    control = best.control
    assert best.insertion > control.insertion_auc + 2 * control.insertion_spread
    assert best.deletion < control.deletion_auc - 2 * control.deletion_spread


def test_curves_begin_and_end_where_they_must_and_have_the_areas_that_are_told() -> None:
    weights, image = scattered()
    seen = drawn(weights, image)
    whole, blurred, nothing = seen.ends

    found = faithfulness(seen, weights, 0)

    for known, (insertion, deletion) in (
        (found, (found.insertion, found.deletion)),
        (found.control, (found.control.insertion_auc, found.control.deletion_auc)),
    ):
        assert known.insertion_curve[:: len(known.insertion_curve) - 1] == pytest.approx(
            [blurred, whole], abs=1e-6
        )
        assert known.deletion_curve[:: len(known.deletion_curve) - 1] == pytest.approx(
            [whole, nothing], abs=1e-6
        )
        at = np.linspace(0, 1, len(known.insertion_curve))
        assert np.trapezoid(known.insertion_curve, at) == pytest.approx(insertion, abs=1e-6)
        assert np.trapezoid(known.deletion_curve, at) == pytest.approx(deletion, abs=1e-6)


def test_a_constant_map_is_as_good_as_its_control() -> None:
    """Ties in raster order would give the upper left corner a meaning."""
    weights = torch.zeros(16, 16)
    weights[:8] = 1 / 128

    found = faithfulness(drawn(weights, torch.ones(16, 16)), torch.zeros(16, 16), 0)

    assert found.deletion_spread > 0
    assert found.deletion == pytest.approx(0.5, abs=0.05)
    control = found.control
    assert abs(found.deletion - control.deletion_auc) < 3 * control.deletion_spread + 0.02


def test_a_map_is_settled_when_it_is_the_best_or_surely_behind_or_nothing_moves() -> None:
    control = np.array([[0.5, 0.4], [0.52, 0.41], [0.48, 0.39]])
    # Insertion less deletion is 0.1, 0.11 and 0.09. Student's t for two degrees of freedom, and
    # the position that is to come.
    reach = 4.303 * 0.01 * (4 / 3) ** 0.5

    assert _settled(np.array([0.5, 0.385]), control)
    assert not _settled(np.array([0.5, 0.395]), control)
    assert _settled(np.array([0.5, 0.4 + 1.01 * reach]), control)
    assert not _settled(np.array([0.5, 0.4 + 0.99 * reach]), control)
    assert _settled(np.array([0.5, 0.5]), np.array([[0.5, 0.5], [0.5, 0.4995], [0.5, 0.5]]))


def test_more_positions_are_tried_only_of_a_map_in_doubt() -> None:
    spot = torch.zeros(16, 16)
    spot[:4, :4] = 1 / 16
    # Every position of the spot but its own is the same: nothing depends on what lies there.
    clear = drawn(spot, (spot > 0).float())
    flat = drawn(torch.zeros(16, 16), torch.ones(16, 16))
    noise = torch.rand((16, 16), generator=torch.Generator().manual_seed(0))

    assert faithfulness(clear, spot, 0).control.rankings == 3
    assert faithfulness(flat, spot, 0).control.rankings == 3
    assert faithfulness(clear, noise, 0).control.rankings == 8


def test_the_spread_of_insertion_less_deletion_is_that_of_the_places() -> None:
    spot = torch.zeros(16, 16)
    spot[:8, :8] = 1 / 64
    noise = torch.rand((16, 16), generator=torch.Generator().manual_seed(1))
    canvas_, generator = drawn(spot, torch.ones(16, 16)), torch.Generator().manual_seed(3)

    control = faithfulness(canvas_, noise, 0).control

    places = [ordered(m, generator) for m in moved(noise, 0)][: control.rankings]
    found = areas(canvas_.curves(places))
    wanted = np.std(found[:, 0] - found[:, 1], ddof=1)
    assert control.difference_spread == pytest.approx(wanted, rel=1e-6)


def test_a_controls_spread_is_that_of_its_places() -> None:
    weights = torch.zeros(16, 16)
    weights[:4, :4] = 1 / 16
    values = torch.arange(256.0).view(16, 16)

    control = faithfulness(drawn(weights, torch.ones(16, 16)), values, 0).control

    assert control.deletion_spread > 0.01
    assert control.insertion_spread == pytest.approx(0, abs=1e-6)  # a constant picture


def test_a_control_is_the_map_itself_elsewhere() -> None:
    values = torch.arange(20.0).view(4, 5)

    places = list(moved(values, 0, 40))

    # One in forty is where it was, and is no control.
    assert 36 <= len(places) <= 40
    assert not any(torch.equal(place, values) for place in places)
    rows = values.tolist()
    for place in places:
        unrolled = [torch.roll(p, (d, a), (0, 1)) for p in (place, place.flip(1)) for d in range(4)
                    for a in range(5)]  # fmt: skip
        assert rows in [u.tolist() for u in unrolled]


def test_equal_pixels_come_in_random_and_others_in_descending_order() -> None:
    values = torch.tensor([[1.0, 3.0, 1.0, 1.0], [1.0, 2.0, 1.0, 1.0]])

    orders = [ordered(values, torch.Generator().manual_seed(seed)).tolist() for seed in (1, 2)]

    assert [order[:2] for order in orders] == [[1, 5], [1, 5]]
    assert orders[0] != orders[1]
    assert sorted(orders[0]) == list(range(8))
    assert len(orders_of(values, 0)) == 3
    assert len(orders_of(torch.arange(8.0).view(2, 4), 0)) == 1


def test_road_is_high_for_the_pixels_that_matter_and_low_for_the_others() -> None:
    weights = torch.zeros(20, 20)
    weights[:4] = 1 / 80
    image = torch.zeros(20, 20)
    image[:4] = 1
    seen = drawn(weights, image)

    best = seen.road(torch.arange(400), 0)

    # Without the first fifth the rest, which is 0, fills it; without the last one all stays.
    assert best > 0.7
    assert seen.road(torch.arange(399, -1, -1), 0) == pytest.approx(-best, abs=0.02)
