"""The fingerprint of one tensor: its elements hashed, and how often each code occurs.

BLAKE2b (RFC 7693) of the standard library: a gigabyte a second and core, twice and more of what
SHA-256 takes without its own instructions, a cryptographic hash, and no dependency. Long tensors
are hashed in parts, so that cores share them and a change is placed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from hashlib import blake2b
from typing import Any

import numpy as np
import numpy.typing as npt

from gradscope.checkpoints.tensors import DTYPE_BITS, TensorRef
from gradscope.checkpoints.tiles import Tile, tiles
from gradscope.fingerprints.document import Fingerprint
from gradscope.statistics.engine import TASK_ELEMENTS, Engine
from gradscope.statistics.kernels import count_codes

#: Bytes of a digest, of that of a part, and of that of a histogram.
_WHOLE, _PART, _COUNTS = 32, 16, 16
#: Wide floats are counted by sign, exponent and eight bits of the mantissa.
_SHIFTS = {"F32": 15, "F64": 44}

_Part = tuple[Tile, bytes, npt.NDArray[np.int64] | None]


def fingerprints(
    refs: Sequence[TensorRef],
    engine: Engine[Any, Any],
    progress: Callable[[int], None] = lambda _: None,
) -> Iterator[Fingerprint]:
    """The fingerprint of each tensor, in order; ``progress`` is told bytes done.

    What is hashed are the elements in row-major order as little-endian codes (sub-byte ones in a
    byte each), whatever container they lie in. Raises InputError when a file ends meanwhile.
    """
    digests: list[bytes] = []
    counts: npt.NDArray[np.int64] | None = None
    waiting = iter(refs)
    for parts in engine(_hashed, _tasks(refs)):
        for tile, digest, table in parts:
            progress((tile.stop - tile.start) * tile.ref.nbytes // tile.ref.numel)
            digests.append(digest)
            counts = table if counts is None or table is None else counts + table
            if tile.stop == tile.ref.numel:
                yield from _empty(waiting, tile.ref)
                yield _fingerprint(tile.ref, digests, counts)
                digests, counts = [], None
    yield from _empty(waiting, None)


def _empty(waiting: Iterator[TensorRef], until: TensorRef | None) -> Iterator[Fingerprint]:
    """Tensors without elements have no tiles."""
    for ref in waiting:
        if ref is until:
            return
        yield _fingerprint(ref, [], None)


def _fingerprint(
    ref: TensorRef, digests: Sequence[bytes], counts: npt.NDArray[np.int64] | None
) -> Fingerprint:
    whole = blake2b(f"{ref.dtype}{list(ref.shape)}".encode(), digest_size=_WHOLE)
    for digest in digests:
        whole.update(digest)
    return Fingerprint(
        dtype=ref.dtype,
        shape=ref.shape,
        hash=whole.hexdigest(),
        histogram=None if counts is None else _digest(counts.astype("<i8"), _COUNTS).hex(),
        parts=tuple(d.hex() for d in digests) if len(digests) > 1 else (),
    )


def _digest(data: npt.NDArray[Any], size: int) -> bytes:
    return blake2b(data.view(np.uint8).data, digest_size=size).digest()


def _tasks(refs: Iterable[TensorRef]) -> Iterator[list[Tile]]:
    task: list[Tile] = []
    size = 0
    for tile in (tile for ref in refs for tile in tiles(ref)):
        if task and size + tile.stop - tile.start > TASK_ELEMENTS:
            yield task
            task, size = [], 0
        task.append(tile)
        size += tile.stop - tile.start
    if task:
        yield task


def _hashed(task: Sequence[Tile]) -> list[_Part]:
    return [_part(tile) for tile in task]


def _part(tile: Tile) -> _Part:
    found = blake2b(digest_size=_PART)
    table = _table(tile.ref.dtype)
    for _, stored in tile.pieces():
        found.update(_little(stored).view(np.uint8).data)
        if table is not None:
            codes = stored.view(f"u{stored.itemsize}")
            shift = _SHIFTS.get(tile.ref.dtype)
            count_codes(codes if shift is None else codes >> codes.dtype.type(shift), table)
    return tile, found.digest(), None if table is None else table.astype(np.int64)


def _little(stored: npt.NDArray[Any]) -> npt.NDArray[Any]:
    plain = np.ascontiguousarray(stored)
    return plain if plain.dtype.isnative and np.little_endian else plain.byteswap()


def _table(dtype: str) -> npt.NDArray[np.uint32] | None:
    """A counter for each code of 16 bits or fewer, or for the leading bits of wide floats."""
    bits = DTYPE_BITS[dtype]
    size = bits - _SHIFTS[dtype] if dtype in _SHIFTS else bits
    return np.zeros(1 << size, np.uint32) if size <= 20 else None
