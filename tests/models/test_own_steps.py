"""Models that normalise or resize pictures themselves get them as they are, and are told apart."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from gradscope.models.forms import as_model
from gradscope.models.own_steps import own_steps
from gradscope.models.vision import open_vision

MEAN, STD = (torch.tensor(v)[:, None, None] for v in ([0.48, 0.46, 0.41], [0.23, 0.22, 0.225]))


class Begins(nn.Module):
    """A small network, and what it does to a picture first."""

    def __init__(self, first: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first = first
        self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(self.first(x)).relu().mean((2, 3)))


def each(x: Tensor) -> Tensor:
    """As torchvision's detectors do: a list of images, one after the other, resized."""
    found = [(image - MEAN) / STD for image in x]
    return torch.stack([interpolate(image[None], scale_factor=0.5)[0] for image in found])


def squashed(x: Tensor) -> Tensor:
    """As SSD does."""
    return interpolate((x - MEAN) / STD, (24, 24), mode="bilinear")


def in_place(x: Tensor) -> Tensor:
    return x.clone().sub_(MEAN).div_(STD)


NORMALISING: list[tuple[Callable[[Tensor], Tensor], tuple[float, ...], int, bool]] = [
    (lambda x: (x - MEAN) / STD, (0.48, 0.46, 0.41), 1, False),
    (in_place, (0.48, 0.46, 0.41), 1, False),
    (lambda x: 2 * x - 1, (0.5, 0.5, 0.5), 1, False),
    (lambda x: (x / 255 - MEAN) / STD, (122.4, 117.3, 104.6), 255, False),
    (lambda x: x / 127.5 - 1, (127.5, 127.5, 127.5), 255, False),
    (lambda x: x / 255, (0.0, 0.0, 0.0), 255, False),
    (each, (0.48, 0.46, 0.41), 1, True),
    (squashed, (0.48, 0.46, 0.41), 1, True),
]


@pytest.mark.parametrize(("first", "mean", "white", "resizes"), NORMALISING)
def test_what_a_model_begins_with_is_measured(
    first: Callable[[Tensor], Tensor], mean: tuple[float, ...], white: int, resizes: bool
) -> None:
    found = own_steps(as_model(Begins(first).eval()))

    assert found is not None
    assert found.mean == pytest.approx(mean, rel=1e-3)
    assert (found.white, found.resizes) == (white, resizes)


@pytest.mark.parametrize(
    "first",
    [
        lambda x: x,
        # Googlenet's and Inception's, of an image that ImageNet's numbers have normalised.
        lambda x: torch.stack([x[:, c] * s + m for c, (s, m) in
                               enumerate([(0.458, -0.03), (0.448, -0.088), (0.45, -0.188)])], 1),
        lambda x: 2 * x,
        lambda x: x + 0.1 * torch.ones(x.shape[2:]),
        lambda x: interpolate(x, (24, 24)),
        lambda x: 1 - x,
    ],
)  # fmt: skip
def test_what_is_no_normalisation_is_none(first: Callable[[Tensor], Tensor]) -> None:
    assert own_steps(as_model(Begins(first).eval())) is None


@pytest.mark.parametrize("form", ["traced", "exported"])
def test_every_form_of_a_model_tells(form: str) -> None:
    net, x = Begins(lambda x: (x - MEAN) / STD).eval(), torch.rand(1, 3, 40, 40)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        made = torch.jit.trace(net, x) if form == "traced" else torch.export.export(net, (x,))

    found = own_steps(as_model(made))

    assert found is not None
    assert found.std == pytest.approx((0.23, 0.22, 0.225), rel=1e-3)


def test_the_model_is_left_as_it_was() -> None:
    net = Begins(lambda x: (x - MEAN) / STD).train()

    own_steps(as_model(net))

    assert net.training
    assert all(p.requires_grad for p in net.parameters())


def test_a_model_that_normalises_gets_pixels_and_one_that_does_not_normalised_ones() -> None:
    own = open_vision(Begins(lambda x: (x / 255 - MEAN) / STD))
    plain = open_vision(Begins(lambda x: x))

    assert (own.preprocessing.mean, own.preprocessing.std) == ((0, 0, 0), (1, 1, 1))
    assert own.preprocessing.rescale == 1
    assert own.preprocessing.size == plain.preprocessing.size == (224, 224)
    assert own.preprocessing.assumed
    assert "it gets pixels from 0 to 255" in own.loaded.notes[0]
    assert plain.preprocessing.mean[0] == 0.485
    assert plain.loaded.notes == ()


def test_a_model_that_resizes_too_gets_the_picture_as_it_is() -> None:
    found = open_vision(Begins(each))

    assert found.preprocessing.size is None
    assert (found.preprocessing.resize, found.preprocessing.rescale) == (None, 1 / 255)
    assert not found.preprocessing.assumed
    assert found.preprocessing.source == "the model"


def test_a_model_that_squashes_pictures_gets_them_so() -> None:
    """Its maps have the aspect of what it squashed them to."""
    kept = own_steps(as_model(Begins(each).eval()))
    found = open_vision(Begins(squashed))

    assert kept is not None
    assert kept.squashed is None
    assert found.preprocessing.size == (24, 24)
    assert found.preprocessing.resize == (24, 24)


def test_who_asks_for_normalisation_of_such_a_model_is_told() -> None:
    net = Begins(lambda x: (x - MEAN) / STD)

    (said,) = open_vision(net, preprocess="imagenet").loaded.notes
    assert said.endswith("with the preprocessing of imagenet that is done twice")
    assert open_vision(net, preprocess="image_mean=0/0/0,image_std=1/1/1").loaded.notes == ()
    assert open_vision(Begins(lambda x: x), preprocess="imagenet").loaded.notes == ()
