"""What synthesised pictures are made from: closed forms, and the way back."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from gradscope.attribution.synthesis.priors import PRIORS, Size, frequencies, natural, pixels

FOURIER, MACO = PRIORS["fourier"], PRIORS["maco"]
#: lucid/optvis/param/color.py: the root of the covariance, divided by a column's greatest norm.
ROOT = np.array([[0.26, 0.09, 0.02], [0.27, 0.00, -0.05], [0.27, -0.09, 0.03]])
MIXING = ROOT / np.max(np.linalg.norm(ROOT, axis=0))
SIZES = [(1, 7, 9), (3, 8, 8), (3, 12, 10), (1, 9, 12), (3, 16, 7), (1, 1, 1), (1, 2, 2), (4, 5, 6)]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def start(name: str, size: Size, seed: int = 0) -> Tensor:
    found = PRIORS[name].start(size, generator(seed)).double()
    return found * 100 if name == "fourier" else found


def whole(name: str, size: Size, parameters: Tensor) -> Tensor:
    return pixels(PRIORS[name], parameters, size, size[1:])


def cycles(height: int, width: int) -> NDArray[np.float64]:
    """Frequencies in cycles along the longer side, as NumPy has them."""
    down, across = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]
    return np.asarray(np.hypot(down, across) * max(height, width))


def decorrelated(image: Tensor) -> NDArray[np.float64]:
    """What a sigmoid and a mixture of colours made the image [C, H, W] of."""
    found = torch.logit(image).numpy()
    return np.linalg.solve(MIXING, found.reshape(3, -1)).reshape(found.shape) if (
        len(found) == 3
    ) else found  # fmt: skip


@pytest.mark.parametrize("size", SIZES)
def test_the_image_is_numpys_inverse_transform_of_the_scaled_coefficients(size: Size) -> None:
    parameters = start("fourier", size)

    found = whole("fourier", size, parameters)

    waves = parameters.numpy()[..., 0] + 1j * parameters.numpy()[..., 1]
    scaled = waves / np.maximum(cycles(*size[1:]), 1) ** 1.2 / 4
    plain = np.fft.irfft2(scaled, s=size[1:], norm="forward")
    mixed = np.einsum("kc,chw->khw", MIXING, plain) if size[0] == 3 else plain
    np.testing.assert_allclose(found, 1 / (1 + np.exp(-mixed)), atol=1e-12)
    np.testing.assert_allclose(frequencies(*size[1:]), cycles(*size[1:]), rtol=1e-12)


@pytest.mark.parametrize("size", SIZES)
def test_any_picture_comes_back_from_its_parameters(size: Size) -> None:
    image = 0.1 + 0.8 * torch.rand(size, dtype=torch.float64, generator=generator())

    waves = np.fft.rfft2(decorrelated(image), norm="forward")
    waves = waves * 4 * np.maximum(cycles(*size[1:]), 1) ** 1.2
    parameters = torch.view_as_real(torch.from_numpy(waves))

    torch.testing.assert_close(whole("fourier", size, parameters), image, atol=1e-10, rtol=0)


@pytest.mark.parametrize("size", SIZES)
def test_the_spectrum_of_a_maco_picture_is_the_priors_whatever_its_phases(size: Size) -> None:
    image = whole("maco", size, 3 * start("maco", size))

    magnitudes = np.abs(np.fft.rfft2(decorrelated(image), norm="forward"))

    wanted = np.maximum(cycles(*size[1:]), 1) ** -1.2
    wanted[0, 0] = 0
    both = np.abs(np.fft.fft2(np.fft.irfft2(wanted, s=size[1:], norm="forward"), norm="forward"))
    wanted /= np.sqrt((both**2).sum()) or 1
    np.testing.assert_allclose(magnitudes, np.broadcast_to(wanted, magnitudes.shape), atol=1e-9)
    np.testing.assert_allclose(natural(*size[1:]), wanted, atol=1e-12)


def test_a_maco_picture_has_mean_zero_and_variance_one_before_its_colours_are_mixed() -> None:
    for size in ((3, 32, 20), (3, 31, 21)):
        found = decorrelated(whole("maco", size, start("maco", size)))

        np.testing.assert_allclose(found.mean((1, 2)), 0, atol=1e-9)
        np.testing.assert_allclose(found.var((1, 2)), 1, rtol=1e-9)


def test_only_the_phases_of_a_maco_picture_differ_from_seed_to_seed() -> None:
    one, other = (whole("maco", (3, 16, 16), start("maco", (3, 16, 16), seed)) for seed in (0, 1))

    assert float((one - other).abs().max()) > 0.1


@pytest.mark.parametrize("name", PRIORS)
@pytest.mark.parametrize(
    ("size", "low"),
    [((3, 24, 24), (6, 6)), ((1, 24, 16), (12, 8)), ((3, 21, 15), (7, 5)), ((1, 20, 30), (4, 6))],
)
def test_a_lower_resolution_is_the_picture_of_its_slow_waves(
    name: str, size: Size, low: tuple[int, int]
) -> None:
    parameters = start(name, size)

    found = decorrelated(pixels(PRIORS[name], parameters, size, low))

    waves = np.fft.rfft2(decorrelated(whole(name, size, parameters)))
    down = np.abs(np.fft.fftfreq(size[1]) * size[1])[:, None] < low[0] / 2
    across = (np.fft.rfftfreq(size[2]) * size[2])[None] < low[1] / 2
    slow = np.fft.irfft2(waves * (down & across), s=size[1:])
    step = size[1] // low[0]
    np.testing.assert_allclose(found, slow[:, ::step, ::step], atol=1e-10)


def test_colours_vary_together_as_imagenets_do() -> None:
    image = whole("fourier", (3, 64, 64), start("fourier", (3, 64, 64)))

    correlation = np.corrcoef(torch.logit(image, eps=1e-9).flatten(1))

    covariance = ROOT @ ROOT.T
    spread = np.sqrt(np.diag(covariance))
    np.testing.assert_allclose(correlation, covariance / np.outer(spread, spread), atol=0.15)


@pytest.mark.parametrize("name", PRIORS)
def test_every_parameter_moves_the_picture_but_those_that_stand_for_nothing(name: str) -> None:
    size = (1, 8, 8)
    parameters = start(name, size).requires_grad_()

    (found,) = torch.autograd.grad(
        (whole(name, size, parameters) * torch.rand(size, generator=generator())).sum(), parameters
    )

    still = int((found.abs() < 1e-12).sum())
    # The sines of four waves that are their own mirror images; the phases of these four.
    assert still == 4
