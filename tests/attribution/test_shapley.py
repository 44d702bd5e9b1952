"""KernelSHAP against the definition of Shapley values, and captum."""

from __future__ import annotations

import math
import warnings
from itertools import combinations

import pytest
import torch
from torch import Tensor, nn

from gradscope import attribute
from gradscope.attribution.formulas.superpixels import superpixels
from gradscope.errors import UsageError

from .forms import images, model
from .oracles import oracle

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import captum.attr as captum


def shapley(net: nn.Module, x: Tensor, base: Tensor, labels: Tensor, target: int) -> list[float]:
    """The definition: the mean gain of each player over all coalitions of the others."""
    count = int(labels.max()) + 1

    def worth(players: tuple[int, ...]) -> float:
        shown = torch.isin(labels, torch.tensor(players, dtype=torch.long))
        with torch.no_grad():
            return float(net(torch.where(shown, x, base))[0, target])

    known = {
        players: worth(players)
        for size in range(count + 1)
        for players in combinations(range(count), size)
    }
    values = []
    for player in range(count):
        others = [p for p in range(count) if p != player]
        values.append(
            sum(
                (known[tuple(sorted((*players, player)))] - known[players])
                / (count * math.comb(count - 1, size))
                for size in range(count)
                for players in combinations(others, size)
            )
        )
    return values


def tiles(down: int, across: int) -> Tensor:
    rows, columns = (torch.arange(16) * n // 16 for n in (down, across))
    return rows[:, None] * across + columns


@oracle("kernel-shap")
def test_of_few_superpixels_the_values_are_shapleys() -> None:
    net, x = model("rectifiers").double(), images("rectifiers").double()
    labels = tiles(2, 3)

    found = attribute(
        net,
        x,
        "kernel-shap",
        target=[1, 3],
        segments=labels,
        reference=x.flip(2) * 0.5,
    )

    assert found.diagnostics["exact"] == [True, True]
    for image, target, values in zip(x, (1, 3), found.values, strict=True):
        base = image.flip(1)[None] * 0.5
        wanted = torch.tensor(shapley(net, image[None], base, labels, target), dtype=torch.double)
        torch.testing.assert_close(values, wanted[labels], rtol=1e-8, atol=1e-10)


def test_of_many_the_drawn_coalitions_come_near_and_always_add_up() -> None:
    net, x = model("rectifiers").double(), images("rectifiers", 1).double()
    labels = tiles(3, 3)
    wanted = torch.tensor(shapley(net, x, torch.zeros_like(x), labels, 1)).double()
    change = float((net(x) - net(torch.zeros_like(x))).detach()[0, 1])

    def missed(samples: int) -> float:
        found = attribute(net, x, "kernel-shap", target=1, segments=labels, samples=samples)
        assert found.diagnostics["exact"] == [False]
        values = torch.stack([found.values[0][labels == player][0] for player in range(9)])
        assert float(values.sum()) == pytest.approx(change, rel=1e-9)
        return float((values - wanted).norm() / wanted.norm())

    assert missed(400) < 0.1
    assert missed(400) < missed(20)


@oracle("kernel-shap")
def test_of_a_linear_model_the_values_are_captums() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(768, 3)).double()
    x, labels = images("rectifiers", 1).double(), tiles(4, 4)
    wanted = captum.KernelShap(net).attribute(
        x, target=1, feature_mask=labels[None, None], n_samples=300
    )

    found = attribute(net, x, "kernel-shap", target=1, segments=labels, samples=300)

    torch.testing.assert_close(found.values, wanted[:, 0].double(), rtol=0, atol=1e-3)
    parts = (x * net[1].weight[1].view(3, 16, 16)).sum(1)[0]
    exact = torch.stack([parts[labels == k].sum() for k in range(16)])
    torch.testing.assert_close(found.values[0], exact[labels].detach(), rtol=1e-8, atol=1e-10)


def test_superpixels_follow_colour_and_position() -> None:
    image = torch.zeros(3, 24, 36)
    image[:, :, 15:] = 5.0
    image += 0.01 * torch.randn(image.shape, generator=torch.Generator().manual_seed(0))

    labels = superpixels(image, 12)

    assert labels.unique().tolist() == list(range(int(labels.max()) + 1))
    assert 6 <= int(labels.max()) + 1 <= 16
    left, right = set(labels[:, :15].flatten().tolist()), set(labels[:, 15:].flatten().tolist())
    assert not left & right
    assert torch.equal(labels, superpixels(image, 12))


def test_the_seed_and_nothing_else_decides_what_is_drawn() -> None:
    net, x = model("rectifiers"), images("rectifiers")

    def found(seed: int, chunk: int | None = None) -> Tensor:
        return attribute(
            net, x, "kernel-shap", target=1, segments=16, samples=64, seed=seed, chunk=chunk
        ).values

    assert torch.equal(found(0), found(0))
    torch.testing.assert_close(found(0, 5), found(0), rtol=0, atol=1e-5)
    assert not torch.equal(found(0), found(1))


def test_what_cannot_be_asked_is_refused() -> None:
    net, x = model("rectifiers"), images("rectifiers")

    with pytest.raises(UsageError, match="twice the superpixels"):
        attribute(net, x, "kernel-shap", segments=16, samples=10)
    with pytest.raises(UsageError, match="segments has to be at least 2"):
        attribute(net, x, "kernel-shap", segments=1)
    with pytest.raises(UsageError, match=r"segments have shape \[4, 4\]"):
        attribute(net, x, "kernel-shap", segments=torch.zeros(4, 4))
