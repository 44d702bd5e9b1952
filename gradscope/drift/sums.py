"""What one pass over two tensors leaves behind, a piece at a time."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from gradscope.checkpoints.tensors import DTYPE_BITS, TensorRef
from gradscope.checkpoints.tiles import PIECE, Tile
from gradscope.drift import code_kernels, kernels
from gradscope.statistics import codings
from gradscope.statistics.dtypes import FORMATS, FloatFormat

Array = npt.NDArray[Any]

#: Largest changes that are kept.
LARGEST = 10
#: Distances are counted by the bits that they take, 0 to 62.
_WIDTHS = 64


@dataclass(frozen=True, slots=True)
class Sums:
    """Sums, counts and tables of one piece of two tensors of one shape.

    The grid of pieces is fixed, so the same bits come out for any tile size and number of threads.
    """

    sums: Array
    counts: Array
    octaves: Array
    #: Counts of distances between codes of one type; how many differ and the greatest distance.
    distances: tuple[Array, Array] | None
    roundings: Array | None
    #: By row: squares, squared changes, changed elements, from ``first_row`` on.
    first_row: int
    rows: tuple[Array, Array, Array]
    #: The largest changes, where they are, and from what to what they go [2, LARGEST].
    values: Array
    places: Array
    ends: Array


@dataclass(frozen=True, slots=True)
class Rounding:
    """A format that one side may be the other rounded to."""

    dtype: str
    #: Whether ``base`` is the rounded side: the new checkpoint has more precision.
    reverse: bool = False

    @property
    def form(self) -> FloatFormat:
        """Field widths and bias."""
        return FORMATS[self.dtype]


def rounding_between(base: str, new: str) -> Rounding | None:
    """The cast that a change of float type is, if values may be lost by it."""
    if base == new or base not in FORMATS or new not in FORMATS:
        return None
    if not (FORMATS[base].signed and FORMATS[new].signed):
        return None
    reverse = FORMATS[new].mantissa_bits > FORMATS[base].mantissa_bits and (
        FORMATS[new].exponent_bits >= FORMATS[base].exponent_bits
    )
    return Rounding(base if reverse else new, reverse)


_scratch = threading.local()


def _buffer(name: str, dtype: Any, shape: tuple[int, ...]) -> Array:
    key = f"{name}{np.dtype(dtype).name}"
    if not hasattr(_scratch, key):
        setattr(_scratch, key, np.zeros(shape, dtype))
    array: Array = getattr(_scratch, key)
    return array


def _counting() -> tuple[Array, Array]:
    """What ``kernels.count`` works with: places of a block, and four tables of zeros."""
    return _buffer("places", np.uint8, (kernels.BLOCK,)), _buffer("apart", np.uint32, (4, 64))


def floats(ref: TensorRef, stored: Array, lane: int) -> Array:
    """Stored elements as float32 where that holds their type exactly, else as float64.

    Complex elements come as twice as many floats. The array is overwritten by the next call of the
    same ``lane``, or is ``stored`` itself.
    """
    if ref.dtype in codings.COMPLEX:
        return stored.view(f"f{stored.itemsize // 2}")
    if stored.dtype.kind == "f":
        return stored
    n = len(stored)
    if ref.dtype not in codings.CODED:
        return stored.astype(np.float64)
    out = _buffer(f"floats{lane}", np.float32, (PIECE,))[:n]
    if ref.dtype == "BF16":
        code_kernels.decode_bf16(stored, out.view(np.uint32))
    elif ref.dtype == "F16":
        code_kernels.decode_f16(stored, out.view(np.uint32), out)
    else:
        codes = stored.view(f"u{stored.itemsize}")
        code_kernels.decode_table(codes, codings.code_values(ref.dtype).astype(np.float32), out)
    return out


def compared(base: Tile, new: Tile, rounding: Rounding | None) -> list[Sums]:
    """Compare two tiles of the same elements of tensors of one shape. Raises InputError."""
    return [
        _piece(base.ref, new.ref, first, one, two, rounding)
        for (first, one), (_, two) in zip(base.pieces(1), new.pieces(0), strict=True)
    ]


def _piece(
    base: TensorRef, new: TensorRef, first: int, one: Array, two: Array, rounding: Rounding | None
) -> Sums:
    x, y = floats(base, one, 1), floats(new, two, 0)
    if x.dtype != y.dtype:
        x, y = x.astype(np.float64), y.astype(np.float64)
    parts = 2 if base.dtype in codings.COMPLEX and new.dtype in codings.COMPLEX else 1
    length = row_numel(base) * parts
    first_row = first * parts // length
    count = (first * parts + len(x) - 1) // length - first_row + 1
    found = Sums(
        np.zeros(5),
        np.zeros(5, np.int64),
        np.zeros(kernels.OCTAVES + 1, np.int64),
        _distances(base, new, one, two),
        None if rounding is None else roundings_of(x, y, rounding),
        first_row,
        (np.zeros(count), np.zeros(count), np.zeros(count, np.int64)),
        np.zeros(LARGEST),
        np.full(LARGEST, -1),
        np.zeros((2, LARGEST)),
    )
    scratch = _buffer("scratch", x.dtype, (3, kernels.BLOCK))
    kind = f"i{x.itemsize}"
    field = kernels.FIELD32 if x.dtype == np.float32 else kernels.FIELD64
    kernels.compare(
        x, y, x.view(kind), first * parts, length, field, scratch, scratch.view(kind),
        *_counting(), found.sums, found.counts, found.octaves, *found.rows,
        found.values, found.places, found.ends,
    )  # fmt: skip
    return found


def row_numel(ref: TensorRef) -> int:
    """Elements a row; below two dimensions all is one row."""
    return max(ref.row_numel if ref.rows is not None else ref.numel, 1)


def _distances(
    base: TensorRef, new: TensorRef, one: Array, two: Array
) -> tuple[Array, Array] | None:
    """Counts of distances between codes of one type, and how many differ."""
    if base.dtype != new.dtype or base.decoding is not None or new.decoding is not None:
        return None
    table, counts = np.zeros(_WIDTHS, np.int64), np.zeros(2, np.int64)
    if base.dtype not in FORMATS:
        counts[0] = np.count_nonzero(_bits(one) != _bits(two))
        return table, counts
    codes = _bits(one)
    widths = _buffer("widths", code_kernels.WIDTHS[codes.itemsize], (kernels.BLOCK,))
    wide = widths.itemsize == 8
    code_kernels.DISTANCES[codes.itemsize](
        codes, _bits(two), *_range_of(base.dtype), widths, widths.view(f"i{widths.itemsize}"),
        code_kernels.FORM64 if wide else code_kernels.FORM32, *_counting(), table, counts,
    )  # fmt: skip
    return table, counts


def _bits(stored: Array) -> Array:
    size = stored.itemsize
    return stored.view(f"u{size}") if size <= 8 else stored.view(np.uint64)


@cache
def _range_of(dtype: str) -> tuple[Any, Any]:
    """The sign bit of a float type's codes, and the code of its greatest finite value."""
    bits = DTYPE_BITS[dtype]
    code = code_kernels.INTEGERS[-(-bits // 8)]
    sign = code(1 << (bits - 1)) if FORMATS[dtype].signed else code(0)
    greatest = codings.greatest_finite(dtype)
    if dtype in ("F32", "F64"):
        return sign, np.array(greatest, f"f{bits // 8}").view(code)[()]
    return sign, code(np.flatnonzero(codings.code_values(dtype) == greatest)[0])


def roundings_of(x: Array, y: Array, rounding: Rounding) -> Array:
    """How many of ``y`` are ``x`` rounded how, as ``kernels.roundings`` counts them."""
    counts = np.zeros(4, np.int64)
    form = rounding.form
    exact, rounded = (y, x) if rounding.reverse else (x, y)
    greatest = codings.greatest_finite(rounding.dtype)
    wide = _buffer("wide", np.float64, (3, kernels.BLOCK))
    code_kernels.roundings(
        exact, rounded, form.mantissa_bits, 1 - form.bias, greatest, wide, wide.view(np.uint64),
        counts,
    )  # fmt: skip
    return counts
