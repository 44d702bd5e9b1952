"""One piece measured on the CPU: which kernel a type goes to, and the arrays it fills."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from gradscope.checkpoints.tensors import TensorRef
from gradscope.checkpoints.tiles import PIECE
from gradscope.statistics import codings, kernels, unit_kernels
from gradscope.statistics.kernels import BLOCK
from gradscope.statistics.layout import UnitLayout
from gradscope.statistics.tally import SHIFT, Piece, row_numel
from gradscope.statistics.unit_sums import UnitSums

Array = npt.NDArray[Any]

_DECODING = {"BF16": kernels.BFLOAT16, "F16": kernels.FLOAT16}
_NO_VALUES = np.zeros(1, np.float32)
_scratch = threading.local()


def scan(
    ref: TensorRef,
    first: int,
    stored: Array,
    table: Array | None,
    layout: UnitLayout | None = None,
) -> Piece:
    """Measure one piece with the compiled kernels; adds to ``table``."""
    if ref.dtype in codings.INTEGERS:
        return scan_integers(ref, first, stored, table)
    if ref.dtype in codings.COMPLEX:
        stored = codings.magnitude(stored)
    coded = ref.dtype in codings.CODED
    length = row_numel(ref, layout)
    piece = (_scan_codes if coded else _scan_floats)(ref, first, stored, table, length)
    if layout is None or layout.contiguous:
        return piece
    return replace(piece, units=_units(ref, first, stored, layout))


def scan_integers(ref: TensorRef, first: int, stored: Array, table: Array | None) -> Piece:  # noqa: ARG001
    """Integers: a histogram up to 16 bits; exact extremes and float64 moments above."""
    if table is not None:
        kernels.count_codes(stored.view(f"u{stored.itemsize}"), table)
        return Piece(first // PIECE)
    values = stored.astype(np.float64)
    mean = values.mean()
    d = values - mean
    moments = np.array([len(d), mean, (d**2).sum(), (d**3).sum(), (d**4).sum()])
    zeros = int(len(stored) - np.count_nonzero(stored))
    least, greatest = int(stored.min()), int(stored.max())
    return Piece(first // PIECE, moments, (zeros, 0, 0, 0), least=least, greatest=greatest)


def _units(ref: TensorRef, first: int, stored: Array, layout: UnitLayout) -> UnitSums:
    """The sums of a piece's units, all of those of the groups that it touches."""
    sums = UnitSums.zeros(layout.first_unit(first), layout.units_from(first, len(stored)))
    form = np.array([layout.depth, layout.width, layout.inner])
    into = (form, sums.first, sums.squares, sums.hashes, kernels.HASH_KEYS)
    if ref.dtype in codings.CODED:
        scratch = _scratch_for(np.dtype(np.float32))
        unit_kernels.units_of_codes(stored, first, *_decoding(ref), *scratch, *into)
    else:
        bits, (room, _) = stored.view(f"u{stored.itemsize}"), _scratch_for(stored.dtype)
        unit_kernels.units_of_floats(stored, bits, first, room, *into)
    return sums


def _decoding(ref: TensorRef) -> tuple[int, Array]:
    """How a type's codes are decoded, and the values of those that are looked up."""
    if ref.dtype in _DECODING:
        return _DECODING[ref.dtype], _NO_VALUES
    return kernels.BY_TABLE, codings.code_values(ref.dtype).astype(np.float32)


def _scan_codes(
    ref: TensorRef, first: int, codes: Array, table: Array | None, length: int
) -> Piece:
    rows, blocks = _row_arrays(length, first, len(codes)), _block_arrays(len(codes), np.uint32)
    kernels.scan_codes(
        codes, first, *_decoding(ref), *_scratch_for(np.dtype(np.float32)), table,
        np.zeros(3, np.int64), length, *rows, *blocks, kernels.HASH_KEYS,
    )  # fmt: skip
    return Piece(first // PIECE, None, (0, 0, 0, 0), 0, *rows, *blocks)


def _scan_floats(_: TensorRef, first: int, x: Array, table: Array | None, length: int) -> Piece:
    narrow = x.dtype == np.float32
    unsigned: type[np.unsignedinteger[Any]] = np.uint32 if narrow else np.uint64
    shift = unsigned(SHIFT["F32" if narrow else "F64"])
    order = kernels.ORDER32 if narrow else kernels.ORDER64
    moments, counts, union = np.zeros(5), np.zeros(4, np.int64), np.zeros(1, unsigned)
    rows, blocks = _row_arrays(length, first, len(x)), _block_arrays(len(x), unsigned)
    kernels.scan_floats(
        x, x.view(unsigned), first, shift, order, *_scratch_for(x.dtype), table,
        moments, counts, union, length, *rows, *blocks, kernels.HASH_KEYS,
    )  # fmt: skip
    zero, nan, posinf, neginf = map(int, counts)
    return Piece(
        first // PIECE, moments, (zero, nan, posinf, neginf), int(union[0]), *rows, *blocks
    )


def _row_arrays(length: int, first: int, n: int) -> tuple[Array, Array]:
    rows = (first + n - 1) // length - first // length + 1
    return np.zeros(rows), np.zeros(rows, np.uint64)


def _block_arrays(n: int, unsigned: Any) -> tuple[Array, Array, Array]:
    blocks = -(-n // BLOCK)
    return np.empty(blocks, unsigned), np.empty(blocks, unsigned), np.zeros(blocks, np.bool_)


def _scratch_for(dtype: np.dtype[Any]) -> tuple[Array, Array]:
    """Room for two blocks of this thread, and its bits."""
    name = dtype.name
    if not hasattr(_scratch, name):
        setattr(_scratch, name, np.empty((2, BLOCK), dtype))
    array: Array = getattr(_scratch, name)
    return array, array.view(f"u{dtype.itemsize}")
