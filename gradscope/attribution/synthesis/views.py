"""How a model sees a picture that is being made: at which resolution, how much of it, turned how.

The picture is made from the coarse to the fine: the model first sees the whole at a low resolution,
for a part of the work, then parts of a sharper one. Each view is turned, scaled and shifted at
random, so that no detail survives that a small shift would destroy (Olah et al. 2017).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample

Area = tuple[int, int]

#: Where stages end, as shares of the steps, and the model's sides in them, where it takes them.
_ENDS = (0.55, 0.85, 1.0)
_SIDES = (4 / 7, 5 / 7, 1.0)
#: Sides of the networks that are shown less are multiples of this, as most of them ask for.
_STRIDE = 32
#: Views scale by this much either way, are turned and shifted by at most so much.
_SCALES = (0.8, 1.3)
_WIDEST = 1.2
_TURN = 15.0
_SHIFT = 0.1


@dataclass(frozen=True, slots=True)
class Stage:
    """Steps in which the picture has one resolution."""

    #: Up to which share of the steps.
    until: float
    #: The picture's resolution, and that of the model's view.
    made: Area
    seen: Area
    #: The least and the greatest part of the picture's side that a view covers.
    cover: tuple[float, float]


def smaller(model: Area) -> tuple[Area, ...]:
    """The sizes at which a model is shown pictures of less than its own size."""
    return tuple((_multiple(model[0] * k), _multiple(model[1] * k)) for k in _SIDES[:-1])


def _multiple(side: float) -> int:
    return round(side / _STRIDE) * _STRIDE if side >= 2 * _STRIDE else round(side)


def stages(picture: Area, model: Area, shown: tuple[Area, ...]) -> tuple[Stage, ...]:
    """Stages of a picture, for a model of a size, which is ``shown`` others before it."""
    views = (*shown, model) if shown else (model,) * len(_ENDS)
    return tuple(_stages(picture, views))


def _stages(picture: Area, views: tuple[Area, ...]) -> Iterator[Stage]:
    least = min(1.0, max(views[0]) / max(picture))
    for k, (until, seen) in enumerate(zip(_ENDS, views, strict=True)):
        factor = least ** (1 - k / (len(views) - 1))
        made = (max(1, round(picture[0] * factor)), max(1, round(picture[1] * factor)))
        share = max(seen) / max(made)
        low, high = (share * scale for scale in _SCALES)
        yield Stage(until, made, seen, (min(low, _WIDEST), min(high, _WIDEST)))


def view(stage: Stage, generator: torch.Generator) -> Tensor:
    """A random affine map [1, 2, 3] from the model's view to the picture."""
    turn, down, across = (2 * torch.rand(3, generator=generator) - 1).tolist()
    low, high = map(math.log, stage.cover)
    scale = math.exp(low + (high - low) * float(torch.rand(1, generator=generator)))
    room = max(0.0, 1 - scale) + _SHIFT
    angle = math.radians(_TURN) * turn
    cos, sin = math.cos(angle) * scale, math.sin(angle) * scale
    return torch.tensor([[[cos, -sin, room * across], [sin, cos, room * down]]])


def seen(images: Tensor, chosen: Tensor, size: Area) -> Tensor:
    """Images [1, C, H, W] under an affine map, bilinearly, of a size; borders are reflected."""
    grid = affine_grid(chosen, [*images.shape[:2], *size], align_corners=False)
    return grid_sample(
        images, grid.to(images), mode="bilinear", padding_mode="reflection", align_corners=False
    )
