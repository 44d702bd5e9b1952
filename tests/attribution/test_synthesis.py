"""Images that a score likes: parameterisation by closed forms, and that it works."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from make import digits_model
from safetensors.torch import load_file
from torch import Tensor, nn

from gradscope.attribution.synthesis import (
    cropped,
    frequencies,
    initial_spectrum,
    pixels,
    seen,
    synthesise,
)
from gradscope.errors import UsageError

DIGITS = Path(__file__).parents[2] / "fixtures" / "digits.safetensors"


def digits() -> nn.Module:
    net = digits_model()
    net.load_state_dict(load_file(DIGITS))
    return net.eval().requires_grad_(False)


def test_the_image_is_numpys_inverse_transform_of_the_scaled_spectrum() -> None:
    size = (1, 7, 9)
    spectrum = initial_spectrum(size, torch.Generator().manual_seed(0))

    found = pixels(spectrum, size)

    down, across = np.fft.fftfreq(7)[:, None], np.fft.rfftfreq(9)[None]
    scale = 1 / np.maximum(np.hypot(down, across), 1 / 9)
    waves = (spectrum[0, ..., 0] + 1j * spectrum[0, ..., 1]).numpy() * scale
    wanted = 1 / (1 + np.exp(-np.fft.irfft2(waves, s=(7, 9), norm="ortho") / 4))
    np.testing.assert_allclose(found[0], wanted, atol=1e-6)
    np.testing.assert_allclose(frequencies(7, 9), np.hypot(down, across), rtol=1e-6)


def test_colours_vary_together_as_imagenets_do() -> None:
    size = (3, 64, 64)
    image = pixels(initial_spectrum(size, torch.Generator().manual_seed(0)) * 100, size)

    correlation = np.corrcoef(torch.logit(image, eps=1e-6).flatten(1).double())

    svd = np.array([[0.26, 0.09, 0.02], [0.27, 0.00, -0.05], [0.27, -0.09, 0.03]])
    covariance = svd @ svd.T
    spread = np.sqrt(np.diag(covariance))
    np.testing.assert_allclose(correlation, covariance / np.outer(spread, spread), atol=0.06)


def test_colours_are_as_strong_as_lucids() -> None:
    size, grey = (3, 7, 9), (1, 7, 9)
    spectrum = initial_spectrum(size, torch.Generator().manual_seed(0)) * 100
    plain = [torch.logit(pixels(each[None], grey).double())[0] for each in spectrum]

    found = torch.logit(pixels(spectrum, size).double())

    # lucid/optvis/param/color.py divides by the greatest norm of a column before it mixes.
    svd = np.array([[0.26, 0.09, 0.02], [0.27, 0.00, -0.05], [0.27, -0.09, 0.03]])
    mixing = svd / np.max(np.linalg.norm(svd, axis=0))
    wanted = np.einsum("kc,chw->khw", mixing, np.stack(plain))
    np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("size", [(1, 8, 8), (3, 31, 20), (1, 1, 1)])
def test_any_size_stays_between_black_and_white(size: tuple[int, int, int]) -> None:
    found = synthesise(lambda x: x.sum((1, 2, 3)), size, steps=8)

    assert found.image.shape == size
    assert found.image.min() >= 0
    assert found.image.max() <= 1
    assert found.objective[-1] > found.objective[0]
    assert len(found.objective) == 9


def test_the_seed_decides_the_image_to_the_bit_and_nothing_else_is_drawn() -> None:
    net = digits()
    state = torch.get_rng_state()

    images = [
        synthesise(lambda x: net(x)[:, 3], (1, 8, 8), steps=10, seed=seed).image
        for seed in (1, 1, 2)
    ]

    assert torch.equal(images[0], images[1])
    assert not torch.equal(images[0], images[2])
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("digit", range(10))
def test_the_image_is_recognised_under_views_that_were_not_used(digit: int) -> None:
    net = digits()

    found = synthesise(
        lambda x: net(x)[:, digit], (1, 8, 8), steps=60, turn=5, zoom=0.1, jitter=0.05
    )

    assert found.objective[-1] > found.objective[0] + 3
    turned = torch.tensor([[[0.99, -0.05, 0.02], [0.05, 0.99, -0.02]]])
    assert int(net(seen(found.image[None], turned)).argmax()) == digit


def test_a_view_that_changes_nothing_shows_the_image() -> None:
    image = torch.rand(1, 3, 6, 5)

    same = seen(image, torch.tensor([[[1.0, 0, 0], [0, 1.0, 0]]]))

    torch.testing.assert_close(same, image)


class Dead(nn.Module):
    """Its rectifier is shut for the grey images that synthesis starts from."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x.mean((1, 2, 3)) - 0.52)


def test_a_dead_start_is_let_through_its_rectifiers() -> None:
    found = synthesise(Dead(), (1, 8, 8), steps=100)

    assert found.objective[0] == 0
    assert found.objective[-1] > 0


def test_a_blind_score_and_one_that_is_not_finite_are_refused() -> None:
    with pytest.raises(UsageError, match="does not depend"):
        synthesise(lambda x: x.detach().sum((1, 2, 3)), (1, 8, 8), steps=100)
    with pytest.raises(UsageError, match="became nan"):
        synthesise(lambda x: x.sum((1, 2, 3)) * torch.nan, (1, 8, 8), steps=3)


def test_the_first_steps_may_see_crops_of_half_the_side() -> None:
    sides: list[tuple[int, ...]] = []

    def score(x: Tensor) -> Tensor:
        sides.append(tuple(x.shape[2:]))
        return x.mean((1, 2, 3))

    synthesise(score, (3, 31, 20), steps=9, crops=2 / 3)

    assert sides == [(15, 10)] * 6 + [(31, 20)] * 4


def test_a_crop_lies_within_the_view_at_the_images_own_scale() -> None:
    generator = torch.Generator().manual_seed(0)
    image = torch.arange(64.0).view(1, 1, 8, 8)
    plain = torch.tensor([[[1.0, 0, 0], [0, 1.0, 0]]])

    for _ in range(20):
        found = seen(image, cropped(plain, generator), (4, 4))[0, 0]
        # A row is eight more, a column one: nothing was scaled.
        torch.testing.assert_close(found[1:] - found[:-1], torch.full((3, 4), 8.0))
        torch.testing.assert_close(found[:, 1:] - found[:, :-1], torch.full((4, 3), 1.0))
        assert found.min() >= 0
        assert found.max() <= 63
