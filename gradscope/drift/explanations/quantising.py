"""Weights in codes, or on the grid that codes left: how much noise that is, and had to be."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gradscope.checkpoints.tensors import TensorRef
from gradscope.checkpoints.tiles import PIECE
from gradscope.drift.explanations.subject import Subject
from gradscope.drift.result import Explanation
from gradscope.quantization.decoding import Dequantized
from gradscope.quantization.weights import QuantizedWeight
from gradscope.report.model import Fact
from gradscope.weights.products import values

Values = npt.NDArray[np.float64]

#: Elements of each of the places at which a grid is looked at, and how many such places.
_PLACE, _PLACES = 1 << 16, 4
#: Elements that are looked at first, and how many of them may not be zero to say anything.
_GLANCE, _FEW = 1 << 12, 16
#: Elements that may share a scale, beside those of the tensor and of a row.
_BLOCKS = (256, 128, 64, 32, 16)
#: Values of codes of at most eight bits, and types that have many more.
_LEVELS = 256
_WIDE = ("F64", "F32", "F16", "BF16")
#: Elements that differ from one another, of those that are not zero: more show no grid.
_REPEATED, _ENOUGH = 0.75, 256
#: Decibels that what is nearest may be away from it by rounding of the values themselves.
_NEAR = 0.1


@dataclass(frozen=True, slots=True)
class Grid:
    """The values that groups of elements take, and what is lost by taking the nearest of them."""

    #: Elements of a group; 0 for all of the tensor.
    group: int
    #: Values that any group takes at the most.
    levels: int
    #: Signal-to-noise ratio of the elements, and of the nearest values of the grid.
    snr_db: float
    nearest_db: float

    @property
    def bits(self) -> int:
        """Bits of codes for so many values."""
        return max(1, math.ceil(math.log2(self.levels)))

    @property
    def cost(self) -> float:
        """Bits an element that describe it: of its code, and its share of the values in 16 bits."""
        return math.log2(self.levels) + (16 * self.levels / self.group if self.group else 0.0)

    @property
    def nearest(self) -> bool:
        """Whether hardly any element could be nearer to what it stands for."""
        return self.nearest_db - self.snr_db <= _NEAR

    @property
    def said(self) -> str:
        """The same in words."""
        if self.nearest:
            return "each the nearest value of its grid"
        return f"{self.nearest_db - self.snr_db:.1f} dB below the nearest values of its grid"


def quantised(s: Subject) -> Explanation | None:
    """How far the values of codes are from what they stand for, as a signal-to-noise ratio."""
    noise = s.measures.relative_drift
    if s.quantized is None or not noise or noise >= 1:
        return None
    weight = s.quantized
    ratio = -20 * math.log10(noise)
    grid = _grid_of_codes(s, weight)
    text = f"quantised ({weight.scheme}): {ratio:.1f} dB signal to noise"
    facts: dict[str, Fact] = {"scheme": weight.scheme, "snr_db": ratio, "nmse": noise**2}
    if weight.bits is not None:
        facts["bits"] = weight.bits
    if grid is not None:
        text, facts = f"{text}, {grid.said}", facts | {"nearest_db": grid.nearest_db}
    return Explanation(kind="quantised", text=text, residual=noise, facts=facts)


def _grid_of_codes(s: Subject, weight: QuantizedWeight) -> Grid | None:
    """That of the new tensor, where one code is one element."""
    if s.new.decoding is None:
        return None
    by_row = isinstance(s.new.decoding, Dequantized)
    group = weight.group or (s.new.row_numel if by_row else 0)
    return _grid(s.base, s.new, group) if group else None


def requantised(s: Subject) -> Explanation | None:
    """Floats that take few values in each tensor, row or block, as codes leave them."""
    noise = s.measures.relative_drift
    if s.quantized is not None or not s.floats or not noise or noise >= 0.5:
        return None
    if not s.measures.finite or len(s.new.shape) < 2 or s.new.dtype not in _WIDE:
        return None
    grid = coarsest(s.base, s.new)
    if grid is None:
        return None
    where = (
        "the tensor"
        if not grid.group
        else "each row"
        if grid.group == s.new.row_numel
        else f"each {grid.group} elements"
    )
    ratio = -20 * math.log10(noise)
    text = (
        f"quantised to {grid.bits} bits and stored as {s.new.dtype} (at most {grid.levels} values "
        f"in {where}): {ratio:.1f} dB signal to noise, {grid.said}"
    )
    facts: dict[str, Fact] = {
        "bits": grid.bits, "group": grid.group, "snr_db": ratio, "nmse": noise**2,
        "nearest_db": grid.nearest_db,
    }  # fmt: skip
    return Explanation(kind="quantised", text=text, residual=noise, facts=facts)


def coarsest(base: TensorRef, new: TensorRef) -> Grid | None:
    """The grid of few values that the new tensor lies on and the base does not, if there is one.

    Of several one whose nearest values are taken, which takes the fewest bits to describe. Only a
    few places of a large tensor are looked at, and of most tensors one is enough.
    """
    row = new.row_numel
    sizes = dict.fromkeys((0, row, *(b for b in _BLOCKS if row % b == 0)))
    repeated = [s for s in sizes if _repeats(_glance(base, new, s), _FEW)]
    found = [g for s in repeated if (g := _coarse(base, new, s)) is not None]
    return min(found, key=lambda g: (not g.nearest, g.cost), default=None)


def _repeats(groups: Iterable[tuple[Values, Values]], enough: int) -> bool:
    """Whether values repeat themselves in groups of the new tensor more than in those of the base.

    What is stored in 16 bits repeats itself, too; codes leave far fewer values than that.
    """
    before, after = np.zeros(2), np.zeros(2)
    for x, y in groups:
        before += _distinct(x)
        after += _distinct(y)
    if after[1] < enough or not before[1]:
        return False
    return bool(after[0] / after[1] <= _REPEATED * before[0] / before[1])


def _coarse(base: TensorRef, new: TensorRef, group: int) -> Grid | None:
    if not _repeats(_groups(base, new, group), _ENOUGH):
        return None
    grid = _grid(base, new, group)
    return grid if grid is not None and grid.levels <= _LEVELS else None


def _grid(base: TensorRef, new: TensorRef, group: int) -> Grid | None:
    levels = 0
    signal = noise = least = 0.0
    for x, y in _groups(base, new, group):
        levels = max(levels, _most(y))
        signal += float(np.vdot(x, x))
        noise += float(np.sum((x - y) ** 2))
        least += sum(_nearest(a, np.unique(b)) for a, b in zip(x, y, strict=True))
    if not (signal > 0 and noise > 0 and math.isfinite(signal + noise)):
        return None
    ratio = 10 * math.log10(signal / noise)
    return Grid(group, levels, ratio, 10 * math.log10(signal / least) if least else math.inf)


def _nearest(x: Values, levels: Values) -> float:
    """The squared distance of elements from the nearest of some levels, in ascending order."""
    above = np.searchsorted(levels, x).clip(1, max(len(levels) - 1, 1))
    high = levels[np.minimum(above, len(levels) - 1)]
    return float(np.sum(np.minimum(np.abs(x - levels[above - 1]), np.abs(x - high)) ** 2))


def _distinct(groups: Values) -> Values:
    """Of the elements of each group [groups, elements] that are not zero: how many differ from all
    others, and how many there are.
    """
    ordered = np.sort(groups, axis=1)
    new = np.diff(ordered, axis=1, prepend=np.nan) != 0
    return np.array([np.count_nonzero(new & (ordered != 0)), np.count_nonzero(ordered)])


def _most(groups: Values) -> int:
    """The most values that any group takes."""
    ordered = np.sort(groups, axis=1)
    return 1 + int(np.count_nonzero(np.diff(ordered, axis=1), axis=1).max())


def _groups(base: TensorRef, new: TensorRef, group: int) -> Iterator[tuple[Values, Values]]:
    """Whole groups of both, [groups, elements] each, at some places."""
    size = group or base.numel
    if size > PIECE and group:
        return
    step = max(_PLACE // size, 1) * size
    places = range(0, base.numel, max(base.numel // _PLACES // size, 1) * size)[:_PLACES]
    for start in places:
        stop = min(start + step, base.numel, start + PIECE)
        yield from _pair(base, new, start, stop, size if group else stop - start)


def _glance(base: TensorRef, new: TensorRef, group: int) -> Iterator[tuple[Values, Values]]:
    """The same of a few elements in the middle; of long groups a part."""
    size = group or base.numel
    start = base.numel // 2 // size * size
    width = min(size, _GLANCE)
    stop = min(start + _GLANCE // width * width, base.numel)
    yield from _pair(base, new, start, stop, width)


def _pair(
    base: TensorRef, new: TensorRef, start: int, stop: int, width: int
) -> Iterator[tuple[Values, Values]]:
    stop -= (stop - start) % width
    if stop > start:
        x, y = (values(ref, start, stop).reshape(-1, width) for ref in (base, new))
        yield x, y
