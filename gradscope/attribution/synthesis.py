"""The image that maximises a score (Olah et al. 2017, distill.pub/2017/feature-visualization).

Gradient ascent on a spectrum scaled by 1/f, in decorrelated colours with ImageNet's covariance,
under a random view (shift, scale, rotation) at each step, so that no detail survives that a small
shift would destroy.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample

from gradscope.attribution.guided import Rectifiers
from gradscope.attribution.subject import Tick
from gradscope.errors import UsageError

#: The square root of ImageNet's colour covariance, as lucid has it (Apache-2.0).
_COLOUR = ((0.26, 0.09, 0.02), (0.27, 0.00, -0.05), (0.27, -0.09, 0.03))
#: First steps, in which gradients may pass rectifiers that are off.
_HELPED = 16


@dataclass(frozen=True, eq=False, slots=True)
class Synthesis:
    """An image [C, H, W] in 0..1 and the objective at each step, then at the end."""

    image: Tensor
    objective: tuple[float, ...]


def synthesise(
    score: Callable[[Tensor], Tensor],
    size: tuple[int, int, int],
    *,
    steps: int = 256,
    learning_rate: float = 0.05,
    seed: int = 0,
    turn: float = 20.0,
    zoom: float = 0.35,
    jitter: float = 0.2,
    crops: float = 0.0,
    device: torch.device | str = "cpu",
    progress: Tick = lambda _done, _total: None,
) -> Synthesis:
    """Maximise ``score`` of pixels [1, C, H, W] in 0..1, by Adam.

    ``turn`` is in degrees either way, ``zoom`` and ``jitter`` are fractions of the scale and of the
    side. In the first ``crops`` of the steps the model sees a crop of half the side, for a quarter
    of its work. The same seed gives the same image. Raises UsageError where the score is not
    finite, and where its gradient stays zero.
    """
    generator = torch.Generator().manual_seed(seed)
    spectrum = initial_spectrum(size, generator).to(device).requires_grad_()
    optimiser = torch.optim.Adam([spectrum], lr=learning_rate)
    objective, blind = [], 0
    for step in range(steps):
        view = _view(generator, turn, zoom, jitter)
        seen_size = size[1:]
        if step < crops * steps:
            view, seen_size = cropped(view, generator), (size[1] // 2, size[2] // 2)
        value, gradient = _gradient(score, spectrum, size, view, seen_size, step < _HELPED)
        objective.append(_finite(value))
        blind = blind + 1 if not bool((gradient != 0).any()) else 0
        if blind >= _HELPED:
            raise UsageError("the score does not depend on the image: its gradient is zero")
        spectrum.grad = -gradient
        optimiser.step()
        progress(step + 1, steps)
    with torch.no_grad():
        image = pixels(spectrum, size)
        objective.append(_finite(float(score(image[None])[0])))
    return Synthesis(image.cpu(), tuple(objective))


def _finite(value: float) -> float:
    if not math.isfinite(value):
        raise UsageError(f"the score became {value}; check the weights for NaN")
    return value


def _gradient(
    score: Callable[[Tensor], Tensor],
    spectrum: Tensor,
    size: tuple[int, int, int],
    view: Tensor,
    seen_size: tuple[int, int],
    helped: bool,
) -> tuple[float, Tensor]:
    with torch.enable_grad():
        total = score(seen(pixels(spectrum, size)[None], view, seen_size)).sum()
    if not total.requires_grad:
        return float(total), torch.zeros_like(spectrum)
    (found,) = torch.autograd.grad(total, spectrum, retain_graph=helped, allow_unused=True)
    if helped and (found is None or not bool((found != 0).any())):
        # Every rectifier on the path is off: bypass them, as lucid does for the first steps.
        with Rectifiers(lambda arriving: arriving, gated=False):
            (found,) = torch.autograd.grad(total, spectrum, allow_unused=True)
    return float(total.detach()), torch.zeros_like(spectrum) if found is None else found.detach()


def frequencies(height: int, width: int) -> Tensor:
    """Magnitudes of a real transform's frequencies in cycles per pixel [H, W // 2 + 1]."""
    down, across = torch.fft.fftfreq(height)[:, None], torch.fft.rfftfreq(width)[None]
    found: Tensor = (down**2 + across**2).sqrt()
    return found


def initial_spectrum(size: tuple[int, int, int], generator: torch.Generator) -> Tensor:
    """Small Gaussian coefficients [C, H, W // 2 + 1, 2]."""
    channels, height, width = size
    return 0.01 * torch.randn((channels, height, width // 2 + 1, 2), generator=generator)


def pixels(spectrum: Tensor, size: tuple[int, int, int]) -> Tensor:
    """The image [C, H, W] in 0..1 of a spectrum whose power falls with the square of frequency."""
    channels, height, width = size
    scale = 1 / frequencies(height, width).clamp(min=1 / max(height, width)).to(spectrum)
    # Lucid's scale: its inverse transform is not orthonormal, and it divides by four.
    waves = torch.view_as_complex((spectrum * scale[..., None]).contiguous())
    image = torch.fft.irfft2(waves, s=(height, width), norm="ortho") / 4
    if channels == 3:
        colour = torch.tensor(_COLOUR).to(image)
        image = torch.einsum("kc,chw->khw", colour / colour.norm(dim=0).max(), image)
    found: Tensor = image.sigmoid()
    return found


def _view(generator: torch.Generator, turn: float, zoom: float, jitter: float) -> Tensor:
    """A random affine map [1, 2, 3] from the model's view to the image."""
    drawn = 2 * torch.rand(4, generator=generator) - 1
    angle, scale = math.radians(turn) * float(drawn[0]), 1 + zoom * float(drawn[1])
    down, across = (2 * jitter * drawn[2:]).tolist()
    cos, sin = math.cos(angle) * scale, math.sin(angle) * scale
    return torch.tensor([[[cos, -sin, across], [sin, cos, down]]])


def cropped(view: Tensor, generator: torch.Generator) -> Tensor:
    """The map from a crop of half the side, anywhere in the view, to the image."""
    place = torch.rand(2, generator=generator) - 0.5
    found = view.clone()
    found[:, :, 2] += (view[:, :, :2] @ place[:, None])[:, :, 0]
    found[:, :, :2] /= 2
    return found


def seen(images: Tensor, view: Tensor, size: tuple[int, int] | None = None) -> Tensor:
    """Images [1, C, H, W] under an affine map, bilinearly, borders reflected; of another size."""
    shape = [*images.shape[:2], *(size or images.shape[2:])]
    grid = affine_grid(view, shape, align_corners=False)
    return grid_sample(
        images, grid.to(images), mode="bilinear", padding_mode="reflection", align_corners=False
    )
