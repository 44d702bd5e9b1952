"""Tensors as the matrices whose singular values are wanted, read in chunks of rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from gradscope.checkpoints.tensors import TensorRef
from gradscope.checkpoints.tiles import PIECE, read_range
from gradscope.spectra.algebra import Chunks
from gradscope.statistics.codings import CODED, code_values

Array = npt.NDArray[Any]

#: Elements up to which a matrix is kept while it is worked on.
KEPT = 1 << 26


@dataclass(frozen=True, slots=True)
class Matrix:
    """At least as many ``rows`` as ``columns``: turned over where that takes it."""

    rows: int
    columns: int
    chunks: Chunks

    @classmethod
    def of(cls, array: Array) -> Matrix:
        """A matrix in memory."""
        tall = array if array.shape[0] >= array.shape[1] else array.T
        return cls(tall.shape[0], tall.shape[1], lambda: (tall,))


def matrix(ref: TensorRef, rows: int, columns: int, first: int = 0) -> Matrix:
    """``rows`` of a tensor seen as rows of ``columns``, from row ``first`` on.

    A tall one that is too large to keep is read again each time it is gone through. Raises
    InputError then, as reading does.
    """
    if rows < columns or rows * columns <= KEPT:
        return Matrix.of(
            read(ref, first * columns, (first + rows) * columns).reshape(rows, columns)
        )
    step = max(PIECE // columns, 1) * columns
    start, stop = first * columns, (first + rows) * columns

    def chunks() -> Iterator[Array]:
        for at in range(start, stop, step):
            yield read(ref, at, min(at + step, stop)).reshape(-1, columns)

    return Matrix(rows, columns, chunks)


def read(ref: TensorRef, start: int, stop: int) -> Array:
    """Elements of a float tensor as float32, float64 where they are stored so."""
    values = np.empty(stop - start, np.float64 if ref.dtype == "F64" else np.float32)
    for at in range(start, stop, PIECE):
        end = min(at + PIECE, stop)
        stored = read_range(ref, at, end)
        if ref.dtype in CODED:
            stored = code_values(ref.dtype)[stored]
        values[at - start : end - start] = stored
    return values
