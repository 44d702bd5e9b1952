"""Occlusion that computes what its squares change: the same maps as whole pictures give."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from gradscope import attribute
from gradscope.attribution.formulas import occlusion
from gradscope.models.windows import Windowed

from .forms import FORMS, images, model, saved


class Counted(list[Windowed]):
    """Stands for the class, and keeps what is made."""

    def __call__(self, *args: Any) -> Windowed:
        self.append(Windowed(*args))
        return self[-1]


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Counted:
    counted = Counted()
    monkeypatch.setattr(occlusion, "Windowed", counted)
    return counted


def check(net: object, x: Tensor, **options: Any) -> None:
    options = {"window": 4, "stride": 3, "fill": 0.5} | options
    found, exact = (attribute(net, x, "occlusion", exact=e, **options) for e in (False, True))
    scale = exact.values.abs().max()
    assert float(scale) > 0
    assert float((found.values - exact.values).abs().max() / scale) <= 1e-4
    assert found.diagnostics["forwards"] == exact.diagnostics["forwards"]


@pytest.mark.parametrize("form", ["module", *FORMS])
def test_maps_are_the_same_in_every_form(form: str, made: Counted) -> None:
    x = images("rectifiers")
    net = model("rectifiers")

    check(net if form == "module" else saved(net, form, x), x, target=[1, 2])

    # A program with one batch size sees whole pictures.
    assert bool(made) == (form != "export")


@pytest.mark.parametrize("name", ["vit", "registers", "channels last"])
def test_models_that_see_everything_at_once_have_the_same_maps(name: str, made: Counted) -> None:
    check(model(name), images(name, 1), window=8, stride=4)
    assert made


def test_a_square_larger_than_the_picture_is_cut_off() -> None:
    x = images("rectifiers", 1)
    whole = attribute(model("rectifiers"), x, "occlusion", window=40, stride=1)
    assert whole.values.unique().numel() == 1


class Branching(nn.Module):
    """Decides by numbers, and shows them to NumPy."""

    def __init__(self, use: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.head, self.use = nn.Conv2d(3, 6, 3), nn.Linear(6, 4), use

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.use(self.first(x)).mean((2, 3)))


def shown(x: Tensor) -> Tensor:
    return x * float(x.detach().numpy().max())


def unpooled(x: Tensor) -> Tensor:
    return functional.max_unpool2d(*functional.max_pool2d(x, 2, return_indices=True), 2).relu()


def compared(x: Tensor) -> Tensor:
    """Looks at the other images of its batch."""
    return x * (1 + x.mean((1, 2, 3), keepdim=True))


@pytest.mark.parametrize("use", [shown, unpooled])
def test_a_model_that_reads_more_than_windows_sees_whole_pictures(
    use: Callable[[Tensor], Tensor],
) -> None:
    x = images("rectifiers", 1)
    found = attribute(Branching(use).eval(), x, "occlusion", window=4, stride=3, chunk=1)
    exact = attribute(
        Branching(use).eval(), x, "occlusion", window=4, stride=3, chunk=1, exact=True
    )
    torch.testing.assert_close(found.values, exact.values, rtol=1e-4, atol=1e-5)


def test_a_model_that_weighs_by_its_own_mean() -> None:
    check(Branching(compared).eval(), images("rectifiers", 1))


def test_exact_and_few_squares_show_whole_pictures(made: Counted) -> None:
    net, x = model("rectifiers"), images("rectifiers", 1)
    attribute(net, x, "occlusion", window=4, stride=3, exact=True)
    attribute(net, x, "occlusion", window=8, stride=8)
    assert not made


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64])
def test_types(kind: torch.dtype, made: Counted) -> None:
    check(model("rectifiers").to(kind), images("rectifiers", 1).to(kind))
    assert made


def test_the_picture_and_the_model_are_left_as_they_were() -> None:
    net, x = model("rectifiers"), images("rectifiers", 1)
    before, state = x.clone(), {k: v.clone() for k, v in net.state_dict().items()}

    attribute(net, x, "occlusion", window=4, stride=3)

    assert torch.equal(x, before)
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())
