"""Noisy linear imputation (Rong et al. 2022, arXiv:2202.00449): removed pixels from those around.

Each removed pixel is the weighted mean of its eight neighbours, 1/6 for direct and 1/12 for
diagonal ones, as many of them as there are: a linear system that conjugate gradients solve. Noise
keeps the shape of what was removed from being read off the smooth filling.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import conv2d

_NOISE = 0.01
_MOST_ROUNDS = 1000
_WEIGHTS = ((1 / 12, 1 / 6, 1 / 12), (1 / 6, 0.0, 1 / 6), (1 / 12, 1 / 6, 1 / 12))


def imputed(image: Tensor, gone: Tensor, seed: int, noise: float = _NOISE) -> Tensor:
    """An image [C, H, W] without each of the masks ``gone`` [M, H, W], as [M, C, H, W].

    Where nothing is left the image's mean stands. ``noise`` is its spread, in the image's units.
    """
    below = gone[:, None].to(image)
    mean = image.mean((1, 2), keepdim=True)
    offset = (image - mean)[None]
    filled = _solved(below, _neighbours(offset * (1 - below)) * below)
    generator = torch.Generator().manual_seed(seed)
    drawn = noise * torch.randn(filled.shape, generator=generator).to(image)
    return mean + torch.where(below > 0, filled + drawn, offset)


def _neighbours(values: Tensor) -> Tensor:
    """The weighted sums over the neighbours; nothing lies beyond the border."""
    kernel = torch.tensor(_WEIGHTS).to(values)[None, None]
    flat = values.flatten(0, 1)[:, None]
    return conv2d(flat, kernel, padding=1).view_as(values)


def _solved(below: Tensor, wanted: Tensor) -> Tensor:
    """x on the removed pixels with degree x - neighbours(x) = wanted, by conjugate gradients."""
    degree = _neighbours(torch.ones_like(below))
    scale = torch.where(below > 0, 1 / degree, 0.0)
    found = torch.zeros_like(wanted)
    rest = wanted.clone()
    near = scale * rest
    direction = near.clone()
    size = (rest * near).sum((2, 3), keepdim=True)
    least = 1e-8 * size
    for _ in range(_MOST_ROUNDS):
        if bool((size <= least).all()):
            break
        applied = (degree * direction - _neighbours(direction)) * below
        step = _over(size, (direction * applied).sum((2, 3), keepdim=True))
        found += step * direction
        rest -= step * applied
        near = scale * rest
        before, size = size, (rest * near).sum((2, 3), keepdim=True)
        direction = near + _over(size, before) * direction
    return found


def _over(above: Tensor, below: Tensor) -> Tensor:
    return torch.where(below > 0, above / torch.where(below > 0, below, 1), 0.0)
