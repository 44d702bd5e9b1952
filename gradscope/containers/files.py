"""Opening files that strangers made: regular files only, stamped to notice when they change."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import BinaryIO

from gradscope.containers.absent import absent
from gradscope.errors import InputError

Stamp = tuple[int, int, int]


def stamp(path: str | Path) -> Stamp:
    """Size, modification time (ns) and inode of a regular file.

    Raises InputError when there is none, or when it is a FIFO, device or socket, which could
    block for ever or return different bytes at each read.
    """
    try:
        status = os.stat(path)
    except FileNotFoundError:
        raise InputError(path, "missing", absent(str(path))) from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(path, "missing", f"cannot be opened: {reason}") from None
    if not stat.S_ISREG(status.st_mode):
        kind = _kind_of(status.st_mode)
        raise InputError(path, "unsupported", f"is a {kind}, not a regular file; copy it to a file")
    return status.st_size, status.st_mtime_ns, status.st_ino


def read_start(path: str | Path, count: int) -> bytes:
    """The first bytes of a file, as many as there are up to ``count``."""
    try:
        with open(path, "rb") as file:
            return file.read(count)
    except OSError as error:
        raise unreadable(path, error) from None


def read_at(file: BinaryIO, offset: int, count: int) -> bytes:
    """Up to ``count`` bytes at an absolute position."""
    file.seek(offset)
    return file.read(count)


def unreadable(path: str | Path, error: OSError) -> InputError:
    """What to raise when the system refuses to read a file."""
    return InputError(path, "missing", f"cannot be read: {error.strerror or error}")


def _kind_of(mode: int) -> str:
    kinds = {
        stat.S_IFDIR: "directory",
        stat.S_IFIFO: "FIFO",
        stat.S_IFCHR: "character device",
        stat.S_IFBLK: "block device",
        stat.S_IFSOCK: "socket",
    }
    return kinds.get(stat.S_IFMT(mode), "special file")
