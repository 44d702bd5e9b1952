"""The one pass over two checkpoints: every pair of tensors read side by side, over threads."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from gradscope.checkpoints.tensors import TensorRef
from gradscope.checkpoints.tiles import Tile, tiles
from gradscope.drift.measures import Measures, measures
from gradscope.drift.sums import Sums, compared, rounding_between
from gradscope.statistics.engine import TASK_ELEMENTS, Engine


@dataclass(frozen=True, slots=True)
class Pair:
    """One tensor in two checkpoints; ``base`` and ``new`` have one shape."""

    base: TensorRef
    new: TensorRef


_Tiles = tuple[Tile, Tile]


def compare(
    pairs: Sequence[Pair],
    engine: Engine[Any, Any],
    progress: Callable[[int], None] = lambda _: None,
    tile_elements: int = TASK_ELEMENTS,
) -> Iterator[Measures]:
    """The measures of each pair, in order, from one read of both.

    ``progress`` is told bytes done. The result is the same to the bit for every engine and tile
    size. Raises InputError when a file ends while it is read.
    """
    waiting = iter(pairs)
    whole: list[Sums] = []
    for results in engine(_compared, _tasks(pairs, tile_elements)):
        for (one, two), found in results:
            progress(_bytes(one) + _bytes(two))
            whole += found
            if one.stop == one.ref.numel:
                yield from _empty(waiting)
                yield measures(one.ref.numel, whole)
                whole = []
    yield from _empty(waiting)


def _empty(waiting: Iterator[Pair]) -> Iterator[Measures]:
    """The measures of pairs without elements, which have no tiles, up to the next that has some."""
    for pair in waiting:
        if pair.base.numel:
            return
        yield measures(0, ())


def _compared(task: Sequence[_Tiles]) -> list[tuple[_Tiles, list[Sums]]]:
    return [
        ((one, two), compared(one, two, rounding_between(one.ref.dtype, two.ref.dtype)))
        for one, two in task
    ]


def _tasks(pairs: Sequence[Pair], elements: int) -> Iterator[list[_Tiles]]:
    """Pairs of tiles in file order, small tensors together."""
    task: list[_Tiles] = []
    size = 0
    for pair in pairs:
        for two in zip(tiles(pair.base, elements), tiles(pair.new, elements), strict=True):
            count = two[0].stop - two[0].start
            if task and size + count > elements:
                yield task
                task, size = [], 0
            task.append(two)
            size += count
    if task:
        yield task


def _bytes(tile: Tile) -> int:
    """Bytes a tile covers."""
    return (tile.stop - tile.start) * tile.ref.nbytes // tile.ref.numel
