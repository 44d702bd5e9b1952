"""Occlusion: squares of the input are covered and scores compared. Maps are [N, H, W]."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from gradscope.attribution.formulas.gradients import Result
from gradscope.attribution.subject import Points, Size, Subject, forward, in_windows
from gradscope.errors import UsageError
from gradscope.models.quick import same_answers
from gradscope.models.windows import Windowed

#: Squares from which on it pays to see whether only what they change can be computed.
_WORTH = 16


def occlusion(subject: Subject, *, window: int, stride: int, fill: float) -> Result:
    """What the score loses when a square is covered with ``fill``, averaged over the squares.

    Squares of ``window`` pixels lie every ``stride`` pixels; the last ones end at the border.
    """
    inputs = subject.inputs
    count, _, height, width = inputs.shape
    window = window or max(1, min(height, width) // 7)
    stride = stride or max(1, window // 2)
    if not 1 <= stride <= window:
        raise UsageError(f"the stride has to be 1 to {window} (the window), or pixels are missed")
    places = list(_corners(height, width, window, stride))
    corners = torch.tensor(places, device=inputs.device)
    squares = _squares(corners, window, height, width)
    total = inputs.new_zeros((count, height, width))
    for image, whole in enumerate(subject.own_scores):
        one = subject.only(image)
        points, size = _covering(one, squares, places, fill)
        for which, _, found in one.scores(points, len(places), size=size):
            total[image] += ((whole - found)[:, None, None] * squares[which]).sum(0)
    facts = {"forwards": count * len(places), "window": window}
    return total / squares.sum(0), facts


def _covering(
    subject: Subject, squares: Tensor, places: Sequence[tuple[int, int]], fill: float
) -> tuple[Points, Size]:
    """An image with squares covered, as what differs from it where the model takes that."""
    image = subject.inputs
    height, width = (int(squares[0].any(axis).sum()) for axis in (1, 0))

    def whole(which: Tensor, _images: Tensor) -> Tensor:
        return image.masked_fill(squares[which][:, None], fill)

    def windowed(which: Tensor, _images: Tensor) -> Tensor:
        parts = image.new_full((len(which), image.shape[1], height, width), fill)
        return Windowed(image, parts, [places[at] for at in which.tolist()])

    model, some = subject.model, torch.tensor([0, len(places) // 2], device=image.device)
    asked = model.quick and model.batch is None and len(places) >= _WORTH
    alike = asked and same_answers(model, whole(some, some), windowed(some, some))
    return (windowed, in_windows) if alike else (whole, forward)


def _squares(corners: Tensor, window: int, height: int, width: int) -> Tensor:
    """The square below and right of each corner [M, 2] as a mask [M, H, W]."""
    down, across = (
        torch.arange(length, device=corners.device)[None] - corners[:, axis, None]
        for axis, length in enumerate((height, width))
    )
    rows, columns = ((at >= 0) & (at < window) for at in (down, across))
    return rows[:, :, None] & columns[:, None, :]


def _corners(height: int, width: int, window: int, stride: int) -> Iterator[tuple[int, int]]:
    def starts(length: int) -> list[int]:
        last = max(0, length - window)
        return sorted({*range(0, last + 1, stride), last})

    yield from ((top, left) for top in starts(height) for left in starts(width))
