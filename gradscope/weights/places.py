"""Tensors by block and place: what the maps of pages draw."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

from gradscope.report.panels import inline
from gradscope.weights.names import place_of

#: Rows and columns that a map can have and still be read.
_ROWS, _COLUMNS = 60, 96


class Placed(Protocol):
    """A tensor of a page."""

    @property
    def name(self) -> str:
        """Its name in the checkpoint."""
        ...


T = TypeVar("T", bound=Placed)


def by_place(
    tensors: Sequence[T], kind: Callable[[T], str]
) -> Mapping[tuple[str, str], Sequence[T]]:
    """What each block has in each place: stacks in file order, blocks of a stack by their numbers.

    Where there are more than can be read, neighbouring blocks stand together, and places by kind.
    """
    placed = [(*place_of(t.name), t) for t in tensors]
    blocks = _by_number(dict.fromkeys(block for block, _, _ in placed))
    together = -(-len(blocks) // _COLUMNS)
    column = {b: f"{blocks[i // together * together]}…" if together > 1 else b
              for i, b in enumerate(blocks)}  # fmt: skip
    coarse = len({row for _, row, _ in placed}) > _ROWS
    found: dict[tuple[str, str], list[T]] = defaultdict(list)
    order = {block: place for place, block in enumerate(blocks)}
    for block, row, tensor in sorted(placed, key=lambda p: order[p[0]]):
        found[column[block], kind(tensor) if coarse else row].append(tensor)
    return found


def _by_number(blocks: Iterable[str]) -> list[str]:
    """Files may have ``layers.10`` before ``layers.2``."""
    stacks: dict[str, list[str]] = defaultdict(list)
    for block in blocks:
        stacks[re.sub(r"\d+", "", block)].append(block)
    return [block for stack in stacks.values() for block in sorted(stack, key=_numbers)]


def _numbers(block: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", block)]


def drawn_by_place(cells: Sequence[Mapping[str, Any]]) -> tuple[Any, Mapping[str, Any]]:
    """An Altair chart of cells with a ``block`` and a ``row``, without marks yet, and its size."""
    import altair as alt

    blocks = list(dict.fromkeys(cell["block"] for cell in cells))
    rows = list(dict.fromkeys(cell["row"] for cell in cells))
    chart = alt.Chart(inline(cells)).encode(
        x=alt.X("block:O", sort=blocks, title="block, input to output",
                axis=alt.Axis(labelOverlap=True, labelLimit=120)),
        y=alt.Y("row:O", sort=rows, title=None, axis=alt.Axis(labelLimit=260)),
    )  # fmt: skip
    step = max(6, min(48, 900 // max(len(blocks), 1)))
    return chart, {"width": {"step": step}, "height": {"step": 15}}
