"""Bytes of a file behind what was read of it: a second file, joined to the first, or stray ones."""

from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO

from gradscope.checkpoints.tensors import Failure
from gradscope.checkpoints.torch_magic import is_legacy
from gradscope.containers import npy
from gradscope.containers.files import read_at
from gradscope.text import plural

_START = 65_536


def leftover(file: BinaryIO, end: int, nbytes: int, what: str) -> Iterator[Failure]:
    """What to say where ``what`` ends at byte ``end`` of a file that is longer."""
    if end < nbytes:
        count = plural(nbytes - end, "byte")
        yield Failure(
            "malformed",
            f"{count} behind {what}, from byte {end:,} on, were not read"
            f"{_description(read_at(file, end, _START))}. If files were joined, part them: "
            f"`head -c {end}` gives the first and `tail -c +{end + 1}` the rest",
        )


def _description(start: bytes) -> str:
    if start.startswith(b"PK\3\4"):
        return ": they begin like another zip archive"
    if is_legacy(start):
        return ": they begin like another file of torch.save"
    if start.startswith(npy.MAGIC):
        return ": they begin like another array"
    return "" if start.strip(b"\0") else ": they begin with zero bytes"
