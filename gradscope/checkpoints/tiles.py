"""Tiles: runs of a tensor's elements on a fixed grid, and the only code that reads tensor data."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from gradscope.checkpoints.tensors import DTYPE_BITS, TensorRef
from gradscope.errors import InputError
from gradscope.text import quoted

#: Elements per piece that ``Tile.pieces`` yields; every grid of statistics.kernels divides it.
PIECE = 1 << 20

#: The NumPy type of a stored element. 4- and 6-bit codes come unpacked, one a byte.
STORED: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype("u1"),
    "U8": np.dtype("u1"), "I8": np.dtype("i1"), "U16": np.dtype("u2"), "I16": np.dtype("i2"),
    "U32": np.dtype("u4"), "I32": np.dtype("i4"), "U64": np.dtype("u8"), "I64": np.dtype("i8"),
    "F4": np.dtype("u1"), "F6_E2M3": np.dtype("u1"), "F6_E3M2": np.dtype("u1"),
    "F8_E4M3": np.dtype("u1"), "F8_E5M2": np.dtype("u1"), "F8_E8M0": np.dtype("u1"),
    "F8_E4M3FNUZ": np.dtype("u1"), "F8_E5M2FNUZ": np.dtype("u1"),
    "F16": np.dtype("u2"), "BF16": np.dtype("u2"), "F32": np.dtype("f4"), "F64": np.dtype("f8"),
    "C64": np.dtype("c8"), "C128": np.dtype("c16"),
}  # fmt: skip

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class Tile:
    """Elements ``start`` to ``stop`` of a tensor in row-major order; ``start`` is on the grid."""

    ref: TensorRef
    start: int
    stop: int

    def pieces(self, lane: int = 0) -> Iterator[tuple[int, Array]]:
        """Yield (flat index, stored elements) piece by piece.

        The array is a view of a buffer of this thread that the next piece of the same ``lane`` (0
        or 1) overwrites: two tensors can be read side by side. What is computed is read through
        lane 0. Floats of 16 bits or fewer come as their codes, in the machine's byte order.
        Raises InputError when the file has become shorter than its headers said.
        """
        for first in range(self.start, self.stop, PIECE):
            yield first, _read(self.ref, first, min(first + PIECE, self.stop), lane)


def tiles(ref: TensorRef, elements: int = 16 * PIECE) -> Iterator[Tile]:
    """Cut a tensor into tiles of ``elements``, a multiple of PIECE; an empty tensor has none."""
    if elements % PIECE:
        raise ValueError(f"tiles are cut in multiples of {PIECE:,} elements, not {elements:,}")
    for start in range(0, ref.numel, elements):
        yield Tile(ref, start, min(start + elements, ref.numel))


def read_range(ref: TensorRef, start: int, stop: int) -> Array:
    """Read elements ``start`` to ``stop`` (at most a piece) into an array of their own."""
    return _read(ref, start, stop).copy()


def _read(ref: TensorRef, start: int, stop: int, lane: int = 0) -> Array:
    if ref.decoding is not None:
        return ref.decoding.read(start, stop)
    if ref.strides is not None:
        return _read_strided(ref, start, stop)
    return _read_contiguous(ref, start, stop, _lanes[lane])


class _Local(threading.local):
    """One open file and one buffer a thread: tiles come in file order, so one is enough."""

    def __init__(self) -> None:
        self.opened: tuple[str, int, int] | None = None
        self.descriptor = -1
        self.buffer = np.empty(PIECE * 16, np.uint8)

    def open(self, path: str) -> int:
        status = os.stat(path)
        wanted = (path, status.st_dev, status.st_ino)  # a path may get another file
        if self.opened != wanted:
            self.close()
            self.descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
            self.opened = wanted
        return self.descriptor

    def close(self) -> None:
        if self.opened is not None:
            os.close(self.descriptor)
            self.opened = None

    def __del__(self) -> None:
        self.close()


_lanes = (_Local(), _Local())


def _read_contiguous(ref: TensorRef, start: int, stop: int, lane: _Local) -> Array:
    bits = DTYPE_BITS[ref.dtype]
    offset, size = ref.offset + start * bits // 8, -(-(stop - start) * bits // 8)
    raw = _read_bytes(ref, offset, size, lane)
    if bits == 4:
        return _unpack4(raw)[: stop - start]
    if bits == 6:
        return _unpack6(raw)[: stop - start]
    values = raw.view(STORED[ref.dtype])
    return values.byteswap() if ref.big_endian else values


def _read_bytes(ref: TensorRef, offset: int, size: int, lane: _Local) -> npt.NDArray[np.uint8]:
    buffer = lane.buffer[:size]
    done = 0
    try:
        descriptor = lane.open(ref.source)
        while done < size:
            got = os.preadv(descriptor, [buffer[done:].data], offset + done)
            if got == 0:
                break
            done += got
    except OSError as error:
        raise _unreadable(ref, error) from None
    if done < size:
        raise _ended(ref, offset + done)
    return buffer


def _unreadable(ref: TensorRef, error: OSError) -> InputError:
    message = f"tensor {quoted(ref.name)} cannot be read: {error.strerror}"
    return InputError(ref.file, "malformed", message)


def _ended(ref: TensorRef, end: int) -> InputError:
    return InputError(
        ref.file,
        "changed",
        f"ended at byte {end:,}, inside tensor {quoted(ref.name)}: the file became shorter "
        "while it was being read. Wait for the writer to finish and run again",
    )


def _read_strided(ref: TensorRef, start: int, stop: int) -> Array:
    """Gather a run of a view whose elements do not lie in row-major order."""
    values = _gathered(_strided_view(ref), start, stop)
    return values.byteswap() if ref.big_endian else values


def _gathered(view: Array, start: int, stop: int) -> Array:
    """Elements ``start`` to ``stop`` in row-major order, always copied: a view may be unaligned."""
    if view.ndim == 1:
        return np.array(view[start:stop])
    length = view[0].size
    first, last = start // length, -(-stop // length)
    if last - first == 1:  # a part of one row, which may be long
        return _gathered(view[first], start - first * length, stop - first * length)
    rows = np.array(view[first:last], order="C").reshape(-1)
    return rows[start - first * length : stop - first * length]


def _strided_view(ref: TensorRef) -> Array:
    assert ref.strides is not None
    stored = STORED[ref.dtype]
    last = sum((n - 1) * s for n, s in zip(ref.shape, ref.strides, strict=True))
    size = (last + 1) * stored.itemsize
    try:
        if (end := os.stat(ref.source).st_size) < ref.offset + size:
            raise _ended(ref, end)
        flat = np.memmap(ref.source, np.uint8, "r", ref.offset, size)
    except OSError as error:
        raise _unreadable(ref, error) from None
    return np.lib.stride_tricks.as_strided(
        flat.view(stored), ref.shape, [s * stored.itemsize for s in ref.strides], writeable=False
    )


def _unpack4(raw: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Two codes a byte, the low nibble first (torch's float4_e2m1fn_x2)."""
    return np.stack([raw & 15, raw >> 4], axis=1).reshape(-1)


def _unpack6(raw: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Four codes in three bytes, least significant bits first."""
    padded = np.zeros(-(-raw.size // 3) * 3, np.uint8)
    padded[: raw.size] = raw
    a, b, c = padded.reshape(-1, 3).T
    codes = [a & 63, (a >> 6) | ((b & 15) << 2), (b >> 4) | ((c & 3) << 4), c >> 2]
    return np.stack(codes, axis=1).reshape(-1)
