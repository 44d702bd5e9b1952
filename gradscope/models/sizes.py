"""The image size that a model takes, tried out where it is not written down."""

from __future__ import annotations

import torch

from gradscope.errors import UsageError
from gradscope.models.model import Model
from gradscope.models.probe import held, run
from gradscope.text import plural

#: ImageNet's first: a CNN with global pooling takes almost any size, most likely trained on 224.
_TRIED = (224, 32, 28, 64, 96, 128, 256, 299, 336, 384, 448, 512, 48, 16, 8)


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
    side = model.known[key]
    return depth, height or side, width or side


def _tried(model: Model, channels: int) -> int:
    parameter = next(model.module.parameters(), None)
    like = torch.zeros(()) if parameter is None else parameter
    said = ""
    with held(model.module), torch.no_grad():
        for side in _TRIED:
            try:
                run(
                    model, torch.zeros((1, channels, side, side), device=like.device).to(like.dtype)
                )
            except UsageError:
                raise
            # A model may refuse a size with any exception.
            except Exception as error:
                said = said or str(error).strip().splitlines()[0][:200]
                continue
            return side
    raise UsageError(
        f"the model accepts {plural(channels, 'channel')} in none of the sizes "
        f"{', '.join(map(str, _TRIED))} ({said}); is it an image classifier? If so, name the size "
        "with --preprocess size=…"
    )
