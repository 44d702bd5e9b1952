"""Gaussian blur: the start of insertion, and a reference of integrated gradients."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import conv2d, pad


def gaussian_blur(images: Tensor, sigma: float) -> Tensor:
    """Images [..., H, W] blurred by a Gaussian of ``sigma`` pixels, borders reflected.

    The kernel reaches three sigma to either side, or as far as the image allows. A constant image
    stays as it is.
    """
    rows = images.reshape(-1, 1, *images.shape[-2:])
    for dim in (2, 3):
        rows = _along(rows, dim, sigma)
    return rows.reshape(images.shape)


def _along(rows: Tensor, dim: int, sigma: float) -> Tensor:
    reach = min(round(3 * sigma), rows.shape[dim] - 1)
    places = torch.arange(-reach, reach + 1, dtype=torch.float64)
    kernel = torch.exp(-(places**2) / (2 * sigma**2))
    shape = (1, 1, -1, 1) if dim == 2 else (1, 1, 1, -1)
    border = (0, 0, reach, reach) if dim == 2 else (reach, reach, 0, 0)
    weights = (kernel / kernel.sum()).view(shape).to(rows)
    return conv2d(pad(rows, border, mode="reflect"), weights)
