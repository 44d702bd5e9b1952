"""The image size that a model takes: how it is built, and tried out where that does not tell."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from gradscope.errors import UsageError
from gradscope.models.model import Model, pair
from gradscope.models.probe import held, run
from gradscope.text import listed, plural

Size = tuple[int, int]

#: ImageNet's first: a CNN with global pooling takes almost any size, most likely trained on 224.
_TRIED = (224, 32, 28, 64, 96, 128, 256, 299, 336, 384, 448, 512, 518, 240, 192, 160, 288, 320, 380,
          456, 600, 768, 1024, 48, 16, 8)  # fmt: skip
#: How many tokens without a position (class, distillation, registers) models have.
_PREFIXES = (0, 1, 2, 5, 8, 16)
#: Convolutions of patches are at least so large; smaller ones begin a CNN.
_SMALLEST_PATCH = 8


def built_size(model: Model) -> Size | None:
    """Height and width that a model is built for; None where that is free or not known."""
    _, height, width = model.size
    return (height, width) if height and width else None


def image_size(model: Model, channels: int | None = None) -> tuple[int, int, int]:
    """Channels, height and width of the images that a model takes.

    Raises UsageError, quoting the model's error, when no common size works.
    """
    depth, height, width = model.size
    depth = depth or channels or 3
    if height and width:
        return depth, height, width
    key = ("size", depth)
    if key not in model.known:
        model.known[key] = _tried(model, depth)
    found: tuple[int, int, int] = model.known[key]
    return found[0], height or found[1], width or found[2]


def refusal(model: Model, size: tuple[int, int, int]) -> str | None:
    """What a model says to a black image of a size [C, H, W]; None where it takes it."""
    key = ("refusal", size)
    if key not in model.known:
        model.known[key] = _refusal(model, size)
    found: str | None = model.known[key]
    return found


def _refusal(model: Model, size: tuple[int, int, int]) -> str | None:
    parameter = next(model.module.parameters(), None)
    like = torch.zeros(()) if parameter is None else parameter
    with held(model.module), torch.no_grad():
        try:
            run(model, torch.zeros((1, *size), device=like.device).to(like.dtype))
        # Of the model's answer, which there is.
        except UsageError:
            return None
        # A model may refuse a size with any exception.
        except Exception as error:
            return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
    return None


def _tried(model: Model, channels: int) -> tuple[int, int, int]:
    # A single patch would be broadcast to every position.
    least = max((patch for _, patch in _positions(model.module)), default=0)
    sizes = [*_hints(model.module), *((side, side) for side in _TRIED if side > least)]
    said = ""
    # The first convolution may follow a rearrangement of space into channels.
    for depth in dict.fromkeys((channels, 3)):
        for height, width in dict.fromkeys(sizes):
            refused = refusal(model, (depth, height, width))
            if refused is None:
                return depth, height, width
            said = said or refused
    raise UsageError(_nothing_fits(model, channels, said))


def _nothing_fits(model: Model, channels: int, said: str) -> str:
    oblong = list(_oblong(model, channels))
    if oblong:
        (height, width), shown = oblong[0], (f"{h}×{w}" for h, w in oblong)
        return (
            "the model's positions make no square; it takes images of "
            f"{listed(shown, len(oblong))}: say which (height×width) with --preprocess "
            f"size={height}x{width}"
        )
    return (
        f"the model accepts {plural(channels, 'channel')} in none of the sizes "
        f"{', '.join(map(str, _TRIED))} ({said}); is it an image classifier? If so, name the size "
        "with --preprocess size=…"
    )


# --- what parameters and configurations tell ------------------------------------------------------


def _hints(module: nn.Module) -> Iterator[Size]:
    """Sizes that a model was probably trained on, to be tried first."""
    for tokens, patch in _positions(module):
        for prefix in _PREFIXES:
            side = math.isqrt(max(tokens - prefix, 0))
            if side > 1 and side * side == tokens - prefix:
                yield side * patch, side * patch
    yield from pair(getattr(getattr(module, "config", None), "image_size", None))


def _oblong(model: Model, channels: int) -> Iterator[Size]:
    """The sizes that are not square and that a model with so many positions takes."""
    for tokens, patch in _positions(model.module):
        for count in (tokens - prefix for prefix in _PREFIXES):
            rows = [n for n in range(2, max(count, 0)) if count % n == 0]
            for size in sorted(((n * patch, count // n * patch) for n in rows), key=_length):
                if refusal(model, (channels, *size)) is None:
                    yield size


def _length(size: Size) -> int:
    return max(size)


def _positions(module: nn.Module) -> Iterator[tuple[int, int]]:
    """The number of learned positions, and the edge of a patch."""
    named = list(module.named_parameters())
    patch = next((p.shape[-1] for name, p in named if _reads_patches(name, p)), None)
    if patch is None:
        return
    for name, parameter in named:
        places = parameter.shape[:-1].numel()
        if "pos" in name.lower() and 2 <= parameter.dim() <= 4 and places > 3:
            yield places, patch


def _reads_patches(name: str, parameter: Tensor) -> bool:
    shape = parameter.shape
    square = len(shape) == 4 and shape[-1] == shape[-2]
    return name.endswith("weight") and square and shape[-1] >= _SMALLEST_PATCH
