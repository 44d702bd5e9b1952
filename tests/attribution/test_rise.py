"""RISE's masks as products of matrices, and how well its maps are known."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from gradscope import attribute
from gradscope.attribution.formulas import rise
from gradscope.attribution.formulas.random_masks import family
from gradscope.errors import UsageError


@pytest.mark.parametrize(("grid", "size"), [(3, (7, 6)), (5, (14, 22)), (7, (60, 47)), (1, (4, 5))])
def test_sums_over_masks_are_those_of_their_pixels(grid: int, size: tuple[int, int]) -> None:
    masks = family(grid, 0.4, torch.zeros(1, 3, *size).double()).drawn(range(150))
    weights = torch.randn((2, 150), generator=torch.Generator().manual_seed(0)).double()

    pixels = masks.pixels()

    torch.testing.assert_close(masks.summed(weights), torch.tensordot(weights, pixels, 1))
    squares = torch.tensordot(weights, pixels**2, 1)
    torch.testing.assert_close(masks.summed_squares(weights), squares)
    some = torch.tensor([3, 77, 149])
    assert torch.equal(masks[some].pixels(), pixels[some])


def looking(spot: tuple[int, int] = (4, 9)) -> nn.Module:
    """A net of two classes that looks at one place, and a little at all of the image."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 12 * 14, 2)).double()
    with torch.no_grad():
        net[1].weight.mul_(0.3).view(2, 3, 12, 14)[1, :, spot[0], spot[1]] += 1.5
    return net


IMAGE = torch.rand((1, 3, 12, 14), generator=torch.Generator().manual_seed(1)).double()


@pytest.mark.parametrize("error", [0.02, 0.01])
def test_masks_are_drawn_until_the_error_is_small(error: float) -> None:
    net = looking()
    both = torch.cat([IMAGE, IMAGE.flip(2)])

    found = attribute(net, both, "rise", target=1, error=error, grid=4)

    told = found.diagnostics["standard_error"]
    assert all(0.8 * error < one <= error for one in told)
    assert "notes" not in found.diagnostics
    counts = found.diagnostics["forwards"] - 2
    alone = [attribute(net, x[None], "rise", target=1, error=error, grid=4) for x in both]
    assert counts == sum(one.diagnostics["forwards"] - 1 for one in alone)
    torch.testing.assert_close(found.values, torch.cat([one.values for one in alone]))


@pytest.mark.parametrize(
    ("grid", "keep", "size"), [(4, 0.5, (12, 14)), (3, 0.3, (5, 9)), (9, 0.5, (20, 21))]
)
def test_what_is_expected_of_masks_is_their_mean(
    grid: int, keep: float, size: tuple[int, int]
) -> None:
    kind = family(grid, keep, torch.zeros(1, 3, *size).double())
    masks = kind.drawn(range(40_000))
    blocks = masks.blocks().flatten(1) - keep
    slopes = torch.randn((2, blocks.shape[1]), generator=torch.Generator().manual_seed(2)).double()
    values = slopes @ blocks.mT

    means, found = masks.summed(values) / (40_000 * keep), kind.expected(slopes)

    assert float(blocks.mean(0).abs().max()) < 0.01
    assert float((means - found).abs().max()) < 0.05 * float(found.abs().max())
    pixels = masks[torch.arange(9)].pixels()
    pooled = nn.functional.adaptive_avg_pool2d(pixels, masks.blocks().shape[1:])
    torch.testing.assert_close(masks.blocks()[:9], pooled)


def estimates(form: Callable[[rise.Shown], rise.Estimate], count: int) -> tuple[Tensor, float]:
    """Maps by several draws of masks, and their mean standard error told, root mean square."""
    kind, net = family(4, 0.5, IMAGE), looking()
    own = net(IMAGE).softmax(1)[:, 1].detach()
    maps, variances = [], []
    for start in range(0, 60 * count, count):
        masks = kind.drawn(range(start, start + count))
        shares = net(IMAGE * masks.pixels()[:, None]).softmax(1)[:, 1].detach()
        found = form(rise.Shown(masks, own, shares[None] - own))
        maps.append(found.maps)
        variances.append(found.variance.mean())
    return torch.cat(maps), float(torch.stack(variances).mean().sqrt())


def test_all_forms_estimate_the_same_and_tell_how_well() -> None:
    forms = (rise.papers, rise.by_coverage, rise.adjusted)
    found = [estimates(form, 300) for form in forms]

    means = [maps.mean(0) for maps, _ in found]
    spreads = [float(maps.var(0).mean().sqrt()) for maps, _ in found]
    for mean in means[:2]:
        assert float((mean - means[2]).pow(2).mean().sqrt()) < 4 * spreads[0] / 60**0.5
    for (_, told), spread in zip(found, spreads, strict=True):
        assert told == pytest.approx(spread, rel=0.1)
    # Squared, they are what masks cost.
    assert spreads[1] ** 2 < 0.5 * spreads[0] ** 2
    assert spreads[2] ** 2 < 0.7 * spreads[1] ** 2


class Flat(nn.Module):
    """The same answer to everything, but for rounding."""

    def forward(self, x: Tensor) -> Tensor:
        noise = x.flatten(1).sum(1, keepdim=True) * 1e-9
        return torch.cat([noise, noise + 1], 1)


def test_a_map_without_a_range_has_no_error_and_is_not_drawn_for_ever() -> None:
    found = attribute(Flat(), IMAGE.float(), "rise", target=1, error=0.01)

    assert found.diagnostics["standard_error"] == [None]
    assert found.diagnostics["forwards"] == rise._FIRST + 1


def test_an_error_out_of_reach_ends_with_the_most_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rise, "_MOST", 700)

    found = attribute(looking(), IMAGE, "rise", target=1, error=1e-6)

    assert found.diagnostics["forwards"] == 701
    assert found.diagnostics["standard_error"][0] > 1e-6
    assert "after 700 masks" in found.diagnostics["notes"][0]
    assert math.isfinite(float(found.values.sum()))


def test_the_papers_form_has_no_error_to_reach_and_no_error_is_negative() -> None:
    for asked in ({"error": 0.1, "coverage": False}, {"error": -0.1}):
        with pytest.raises(UsageError, match="error"):
            attribute(looking(), IMAGE, "rise", target=1, **asked)
