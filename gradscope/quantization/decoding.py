"""The values of quantised weights, computed a run of elements at a time.

A weight is a matrix of codes in row-major order. Each code is looked up in a table, and what lies
in a group of columns of a row shares a scale, and in some layouts a zero point or a shift. No
more of any of them is read than the run needs, so memory does not grow with the tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from gradscope.checkpoints.tensors import TensorRef
from gradscope.checkpoints.tiles import read_range
from gradscope.quantization import kernels
from gradscope.statistics import codings

Codes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]


class Packing(Protocol):
    """How the codes lie in a tensor."""

    @property
    def ref(self) -> TensorRef:
        """The tensor that holds them."""
        ...

    def read(self, start: int, stop: int) -> Codes:
        """Codes ``start`` to ``stop`` of the matrix in row-major order, one a byte."""
        ...


class Lines(Protocol):
    """One number for each group of columns of each row: scales, zero points, shifts."""

    @property
    def refs(self) -> tuple[TensorRef, ...]:
        """The tensors that hold them."""
        ...

    def read(self, start: int, stop: int) -> npt.NDArray[np.float64]:
        """[rows, groups] of rows ``start`` to ``stop``; one group stands for all of them."""
        ...


# -- packings -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Plain:
    """One code an element, as stored: 8-bit types, and F4 and F6, which reading unpacks."""

    ref: TensorRef

    def read(self, start: int, stop: int) -> Codes:
        """See ``Packing``."""
        whole = start // 4 * 4  # a byte may hold several
        return read_range(self.ref, whole, stop)[start - whole :].view(np.uint8)


@dataclass(frozen=True, slots=True)
class Nibbles:
    """Two codes a byte, neighbours of a row."""

    ref: TensorRef
    high_first: bool = False

    def read(self, start: int, stop: int) -> Codes:
        """See ``Packing``."""
        packed = read_range(self.ref, start // 2, -(-stop // 2))
        codes = np.empty(stop - start, np.uint8)
        kernels.unpack_bytes(packed.view(np.uint8), self.high_first, start % 2, codes)
        return codes


@dataclass(frozen=True, slots=True)
class Words:
    """Codes of ``bits`` bits along each row of 32-bit words: ``ref`` has shape [rows, words]."""

    ref: TensorRef
    bits: int
    columns: int
    dense: bool = True

    def read(self, start: int, stop: int) -> Codes:
        """See ``Packing``."""
        first, last = start // self.columns, -(-stop // self.columns)
        words = _rows(self.ref, first, last).view(np.uint32)
        codes = np.empty(stop - start, np.uint8)
        column = start - first * self.columns
        kernels.unpack_words(words, self.bits, self.dense, column, self.columns, codes)
        return codes


@dataclass(frozen=True, slots=True)
class Stacked:
    """4-bit codes of neighbouring rows in one word: ``ref`` has shape [rows / n, columns].

    ``order`` says which of the n rows each nibble belongs to, from the lowest one on.
    """

    ref: TensorRef
    order: tuple[int, ...]

    def read(self, start: int, stop: int) -> Codes:
        """See ``Packing``."""
        columns, many = self.ref.shape[1], len(self.order)
        first, last = start // columns // many, -(-stop // (columns * many))
        words = _rows(self.ref, first, last)
        codes = np.empty((last - first, many, columns), np.uint8)
        for place, row in enumerate(self.order):
            codes[:, row] = (words >> (4 * place)) & 15
        skipped = first * many * columns
        return codes.reshape(-1)[start - skipped : stop - skipped]


def _rows(ref: TensorRef, first: int, last: int) -> npt.NDArray[Any]:
    """Rows of a matrix."""
    width = ref.shape[1]
    return read_range(ref, first * width, last * width).reshape(last - first, width)


def transposed(ref: TensorRef) -> TensorRef:
    """A stored matrix read by columns; by matrices if there are several."""
    *stack, rows, columns = ref.shape
    *steps, down, across = ref.strides or contiguous(ref.shape)
    return replace(ref, shape=(*stack, columns, rows), strides=(*steps, across, down))


def contiguous(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides, in elements, of a tensor in row-major order."""
    return tuple(int(np.prod(shape[axis + 1 :], dtype=np.int64)) for axis in range(len(shape)))


# -- scales, zero points, shifts ------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Grid:
    """Which line of numbers a row of the weight takes.

    Each matrix of a stack has ``rows`` rows and, if ``own``, ``lines`` lines of its own; a line
    serves ``height`` rows.
    """

    rows: int
    height: int = 1
    lines: int = 1
    own: bool = True

    def places(self, start: int, stop: int) -> npt.NDArray[np.int64]:
        """The line of each row from ``start`` to ``stop``."""
        matrix, row = np.divmod(np.arange(start, stop), self.rows)
        return row // self.height + (matrix * self.lines if self.own else 0)


@dataclass(frozen=True, slots=True)
class Factor:
    """Numbers of a tensor [lines, groups] as they are stored, times ``unit`` or its inverse."""

    ref: TensorRef
    grid: Grid
    groups: int
    unit: float = 1.0
    inverse: bool = False

    @property
    def refs(self) -> tuple[TensorRef, ...]:
        """See ``Lines``."""
        return (self.ref,)

    def read(self, start: int, stop: int) -> npt.NDArray[np.float64]:
        """See ``Lines``."""
        places = self.grid.places(start, stop)
        first, last = int(places.min()), int(places.max()) + 1
        stored = _numbers(self.ref, first * self.groups, last * self.groups)
        with np.errstate(divide="ignore"):
            values = 1 / stored if self.inverse else stored
        return (values * self.unit).reshape(last - first, self.groups)[places - first]


@dataclass(frozen=True, slots=True)
class Nested:
    """bitsandbytes' absmax, itself in codes: map[code] * nested absmax of its block + offset."""

    absmax: TensorRef
    table: TensorRef
    nested: TensorRef
    block: int
    offset: float

    @property
    def refs(self) -> tuple[TensorRef, ...]:
        """See ``Lines``."""
        return self.absmax, self.table, self.nested

    def read(self, start: int, stop: int) -> npt.NDArray[np.float64]:
        """See ``Lines``."""
        codes = read_range(self.absmax, start, stop)
        first, last = start // self.block, -(-stop // self.block)
        outer = _numbers(self.nested, first, last)[np.arange(start, stop) // self.block - first]
        return (_numbers(self.table, 0, self.table.numel)[codes] * outer + self.offset)[:, None]


@dataclass(frozen=True, slots=True)
class Zeros:
    """Packed zero points: ``ref`` has shape [groups, words], each row as long as the weight's rows.

    ``order`` is AWQ's, ``plus`` what the stored number lacks: 1 in GPTQ's first format.
    """

    ref: TensorRef
    bits: int
    plus: int = 0
    order: tuple[int, ...] = ()
    dense: bool = True

    @property
    def refs(self) -> tuple[TensorRef, ...]:
        """See ``Lines``."""
        return (self.ref,)

    def read(self, start: int, stop: int) -> npt.NDArray[np.float64]:
        """See ``Lines``."""
        words = _rows(self.ref, 0, self.ref.shape[0]).view(np.uint32).astype(np.uint64)
        rows = np.arange(start, stop)
        if self.order:
            many = len(self.order)
            rows = rows // many * many + np.argsort(self.order)[rows % many]
        bit = rows * self.bits if self.dense else _padded(rows, self.bits)
        low = words[:, bit // 32] >> (bit % 32).astype(np.uint64)
        after = np.minimum(bit // 32 + 1, words.shape[1] - 1)
        codes = low | (words[:, after] << (32 - bit % 32).astype(np.uint64))
        mask = np.uint64((1 << self.bits) - 1)
        return ((codes + np.uint64(self.plus)) & mask).T.astype(np.float64)


def _padded(index: npt.NDArray[np.int64], bits: int) -> npt.NDArray[np.int64]:
    """The first bit of codes of which none lies across two words."""
    return index // (32 // bits) * 32 + index % (32 // bits) * bits


def _numbers(ref: TensorRef, start: int, stop: int) -> npt.NDArray[np.float64]:
    stored = read_range(ref, start, stop)
    if ref.dtype in codings.CODED:
        return np.asarray(codings.code_values(ref.dtype)[stored.view(f"u{stored.itemsize}")])
    return stored.astype(np.float64)


# -- values ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Dequantized:
    """The values of a weight, a matrix of ``columns`` columns: a ``Decoding``."""

    codes: Packing
    #: What a code stands for: a type's values, numbers, or a tensor that holds them.
    table: str | tuple[float, ...] | TensorRef
    columns: int
    #: Columns that share a scale.
    width: int
    scales: tuple[Lines, ...]
    zeros: Lines | None = None
    shifts: Lines | None = None
    #: For each column the group it belongs to, where they do not follow each other.
    index: TensorRef | None = None
    #: Ask for 1 where a code that is not zero has a scale of zero, else 0.
    lost: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes of the codes."""
        return self.codes.ref.nbytes

    @property
    def refs(self) -> tuple[TensorRef, ...]:
        """Every tensor that the values depend on."""
        others = (self.zeros, self.shifts, *self.scales)
        tables = (t for t in (self.table, self.index) if isinstance(t, TensorRef))
        return (self.codes.ref, *tables, *(ref for o in others if o is not None for ref in o.refs))

    def read(self, start: int, stop: int) -> Floats:
        """Float32 values ``start`` to ``stop`` in row-major order."""
        first, last = start // self.columns, -(-stop // self.columns)
        scales = self._lines(self.scales, first, last, 1.0)
        if self.lost:
            scales = (scales == 0).astype(np.float32)
        values = np.empty(stop - start, np.float32)
        kernels.dequantize(
            self.codes.read(start, stop),
            self._values(),
            start - first * self.columns,
            self.columns,
            self.width,
            self._index(),
            scales,
            self._lines((self.zeros,), first, last, 0.0),
            self._lines(() if self.lost else (self.shifts,), first, last, 0.0),
            values,
        )
        return values

    def _lines(
        self, factors: Sequence[Lines | None], first: int, last: int, otherwise: float
    ) -> Floats:
        """The product of some numbers, of every row and group."""
        found = [f.read(first, last) for f in factors if f is not None]
        product = reduce(np.multiply, found, np.full((1, 1), otherwise if not found else 1.0))
        with np.errstate(over="ignore", under="ignore"):
            narrow = product.astype(np.float32)
        return np.broadcast_to(narrow, (last - first, self._groups))

    @property
    def _groups(self) -> int:
        return -(-self.columns // self.width)

    def _values(self) -> Floats:
        if isinstance(self.table, TensorRef):
            return _numbers(self.table, 0, self.table.numel).astype(np.float32)
        table = codings.code_values(self.table) if isinstance(self.table, str) else self.table
        return np.asarray(table, np.float32)

    def _index(self) -> npt.NDArray[np.int32]:
        if self.index is None:
            return np.empty(0, np.int32)
        found = read_range(self.index, 0, self.index.numel)
        if np.array_equal(found, np.arange(self.columns) // self.width):
            return np.empty(0, np.int32)
        return np.clip(found, 0, self._groups - 1).astype(np.int32)  # whoever is outside is told
