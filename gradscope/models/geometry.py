"""Where an input lies in the picture that it was made from."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.floating[Any]]


@dataclass(frozen=True, slots=True)
class Geometry:
    """The position of an input in its picture; all pairs are (down, across).

    Pixel centre ``i`` of the input is at ``(i + 0.5) / scale + offset`` in the picture's pixels.
    """

    picture: tuple[int, int]
    inputs: tuple[int, int]
    scale: tuple[float, float]
    offset: tuple[float, float]

    def of_size(self, height: int, width: int) -> Geometry:
        """The geometry for the picture at another size."""
        down, across = height / self.picture[0], width / self.picture[1]
        return Geometry(
            (height, width),
            self.inputs,
            (self.scale[0] / down, self.scale[1] / across),
            (self.offset[0] * down, self.offset[1] * across),
        )

    def to_picture(self, values: Floats, fill: float = math.nan) -> Floats:
        """A map [h, w] of the input as [H, W] of the picture, bilinear; ``fill`` where unseen."""
        rows, inside_rows = self._places(0)
        columns, inside_columns = self._places(1)
        found = _interpolated(_interpolated(values, rows).T, columns).T
        seen = inside_rows[:, None] & inside_columns[None, :]
        return np.where(seen, found, fill)

    def to_inputs(self, values: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
        """A region [H, W] of the picture as one [h, w] of the input: what each centre lies on."""
        (rows, in_rows), (columns, in_columns) = (self._sources(axis) for axis in (0, 1))
        found: npt.NDArray[np.bool_] = values[rows][:, columns]
        return found & in_rows[:, None] & in_columns[None, :]

    def _sources(self, axis: int) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.bool_]]:
        """For each row or column of the input: the picture's, and whether there is one."""
        centres = (np.arange(self.inputs[axis]) + 0.5) / self.scale[axis] + self.offset[axis]
        found = np.floor(centres).astype(np.intp)
        inside = (found >= 0) & (found < self.picture[axis])
        return np.clip(found, 0, self.picture[axis] - 1), inside

    def _places(self, axis: int) -> tuple[Floats, npt.NDArray[np.bool_]]:
        """For each row or column of the picture: its place in the input, and whether it has one."""
        centres = np.arange(self.picture[axis]) + 0.5
        found = (centres - self.offset[axis]) * self.scale[axis]
        inside = (found >= 0) & (found <= self.inputs[axis])
        return np.clip(found - 0.5, 0, self.inputs[axis] - 1), inside


def _interpolated(values: Floats, at: Floats) -> Floats:
    low = np.floor(at).astype(int)
    high = np.minimum(low + 1, len(values) - 1)
    share = (at - low)[:, None]
    mixed: Floats = values[low] * (1 - share) + values[high] * share
    return mixed
