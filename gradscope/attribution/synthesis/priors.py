"""What synthesised pictures are made from: parameters, and the waves that they stand for.

A picture is the sum of its waves, so that a part of the spectrum is the same picture at a lower
resolution. Its colours are decorrelated: mixed by the root of ImageNet's colour covariance.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

#: Channels, height and width.
Size = tuple[int, int, int]

#: The square root of ImageNet's colour covariance, as lucid has it (Apache-2.0).
_COLOUR = ((0.26, 0.09, 0.02), (0.27, 0.00, -0.05), (0.27, -0.09, 0.03))
#: How the waves of natural pictures get smaller with frequency: as 1/f^1.2. Torralba and Oliva
#: (2003) find 1 to 1.5; the decorrelated channels of five public photographs have 1.2 to 1.5.
FALL = 1.2
#: Lucid's spectrum is four times smaller than its parameters.
_LUCID = 0.25


@dataclass(frozen=True, slots=True)
class Prior:
    """What is varied, and how fast."""

    name: str
    #: Start parameters [C, H, W // 2 + 1, …] of a size.
    start: Callable[[Size, torch.Generator], Tensor]
    #: How strong each wave [H, W // 2 + 1] of a picture of a height and width is.
    strengths: Callable[[int, int], Tensor]
    #: Parameters and strengths of a picture of a width -> complex waves [C, H, W // 2 + 1].
    waves: Callable[[Tensor, Tensor, int], Tensor]
    #: Adam's learning rate, and the deviation of the noise that views are seen under.
    rate: float
    noise: float = 0.0


def pixels(prior: Prior, parameters: Tensor, size: Size, resolution: tuple[int, int]) -> Tensor:
    """The picture [C, h, w] in 0..1 of parameters of a size, at its resolution or a lower one."""
    strengths = prior.strengths(*size[1:]).to(parameters)
    if resolution != size[1:]:
        parameters, strengths = _low(parameters, resolution), _low(strengths[None], resolution)[0]
    waves = prior.waves(parameters, strengths, resolution[1])
    image = torch.fft.irfft2(waves, s=resolution, norm="forward")
    if size[0] == 3:
        colour = image.new_tensor(_COLOUR)
        image = torch.einsum("kc,chw->khw", colour / colour.norm(dim=0).max(), image)
    found: Tensor = image.sigmoid()
    return found


def _low(values: Tensor, resolution: tuple[int, int]) -> Tensor:
    """What [C, H, W // 2 + 1, …] a lower resolution can carry."""
    height, width = resolution
    down, across = (height - 1) // 2, (width - 1) // 2 + 1
    found = values.new_zeros(len(values), height, width // 2 + 1, *values.shape[3:])
    found[:, : down + 1, :across] = values[:, : down + 1, :across]
    if down:
        found[:, -down:, :across] = values[:, -down:, :across]
    return found


def frequencies(height: int, width: int) -> Tensor:
    """A real transform's frequencies [H, W // 2 + 1], in cycles along the longer side."""
    longer = max(height, width)
    down = torch.fft.fftfreq(height, dtype=torch.float64)[:, None] * longer
    across = torch.fft.rfftfreq(width, dtype=torch.float64)[None] * longer
    found: Tensor = (down**2 + across**2).sqrt()
    return found


def coefficients(size: Size, generator: torch.Generator) -> Tensor:
    """Small Gaussian coefficients [C, H, W // 2 + 1, 2]."""
    channels, height, width = size
    return 0.01 * torch.randn((channels, height, width // 2 + 1, 2), generator=generator)


@cache
def falling(height: int, width: int) -> Tensor:
    """Strengths by which equal coefficients make a natural spectrum."""
    found: Tensor = _LUCID * frequencies(height, width).clamp(min=1) ** -FALL
    return found


def scaled(parameters: Tensor, strengths: Tensor, width: int) -> Tensor:  # noqa: ARG001
    """Waves of coefficients."""
    found: Tensor = torch.view_as_complex(parameters * strengths[..., None])
    return found


def phases(size: Size, generator: torch.Generator) -> Tensor:
    """Gaussian phases [C, H, W // 2 + 1]."""
    channels, height, width = size
    return torch.randn((channels, height, width // 2 + 1), generator=generator)


@cache
def natural(height: int, width: int) -> Tensor:
    """The strengths of a natural picture of mean 0 and variance 1."""
    found = frequencies(height, width).clamp(min=1) ** -FALL
    found[0, 0] = 0
    # Waves stand for themselves and for their mirror images, but for the columns that are both.
    twice = torch.full_like(found, 2)
    twice[:, _own_mirrors(width)] = 1
    total: Tensor = (twice * found**2).sum()
    return found / total.sqrt() if total else found


def turned(parameters: Tensor, strengths: Tensor, width: int) -> Tensor:
    """Waves of these strengths with the phases that are given (Fel et al. 2023, MACO).

    A real picture's phases are odd: where a column is its own mirror image, they are made so, or
    the transform would lose a part of these waves.
    """
    own = _own_mirrors(width)
    columns = parameters[:, :, own]
    angles = parameters.clone()
    angles[:, :, own] = (columns - columns.flip(1).roll(1, 1)) / 2
    parts = torch.stack((angles.cos(), angles.sin()), -1)
    return scaled(parts, strengths, width)


def _own_mirrors(width: int) -> list[int]:
    return [0, width // 2] if width > 1 and width % 2 == 0 else [0]


PRIORS = {
    prior.name: prior
    for prior in (
        Prior("fourier", coefficients, falling, scaled, rate=0.05),
        Prior("maco", phases, natural, turned, rate=0.2, noise=0.02),
    )
}
