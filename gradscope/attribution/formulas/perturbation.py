"""Methods that cover parts of the input and compare scores, without gradients.

Maps are [N, H, W] in input geometry.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from gradscope.attribution.formulas.gradients import Result
from gradscope.attribution.subject import Points, Subject
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
        for which, _, found in one.scores(_covering(one, squares, places, fill), len(places)):
            total[image] += ((whole - found)[:, None, None] * squares[which]).sum(0)
    facts = {"forwards": count * len(places), "window": window}
    return total / squares.sum(0), facts


def _covering(
    subject: Subject, squares: Tensor, places: Sequence[tuple[int, int]], fill: float
) -> Points:
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
    return windowed if alike else whole


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


def rise(subject: Subject, *, masks: int, grid: int, keep: float, coverage: bool) -> Result:
    """The mean probability of what random smooth masks leave, weighted by each mask at a pixel.

    Divided by what the masks leave of each pixel, sum(p M) / sum(M). The paper divides by what
    they leave on average (``coverage=False``): masks leave less of the border, and no two pixels
    as often, so that a constant model gives a map, too. Masks are drawn on the CPU, one generator
    each, so neither chunk nor device changes them.
    """
    if masks < 1 or grid < 1 or not 0 < keep < 1:
        raise UsageError("masks and grid have to be at least 1, and keep between 0 and 1")
    inputs = subject.inputs
    count, _, height, width = inputs.shape

    def drawn(which: Tensor) -> Tensor:
        seeds = (subject.seed * 1_000_003 + number for number in which.tolist())
        return torch.stack([_mask(seed, grid, keep, height, width) for seed in seeds]).to(inputs)

    def points(which: Tensor, images: Tensor) -> Tensor:
        return inputs[images] * drawn(which)[:, None]

    # Sums of differences from one probability: of equal ones the map is equal to the last bit.
    own = subject.scores(subject.own, ask=subject.probability)
    whole = torch.cat([found for _, _, found in own])
    total = inputs.new_zeros((count, height, width))
    covered, lost = torch.zeros_like(total), torch.zeros_like(whole)
    for which, images, found in subject.scores(points, masks, subject.probability):
        mask, change = drawn(which), found - whole[images]
        total.index_add_(0, images, change[:, None, None] * mask)
        covered.index_add_(0, images, mask)
        lost.index_add_(0, images, change)
    whole, lost = whole[:, None, None], lost[:, None, None] / masks
    facts = {"forwards": count * (masks + 1)}
    if not coverage:
        return (total + whole * covered) / (masks * keep), facts
    # What no mask leaves is as good as any other part.
    return whole + torch.where(covered > 0, total / covered, lost), facts


def _mask(seed: int, grid: int, keep: float, height: int, width: int) -> Tensor:
    """A coarse random grid, upsampled bilinearly to one cell more than the image, and cropped."""
    generator = torch.Generator().manual_seed(seed)
    cells = (torch.rand((1, 1, grid, grid), generator=generator) < keep).float()
    tall, wide = -(-height // grid), -(-width // grid)
    size = ((grid + 1) * tall, (grid + 1) * wide)
    smooth = interpolate(cells, size=size, mode="bilinear", align_corners=False)[0, 0]
    top = int(torch.randint(0, tall, (), generator=generator))
    left = int(torch.randint(0, wide, (), generator=generator))
    return smooth[top : top + height, left : left + width]
