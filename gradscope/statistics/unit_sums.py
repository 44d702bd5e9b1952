"""Sums a unit of tensors whose units do not lie in rows, in an order that is fixed by position."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class UnitSums:
    """Sums of squares (float64) and hashes (uint64) of consecutive units from ``first`` on."""

    first: int
    squares: Array
    hashes: Array

    @classmethod
    def zeros(cls, first: int, units: int) -> UnitSums:
        """Sums to add to."""
        return cls(first, np.zeros(units), np.zeros(units, np.uint64))

    def __add__(self, other: UnitSums) -> UnitSums:
        first = min(self.first, other.first)
        stop = max(self.first + len(self.squares), other.first + len(other.squares))
        both = UnitSums.zeros(first, stop - first)
        for part in (self, other):
            place = slice(part.first - first, part.first - first + len(part.squares))
            both.squares[place] += part.squares
            both.hashes[place] += part.hashes
        return both


@dataclass
class UnitTree:
    """The sums of pieces, added as a binary tree over the pieces' positions.

    A node is kept until its neighbour is there and both become their parent, so that a column of
    any length costs as many arrays as the number of pieces has digits, and whoever measured which
    pieces in which order, the same numbers are added.
    """

    nodes: dict[tuple[int, int], UnitSums] = field(default_factory=dict)

    def add(self, index: int, sums: UnitSums, level: int = 0) -> None:
        """Put in the sums of a piece, or of the 2^level pieces of a node."""
        while (other := self.nodes.pop((level, index ^ 1), None)) is not None:
            sums, level, index = sums + other, level + 1, index // 2
        self.nodes[level, index] = sums

    def merge(self, other: UnitTree) -> None:
        """Take in the sums of other pieces."""
        for (level, index), sums in other.nodes.items():
            self.add(index, sums, level)

    def total(self) -> UnitSums:
        """The sums of all pieces."""
        first, *rest = sorted(self.nodes.items(), key=lambda item: item[0][1] << item[0][0])
        total = first[1]
        for _, sums in rest:
            total += sums
        return total
