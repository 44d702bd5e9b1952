"""Methods that cover parts of the input and watch the score: no gradient is needed.

They give maps [N, H, W] in input geometry.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from gradscope.errors import UsageError
from gradscope.explain.gradients import Result, Score
from gradscope.explain.registry import method


@method("occlusion", "input", "Zeiler & Fergus 2014, arXiv:1311.2901")
def occlusion(
    score: Score,
    inputs: Tensor,
    *,
    window: int = 16,
    stride: int = 8,
    fill: float = 0.0,
    chunk: int = 64,
) -> Result:
    """What the score loses when a square is covered with ``fill``, averaged over the squares.

    Squares of ``window`` pixels every ``stride``; the last ones end at the border.
    """
    if not 1 <= stride <= window:
        raise UsageError("the stride counts from 1 and is at most the window, or pixels are missed")
    count, _, height, width = inputs.shape
    whole = _scores(score, inputs, torch.arange(count, device=inputs.device), chunk)
    total = inputs.new_zeros((count, height, width))
    covered = inputs.new_zeros((height, width))
    for top, left in _corners(height, width, window, stride):
        square = (slice(top, top + window), slice(left, left + window))
        hidden = inputs.clone()
        hidden[(..., *square)] = fill
        images = torch.arange(count, device=inputs.device)
        lost = whole - _scores(score, hidden, images, chunk)
        total[(slice(None), *square)] += lost[:, None, None]
        covered[square] += 1
    return total / covered, {}


def _corners(height: int, width: int, window: int, stride: int) -> Iterator[tuple[int, int]]:
    def starts(length: int) -> list[int]:
        last = max(0, length - window)
        return sorted({*range(0, last + 1, stride), last})

    yield from ((top, left) for top in starts(height) for left in starts(width))


@method("rise", "input", "Petsiuk et al. 2018, arXiv:1806.07421")
def rise(
    score: Score,
    inputs: Tensor,
    *,
    masks: int = 1000,
    grid: int = 7,
    keep: float = 0.5,
    seed: int = 0,
    chunk: int = 64,
) -> Result:
    """Mean of random smooth masks, weighted by the score of what they leave, over ``keep``.

    Masks are drawn on the CPU, one generator each, so neither chunk nor device changes them.
    """
    if masks < 1 or not 0 < keep < 1:
        raise UsageError("masks count from 1 and keep lies between 0 and 1")
    count, _, height, width = inputs.shape
    total = inputs.new_zeros((count, height, width))
    images = torch.arange(count, device=inputs.device)
    for number in range(masks):
        mask = _mask(seed * 1_000_003 + number, grid, keep, height, width).to(inputs)
        total += _scores(score, inputs * mask, images, chunk)[:, None, None] * mask
    return total / (masks * keep), {}


def _mask(seed: int, grid: int, keep: float, height: int, width: int) -> Tensor:
    """A coarse random grid, enlarged by one cell, blurred by interpolation, shifted at random."""
    generator = torch.Generator().manual_seed(seed)
    cells = (torch.rand((1, 1, grid, grid), generator=generator) < keep).double()
    tall, wide = -(-height // grid), -(-width // grid)
    size = ((grid + 1) * tall, (grid + 1) * wide)
    smooth = interpolate(cells, size=size, mode="bilinear", align_corners=False)[0, 0]
    top = int(torch.randint(0, tall, (), generator=generator))
    left = int(torch.randint(0, wide, (), generator=generator))
    return smooth[top : top + height, left : left + width]


def _scores(score: Score, inputs: Tensor, images: Tensor, chunk: int) -> Tensor:
    pairs: Any = zip(torch.split(inputs, chunk), torch.split(images, chunk), strict=True)
    with torch.no_grad():
        return torch.cat([score(x, i).detach() for x, i in pairs])
