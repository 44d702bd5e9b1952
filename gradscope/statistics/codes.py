"""Which codes of a vector quantiser are in use, by its own counts or by what training left."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from gradscope.checkpoints.tensors import DTYPE_BITS, TensorRef
from gradscope.checkpoints.tiles import PIECE, read_range
from gradscope.statistics import codings
from gradscope.statistics.records import CodeUse
from gradscope.statistics.table_rows import hashes_of, repeats
from gradscope.statistics.units import DEAD, reference

Values = npt.NDArray[np.float64]

#: Codes are unused by their count below this share of the mean count.
_SELDOM = 1e-3
#: How far the second moment of untouched codes may be from that of their initialisation.
_AS_INITIALISED = 0.1


def code_use(table: TensorRef, counts: TensorRef | None) -> tuple[CodeUse, ...]:
    """Each codebook of a table [codes, width], or [books, codes, width].

    ``counts`` are the moving counts of assignments that the quantiser keeps, where it does; they
    may count the last dimension instead, where codes are columns. Without them a code is unused
    that is nearly zero, repeats another, or still lies in the cube of side 2 / codes that it was
    drawn from while others have left it.
    Raises InputError when the file changes or ends while it is read.
    """
    books = math.prod(table.shape[:-2])
    if counts is not None and (told := _by_counts(table, counts, books)):
        return told
    return tuple(_by_values(book) for book in _books(table))


def _by_counts(table: TensorRef, counts: TensorRef, books: int) -> tuple[CodeUse, ...]:
    """Nothing where the counts are no such counts, or were never updated."""
    if counts.numel not in (books * table.shape[-2], books * table.shape[-1]):
        return ()
    values = _read(counts, 0, counts.numel).reshape(books, -1)
    if not np.isfinite(values).all() or values.min() < 0 or values.min() == values.max():
        return ()
    unused = (np.flatnonzero(row < _SELDOM * row.mean()) for row in values)
    return tuple(CodeUse(values.shape[1], tuple(ids.tolist()), "by its counts") for ids in unused)


def _books(table: TensorRef) -> Iterator[TensorRef]:
    """The codebooks of a stack, each as a table of its own."""
    *stacked, codes, width = table.shape
    lead = table.strides[: len(stacked)] if table.strides is not None else None
    for index in np.ndindex(*stacked):
        if lead is None:
            place = int(np.ravel_multi_index(index, stacked)) * codes * width if stacked else 0
        else:
            place = sum(i * stride for i, stride in zip(index, lead, strict=True))
        yield replace(
            table,
            shape=(codes, width),
            offset=table.offset + place * DTYPE_BITS[table.dtype] // 8,
            strides=table.strides[len(stacked) :] if table.strides is not None else None,
        )


def _by_values(book: TensorRef) -> CodeUse:
    codes, width = book.shape
    found = [_facts(book, first) for first in range(0, codes, max(PIECE // width, 1))]
    norms, peaks, hashes = (np.concatenate(parts) for parts in zip(*found, strict=True))
    unused = (norms < DEAD * reference(norms)) | (norms == 0)
    unused[repeats(hashes, norms)] = True
    unused |= _untouched(norms, peaks, width) & ~unused
    return CodeUse(codes, tuple(np.flatnonzero(unused).tolist()), "by their values")


def _facts(book: TensorRef, first: int) -> tuple[Values, Values, npt.NDArray[np.uint64]]:
    """Norm, greatest magnitude and hash of the codes of a part."""
    codes, width = book.shape
    stop = min(first + max(PIECE // width, 1), codes)
    stored = read_range(book, first * width, stop * width)
    values = codings.decoded(book.dtype, stored).reshape(-1, width)
    norms = np.sqrt(np.einsum("ij,ij->i", values, values))
    return norms, np.abs(values).max(axis=1), hashes_of(stored.reshape(-1, width))


def _untouched(norms: Values, peaks: Values, width: int) -> npt.NDArray[np.bool_]:
    """Codes distributed as uniform(-1 / codes, 1 / codes), where others are farther out."""
    codes = len(norms)
    within = peaks <= (1 + 2**-8) / codes  # bfloat16 rounds up
    if not within.any() or within.all() or within.sum() * width < 256:
        return np.zeros(codes, np.bool_)
    moment = float(np.mean(norms[within] ** 2)) / width * 3 * codes**2
    moved = float(np.median(norms[~within])) > 2 * float(np.median(norms[within]))
    return within if moved and abs(moment - 1) < _AS_INITIALISED else np.zeros(codes, np.bool_)


def _read(ref: TensorRef, start: int, stop: int) -> Values:
    return codings.decoded(ref.dtype, read_range(ref, start, stop))
