"""Infinities that are meant: masks, states that have seen nothing, ratios that end in 1/0.

Told by where they lie, whatever the tensor is called. A piece of rows is read again at a time, so
memory is as bounded as that of the pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Design = Literal["state", "mask", "triangle", "ramp"]

#: A mask of positions hides more of a matrix than a few damaged elements could.
_LEAST_HIDDEN = 0.1
#: Elements next to an infinity that must run towards it; in a short series all must.
_RUN = 8


def design_of_infinity(
    shape: tuple[int, ...], read: Callable[[int, int], Array], piece: int
) -> Design | None:
    """Why a tensor without NaN holds infinities on purpose, or None where nothing tells.

    ``read`` gives the values of a run of elements, of ``piece`` at most.

    - "state": every element is the same infinity, as a minimum is before it has seen anything;
    - "mask": infinities of one sign beside a single other value;
    - "ramp": a series that runs into its infinities at an end, as a schedule's ratio of signal to
      noise does;
    - "triangle": the finite elements of each row are one run, whose ends move one way from row to
      row: causal, banded, chunked and block-diagonal masks, with a bias of positions or without.
    """
    long = [n for n in shape if n != 1]
    columns = long[-1] if long else 1
    rows = math.prod(long[:-1])
    if columns > piece or rows * columns == 0:
        return None
    spans = _Spans.of(_blocks(rows, columns, read, piece))
    if spans.positive and spans.negative:
        return _ramp(read(0, columns)) if rows == 1 else None
    if not spans.finite.any():
        return "state" if rows == 1 else None
    if spans.least == spans.greatest:
        return "mask"
    if rows == 1:
        return _ramp(read(0, columns))
    hidden = 1 - spans.finite.sum() / (rows * columns)
    return "triangle" if hidden >= _LEAST_HIDDEN and spans.move_one_way(long[-2]) else None


def _blocks(
    rows: int, columns: int, read: Callable[[int, int], Array], piece: int
) -> Iterator[Array]:
    step = piece // columns
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        yield read(start * columns, stop * columns).reshape(stop - start, columns)


@dataclass(frozen=True, slots=True)
class _Spans:
    """Where the finite elements of each row begin and end, how many they are, and which."""

    first: Array
    last: Array
    finite: Array
    least: float
    greatest: float
    positive: bool
    negative: bool

    @classmethod
    def of(cls, blocks: Iterator[Array]) -> _Spans:
        """Of all rows, from blocks of them."""
        found = [cls._of_block(block) for block in blocks]
        return cls(
            first=np.concatenate([f.first for f in found]),
            last=np.concatenate([f.last for f in found]),
            finite=np.concatenate([f.finite for f in found]),
            least=min(f.least for f in found),
            greatest=max(f.greatest for f in found),
            positive=any(f.positive for f in found),
            negative=any(f.negative for f in found),
        )

    @classmethod
    def _of_block(cls, values: Array) -> _Spans:
        finite = np.isfinite(values)
        return cls(
            first=finite.argmax(axis=1),
            last=finite.shape[1] - 1 - finite[:, ::-1].argmax(axis=1),
            finite=finite.sum(axis=1),
            least=float(values.min(where=finite, initial=math.inf)),
            greatest=float(values.max(where=finite, initial=-math.inf)),
            positive=bool((values == math.inf).any()),
            negative=bool((values == -math.inf).any()),
        )

    def move_one_way(self, height: int) -> bool:
        """Whether each row is one run, and the runs of each matrix of ``height`` rows move."""
        seen = self.finite > 0
        if (self.finite[seen] != (self.last - self.first + 1)[seen]).any():
            return False
        matrices = range(0, len(seen), height)
        return all(self._one_way(slice(at, at + height), seen) for at in matrices)

    def _one_way(self, rows: slice, seen: Array) -> bool:
        kept = seen[rows]
        steps = [np.diff(ends[rows][kept]) for ends in (self.first, self.last)]
        moves = any(s.any() for s in steps)
        return moves and (all((s >= 0).all() for s in steps) or all((s <= 0).all() for s in steps))


def _ramp(series: Array) -> Design | None:
    """A series whose infinities are its ends, each run into by the elements beside it."""
    inner = np.flatnonzero(np.isfinite(series))
    start, stop = (int(inner[0]), int(inner[-1]) + 1) if len(inner) else (0, 0)
    if len(inner) < 3 or stop - start != len(inner):
        return None
    run = len(inner) if len(inner) < 2 * _RUN else _RUN
    ends = (
        (series[:start], series[start : start + run][::-1]),
        (series[stop:], series[stop - run : stop]),
    )
    return "ramp" if all(_runs_into(tail, beside) for tail, beside in ends if len(tail)) else None


def _runs_into(tail: Array, beside: Array) -> bool:
    sign = math.copysign(1, tail[0])
    steps = sign * np.diff(beside)
    return bool((tail == tail[0]).all() and (steps >= 0).all() and (steps > 0).any())
