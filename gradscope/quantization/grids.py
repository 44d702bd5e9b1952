"""Which shapes a grid of scales may have, and which part of the weight each scale serves."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from gradscope.quantization.decoding import Grid

Shape = Sequence[int]


@dataclass(frozen=True, slots=True)
class Blocks:
    """A grid of scales over a weight taken as a matrix of ``columns`` columns."""

    grid: Grid
    columns: int
    #: Columns that share a scale, and how many such groups there are.
    width: int
    groups: int
    #: Rows that share a scale.
    height: int


def blocks(
    weight: Shape, scale: Shape, *, block: tuple[int, int] | None = None, width: int | None = None
) -> Blocks | None:
    """How a grid of ``scale`` covers ``weight``; None where it cannot.

    One scale for all, one for each index of the leading dimensions (row, expert), one for each
    column of a matrix, or a grid of equal blocks over the last two dimensions. ``block`` and
    ``width`` are what a configuration or a format says; without them a block is square, or one
    row high, or a power of two.
    """
    if not weight or 0 in weight:
        return None
    if block is None and width is None:
        return _whole(weight, scale) or _leading(weight, scale) or _blocked(weight, scale)
    wanted = block or (1, width or 1)
    return _blocked(weight, scale, wanted) or _single(weight, scale, wanted)


def _single(weight: Shape, scale: Shape, block: tuple[int, int]) -> Blocks | None:
    """One block that holds a whole row or matrix, its grid written shorter."""
    rows, columns = _matrix(weight)
    if columns > block[1]:
        return None
    if rows <= block[0] and math.prod(scale) == 1:
        return _whole(weight, scale)
    return _leading(weight, scale) if block[0] == 1 else None


def _whole(weight: Shape, scale: Shape) -> Blocks | None:
    if math.prod(scale) != 1:
        return None
    columns = weight[-1]
    rows = math.prod(weight[:-1])
    return Blocks(Grid(1, own=False), columns, columns, 1, rows)


def _leading(weight: Shape, scale: Shape) -> Blocks | None:
    shape = list(scale)
    while shape and shape[-1] == 1:
        shape.pop()
    if not shape or len(shape) >= len(weight) or shape != list(weight[: len(shape)]):
        return None
    columns = math.prod(weight[len(shape) :])
    return Blocks(Grid(1), columns, columns, 1, 1)


def _blocked(weight: Shape, scale: Shape, block: tuple[int, int] | None = None) -> Blocks | None:
    if len(scale) != len(weight) or len(weight) < 2 or list(scale[:-2]) != list(weight[:-2]):
        return None
    rows, columns = _matrix(weight)
    lines, groups = scale[-2:]
    for height, width in [block] if block is not None else _sizes(rows, columns, lines, groups):
        if -(-rows // height) == lines and -(-columns // width) == groups:
            return Blocks(Grid(rows, height, lines), columns, width, groups, height)
    return None


def _sizes(rows: int, columns: int, lines: int, groups: int) -> Iterator[tuple[int, int]]:
    """Blocks that makers use, the likeliest first."""
    if lines == rows:
        yield from ((1, 1 << power) for power in range(3, 15))
        if groups and columns % groups == 0:
            yield 1, columns // groups
        return
    yield from ((size, size) for size in (128, 64, 256, 32, 16, 512, 8, 4, 2))
    if lines == 1:  # one a column
        yield rows, 1


def _matrix(weight: Shape) -> tuple[int, int]:
    return (weight[-2] if len(weight) > 1 else 1), weight[-1]
