"""Where an archive begins and ends in a file that holds more: joined files, stray bytes."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from gradscope.containers.zip import (
    END,
    END64,
    LOCATOR64,
    LONGEST_COMMENT,
    Extent,
    find_directory,
    find_directory64,
)
from gradscope.errors import InputError

_MARK = b"PK\5\6"
_PIECE = 1 << 20


def first_end(file: BinaryIO, path: str | Path, size: int) -> int:
    """Where the archive that a file begins with ends: at ``size``, unless something follows it.

    Raises InputError, as ``zip.read_archive`` does, when a file begins with no complete archive.
    """
    extent = Extent(str(path), file, 0, size)
    try:
        find_directory(extent)
    except (InputError, struct.error) as error:
        end = next(filter(None, (_end_at(extent, at) for at in _marks(extent))), None)
        if end in (None, size) and isinstance(error, InputError):
            raise
        return end or size
    return size


def _marks(extent: Extent) -> Iterator[int]:
    """Everywhere that an end record may begin."""
    for start in range(0, extent.size, _PIECE):
        piece = extent.read(start, _PIECE + len(_MARK) - 1)
        at = piece.find(_MARK)
        while at >= 0:
            yield start + at
            at = piece.find(_MARK, at + 1)


def _end_at(extent: Extent, at: int) -> int | None:
    """Where the archive ends whose end record is here; None where its directory is not before."""
    data = extent.read(at, END.size)
    if len(data) < END.size:
        return None
    *_, length, offset, comment = END.unpack(data)
    end, before, where = at + END.size + comment, at, at - LOCATOR64.size
    try:
        locator = extent.read(where, LOCATOR64.size)
        if locator.startswith(b"PK\6\7"):
            _, length, offset, before = find_directory64(extent, locator, where)
    except (InputError, struct.error):
        return None
    return end if 0 < offset + length == before and end <= extent.size else None


def bytes_before(file: BinaryIO, path: str | Path, size: int) -> int:
    """How many bytes stand before the archive that a file ends with; 0 where there is none."""
    extent = Extent(str(path), file, 0, size)
    start = max(0, size - END.size - LONGEST_COMMENT)
    at = start + extent.read(start, size).rfind(_MARK)
    data = extent.read(at, END.size)
    if at < start or len(data) < END.size:
        return 0
    *_, length, offset, comment = END.unpack(data)
    if at + END.size + comment != size:
        return 0
    wide = extent.read(at - LOCATOR64.size - END64.size, END64.size)
    if wide.startswith(b"PK\6\6"):
        at -= LOCATOR64.size + END64.size
        *_, length, offset = END64.unpack(wide)
    before = at - length - offset
    return before if extent.read(before, 4) == b"PK\3\4" else 0
