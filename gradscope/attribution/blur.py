"""Blurred images: what integrated gradients and insertion start from."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import conv2d, pad


def gaussian_blur(images: Tensor, sigma: float, width: int | None = None) -> Tensor:
    """Images [..., H, W] under a Gaussian of ``sigma`` pixels, borders reflected.

    ``width`` is the kernel's, odd; by default it reaches over three sigma. It is cut where the
    image is smaller. A constant image stays as it is.
    """
    rows = images.reshape(-1, 1, *images.shape[-2:])
    for dim in (2, 3):
        rows = _along(rows, dim, sigma, width)
    return rows.reshape(images.shape)


def _along(rows: Tensor, dim: int, sigma: float, width: int | None) -> Tensor:
    reach = min((width or 2 * round(3 * sigma) + 1) // 2, rows.shape[dim] - 1)
    places = torch.arange(-reach, reach + 1, dtype=torch.float64)
    kernel = torch.exp(-(places**2) / (2 * sigma**2))
    shape = (1, 1, -1, 1) if dim == 2 else (1, 1, 1, -1)
    border = (0, 0, reach, reach) if dim == 2 else (reach, reach, 0, 0)
    weights = (kernel / kernel.sum()).view(shape).to(rows)
    return conv2d(pad(rows, border, mode="reflect"), weights)
