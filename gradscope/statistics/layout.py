"""Which elements of a tensor make one unit, and which units belong together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, slots=True)
class Part:
    """Units that are judged by themselves: one projection of several, a gate, an expert."""

    name: str
    units: int


@dataclass(frozen=True)
class UnitLayout:
    """The tensor seen as [groups, depth, width, inner], where unit (g, w) is ``[g, :, w, :]``.

    ``parts`` are runs of units, again and again to the end: q, k and v once, or in every head.
    """

    groups: int
    depth: int
    width: int
    inner: int
    #: The dimension of the tensor that counts the units (of a group).
    axis: int = 0
    parts: tuple[Part, ...] = ()
    #: Consecutive units of a part that make one attention head, where that is known.
    head: int | None = None

    @classmethod
    def along(cls, shape: Sequence[int], axis: int, stacked: int = 0) -> UnitLayout:
        """Units along a dimension; the first ``stacked`` ones count matrices of their own."""
        axis %= len(shape)
        return cls(
            math.prod(shape[:stacked]),
            math.prod(shape[stacked:axis]),
            shape[axis],
            math.prod(shape[axis + 1 :]),
            axis,
        )

    def divided(self, *parts: Part, head: int | None = None) -> UnitLayout:
        """The same units in parts. Raises ValueError where these do not fill them."""
        if parts and self.units % sum(part.units for part in parts):
            raise ValueError(f"{self.units} units are no multiple of {parts}")
        return replace(self, parts=parts, head=head)

    @property
    def units(self) -> int:
        """How many units there are."""
        return self.groups * self.width

    @property
    def unit_numel(self) -> int:
        """Elements of one unit."""
        return self.depth * self.inner

    @property
    def contiguous(self) -> bool:
        """Whether the elements of each unit lie one after another."""
        return self.depth == 1

    @property
    def is_rows(self) -> bool:
        """Whether the units are the rows, the slices along dimension 0."""
        return self.axis == 0 and self.depth == self.groups == 1

    def first_unit(self, flat: int) -> int:
        """The first unit of the group that an element is in."""
        return flat // (self.depth * self.width * self.inner) * self.width

    def units_from(self, flat: int, n: int) -> int:
        """How many units the groups have that a run of ``n`` elements touches."""
        return self.first_unit(flat + n - 1) - self.first_unit(flat) + self.width

    @cached_property
    def members(self) -> tuple[npt.NDArray[np.intp], ...]:
        """The units of each part, ascending."""
        ends = np.cumsum([part.units for part in self.parts])
        whole = np.arange(self.units).reshape(-1, ends[-1])
        return tuple(piece.reshape(-1) for piece in np.split(whole, ends[:-1], axis=1))
