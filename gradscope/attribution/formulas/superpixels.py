"""Parts of a picture that belong together: simple linear iterative clustering."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_ROUNDS = 10
#: A step of one standard deviation of colour counts as much as this part of a superpixel's side.
_COLOUR = 0.5


def superpixels(image: Tensor, count: int) -> Tensor:
    """About ``count`` superpixels of an image [C, H, W]: labels [H, W] from 0, without gaps.

    K-means over colour and position from centres on a grid (Achanta et al. 2012, SLIC).
    """
    _, height, width = image.shape
    side = math.sqrt(height * width / count)
    down = max(1, round(height / side))
    across = max(1, round(count / down))
    rows, columns = (torch.arange(n, device=image.device) for n in (height, width))
    place = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), -1).flatten(0, 1) / side
    spread = image.flatten(1).std(1).clamp(min=1e-6)
    colour = _COLOUR * (image.flatten(1) / spread[:, None]).T
    pixels = torch.cat([colour, place.to(colour)], 1)
    labels = (rows * down // height)[:, None] * across + columns * across // width
    labels = labels.flatten()
    for _ in range(_ROUNDS):
        labels = torch.cdist(pixels, _centres(pixels, labels)).argmin(1)
    _, numbers = labels.unique(return_inverse=True)
    return torch.as_tensor(numbers).view(height, width)


def _centres(pixels: Tensor, labels: Tensor) -> Tensor:
    """The mean pixel of each label that has any."""
    used, labels, counts = labels.unique(return_inverse=True, return_counts=True)
    sums = pixels.new_zeros((len(used), pixels.shape[1])).index_add_(0, labels, pixels)
    return torch.as_tensor(sums / counts[:, None])
