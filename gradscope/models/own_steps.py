"""What a model itself does to a picture before it looks: normalise it, resize it.

Torchvision's detectors do both, wrapped models and exported pipelines often the first. Images that
are normalised before them are normalised twice. The operators that first read the image tell, in
any form of model; names of attributes do not.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gradscope.models.model import Model
from gradscope.models.probe import held
from gradscope.models.storages import storage_of, tensors_in

_AFFINE = ("add", "sub", "rsub", "mul", "div")
#: What is computed of a picture without changing its values.
_COPIES = ("clone", "copy", "contiguous", "_to_copy", "view", "_unsafe_view", "reshape", "unbind",
           "select", "slice", "unsqueeze", "squeeze", "alias", "detach", "lift_fresh", "empty_like",
           "permute", "expand", "split", "stack", "as_strided", "isnan", "isfinite")  # fmt: skip
_RESIZING = ("upsample", "_upsample", "interpolate", "grid_sampler")


@dataclass(frozen=True, slots=True)
class OwnSteps:
    """The normalisation (pixels - mean) / std that a model begins with, of pixels 0..``white``."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    white: int
    #: Whether it then resizes the picture, so that it takes any size.
    resizes: bool
    #: The height and width that it squashes every picture to, whatever its aspect.
    squashed: tuple[int, int] | None = None

    def __str__(self) -> str:
        mean, std = ("/".join(f"{v:g}" for v in values) for values in (self.mean, self.std))
        found = f"subtracts {mean}, divides by {std}"
        return f"{found} and resizes the picture" if self.resizes else found


def own_steps(model: Model, channels: int | None = None) -> OwnSteps | None:
    """What the model begins with; None where that is no normalisation of pixels."""
    depth = model.size[0] or channels or 3
    # Not square: a model that resizes it may keep its aspect.
    height, width = model.size[1] or 64, model.size[2] or 96
    # Every pixel value once and the same in each channel, so that channels can be compared.
    ramp = torch.linspace(0, 1, height * width).view(1, 1, height, width)
    parameter = next(model.module.parameters(), ramp)
    image = ramp.repeat(model.batch or 1, depth, 1, 1).to(parameter)
    watch = _Begins(image)
    # It has seen enough, or the model refuses the size.
    with suppress(Exception), held(model.module), torch.no_grad(), watch:
        model.forward(image, {})
    return _normalisation(image[0], watch)


def _normalisation(image: Tensor, watch: _Begins) -> OwnSteps | None:
    found = watch.reached
    if found.numel() != image.numel():
        return None
    before, after = (t.reshape(len(image), -1).double() for t in (image, found))
    scale = (after[:, -1] - after[:, 0]) / (before[:, -1] - before[:, 0])
    shift = after[:, 0]
    linear = before * scale[:, None] + shift[:, None]
    if not torch.allclose(linear, after, rtol=1e-3, atol=1e-3) or not bool((scale > 0).all()):
        return None
    mean, std = (-shift / scale).tolist(), (1 / scale).tolist()
    pairs = list(zip(mean, std, strict=True))
    for white in (1, 255):
        if all(_of_pictures(m / white, s / white) for m, s in pairs) or all(
            white > 1 and abs(m) < 1e-3 and abs(s / white - 1) < 0.01 for m, s in pairs
        ):
            squashed = _squashed(image.shape[1:], watch.resized)
            resizes = watch.resized is not None
            return OwnSteps(_rounded(mean), _rounded(std), white, resizes, squashed)
    return None


def _squashed(before: Sequence[int], after: tuple[int, int] | None) -> tuple[int, int] | None:
    if after is None or abs(after[0] * before[1] / (after[1] * before[0]) - 1) < 0.1:
        return None
    return after


def _of_pictures(mean: float, std: float) -> bool:
    """Whether pictures of values 0..1 have about this mean and spread, or become -1..1."""
    return 0.2 <= mean <= 0.7 and 0.1 <= std <= 0.6


def _rounded(values: list[float]) -> tuple[float, ...]:
    return tuple(float(f"{value:.4g}") + 0.0 for value in values)


class _EnoughError(Exception):
    """The image is no longer one."""


class _Begins(TorchDispatchMode):
    """Follows the image through operators that scale and shift it, up to the first other one."""

    def __init__(self, image: Tensor) -> None:
        super().__init__()
        self._followed = {storage_of(image)}
        self._count = image[0].numel()
        self.reached = image[0]
        self.resized: tuple[int, int] | None = None

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Runs an operator, and notes what it made of the image."""
        name = function._schema.name.removeprefix("aten::").rstrip("_")
        read = list(tensors_in((args, kwargs or {})))
        ours = [t for t in read if storage_of(t) in self._followed]
        others = [t for t in read if storage_of(t) not in self._followed]
        if not ours:
            return function(*args, **(kwargs or {}))
        shifted = name in _AFFINE and all(t.numel() in (1, 3) for t in others)
        if not shifted and name not in _COPIES:
            if name.startswith(_RESIZING):
                height, width = function(*args, **(kwargs or {})).shape[-2:]
                self.resized = height, width
            raise _EnoughError
        found = function(*args, **(kwargs or {}))
        for made in tensors_in(found):
            if made.dtype.is_floating_point and made.numel() >= self._count:
                self._followed.add(storage_of(made))
                self.reached = made.detach().reshape(-1)[: self._count].clone()
        return found
