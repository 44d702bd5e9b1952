"""Opening files that strangers made: regular files only, and noticed when they change."""

from __future__ import annotations

import os
import stat
from pathlib import Path

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
        raise InputError(path, "missing", "no such file or directory") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(path, "missing", f"cannot be opened: {reason}") from None
    if not stat.S_ISREG(status.st_mode):
        kind = _kind_of(status.st_mode)
        raise InputError(path, "unsupported", f"is a {kind}, not a regular file; copy it to a file")
    return status.st_size, status.st_mtime_ns, status.st_ino


def check_unchanged(path: str | Path, before: Stamp) -> None:
    """Raise InputError when a file is no longer the one whose headers were read."""
    if stamp(path) != before:
        raise InputError(
            path,
            "changed",
            "changed while it was being read; the statistics would mix two versions. "
            "Wait for the writer to finish and run again",
        )


def _kind_of(mode: int) -> str:
    kinds = {
        stat.S_IFDIR: "directory",
        stat.S_IFIFO: "FIFO",
        stat.S_IFCHR: "character device",
        stat.S_IFBLK: "block device",
        stat.S_IFSOCK: "socket",
    }
    return kinds.get(stat.S_IFMT(mode), "special file")
