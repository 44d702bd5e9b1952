"""Points where the path of integrated gradients bends, against closed forms."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from gradscope import attribute
from gradscope.attribution.attribute import Attribution


class Bent(nn.Module):
    """Scores that are straight along the path but for a bend, remembering how far each input is."""

    def __init__(self, bend: float) -> None:
        super().__init__()
        self.bend = bend
        self.seen: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        level = x.mean((1, 2, 3))
        if x.requires_grad:
            self.seen += level.tolist()
        return torch.stack([level + 9 * torch.relu(level - self.bend), -level], 1)


def refined(net: nn.Module, x: Tensor, tolerance: float) -> Attribution:
    return attribute(net, x, "integrated-gradients", target=0, tolerance=tolerance)


@pytest.mark.parametrize("bend", [0.07, 0.3, 0.61, 0.99])
def test_the_sum_is_the_change_of_the_score_within_the_tolerance(bend: float) -> None:
    net, x = Bent(bend), torch.ones(1, 3, 4, 4, dtype=torch.float64)

    found = refined(net, x, 1e-3)

    change = 1 + 9 * (1 - bend)
    assert abs(float(found.values.sum()) - change) <= 1e-3 * change
    assert found.diagnostics["relative_delta"][0] <= 1e-3


def test_points_lie_where_the_path_bends_and_none_is_asked_for_twice() -> None:
    net, x = Bent(0.3), torch.ones(1, 3, 4, 4, dtype=torch.float64)

    found = refined(net, x, 1e-4)

    places = [place for place in net.seen if 0 < place < 1]
    added = [place for place in places if place * 8 % 1]
    assert len(set(places)) == len(places)
    assert added
    assert all(abs(place - 0.3) < 1 / 8 for place in added)
    # Equal steps as fine as the finest would be thousands.
    assert found.diagnostics["steps"] < 40
    assert min(abs(place - 0.3) for place in added) < 1 / 500


def test_a_straight_path_needs_no_more_than_its_first_points() -> None:
    assert refined(Bent(2.0), torch.ones(1, 3, 4, 4), 1e-3).diagnostics["steps"] == 9


def test_each_image_gets_the_points_that_it_needs_and_its_own_values() -> None:
    net, x = Bent(0.61), torch.rand(3, 3, 4, 4, dtype=torch.float64)

    together = refined(net, x, 1e-3)
    alone = [refined(net, x[i : i + 1], 1e-3) for i in range(3)]

    torch.testing.assert_close(together.values, torch.cat([a.values for a in alone]))
    assert together.diagnostics["steps"] == max(a.diagnostics["steps"] for a in alone)


def test_a_score_that_jumps_ends_without_meeting_the_tolerance_and_says_so() -> None:
    class Jump(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            level = x.mean((1, 2, 3))
            return torch.stack([level + (level > 0.4), -level], 1)

    found = refined(Jump(), torch.ones(1, 3, 4, 4, dtype=torch.float64), 1e-3)

    assert found.diagnostics["relative_delta"] == pytest.approx([0.5])
    assert found.diagnostics["steps"] < 100


def test_a_curved_score_converges_to_its_integral() -> None:
    class Cubes(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([x.pow(3).sum((1, 2, 3)), -x.sum((1, 2, 3))], 1)

    x = torch.randn(1, 3, 4, 4, dtype=torch.float64).abs() + 0.5

    found = refined(Cubes(), x, 1e-5)

    torch.testing.assert_close(found.values, x**3, rtol=1e-4, atol=0)
