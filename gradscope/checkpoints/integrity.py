"""Whether the bytes of tensors are those that were written, and stay so while they are read.

Headers say nothing of the data, so ``verified`` is asked once, by whoever goes on to read the data.
What fits into memory is then still in the system's cache, and the price is the arithmetic: about
half a second for a gigabyte on one core. A larger file is read from the disk twice.
"""

from __future__ import annotations

import hashlib
import os
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from gradscope.checkpoints.tensors import Checkpoint, Checksum, Failure, Skipped, TensorRef
from gradscope.containers.files import Stamp, read_at, stamp, unreadable
from gradscope.containers.zip import WRONG_CHECKSUM, DamagedMemberError, Member
from gradscope.errors import InputError

#: Applies a function to items, perhaps at once, and yields the results in their order.
Engine = Callable[[Callable[[Any], Any], Iterable[Any]], Iterable[Any]]

_PIECE = 1 << 20


def checksum_of(member: Member, path: str) -> Checksum | None:
    """What an archive recorded of a stored member; None where it recorded nothing."""
    if member.crc is None:
        return None
    return Checksum(member.name, path, member.offset, member.size, member.crc)


def verified(checkpoint: Checkpoint, engine: Engine = map) -> Checkpoint:
    """The checkpoint without tensors whose bytes changed since they were written.

    Only archives know (.npz, torch's zip files), and only where CRCs were recorded. A changed
    member is a Failure (``malformed``), and its tensors are Skipped. ``engine`` is like ``map``.
    """
    return without(checkpoint, damaged(checkpoint.tensors, engine))


def damaged(refs: Iterable[TensorRef], engine: Engine = map) -> frozenset[Checksum]:
    """The members that hold some tensors and whose bytes changed since they were written."""
    checksums = list(dict.fromkeys(ref.checksum for ref in refs if ref.checksum))
    found = zip(checksums, engine(_matches, checksums), strict=True)
    return frozenset(checksum for checksum, matches in found if not matches)


def without(checkpoint: Checkpoint, damaged: Collection[Checksum]) -> Checkpoint:
    """A checkpoint without the tensors of damaged members, which are told of."""
    if not damaged:
        return checkpoint
    lost = [ref for ref in checkpoint.tensors if ref.checksum in damaged]
    return replace(
        checkpoint,
        tensors=tuple(ref for ref in checkpoint.tensors if ref.checksum not in damaged),
        skipped=(*checkpoint.skipped, *(Skipped(ref.name, DAMAGED) for ref in lost)),
        failures=(*checkpoint.failures, *_failures(checkpoint, damaged)),
    )


#: Why a tensor of a damaged member is not analysed.
DAMAGED = "damaged: its bytes do not have the checksum that was saved with them"


def _failures(checkpoint: Checkpoint, damaged: Collection[Checksum]) -> Iterator[Failure]:
    for checksum in dict.fromkeys(ref.checksum for ref in checkpoint.tensors if ref.checksum):
        if checksum in damaged:
            error = DamagedMemberError(checksum.file, checksum.member, WRONG_CHECKSUM)
            shard = os.path.basename(checksum.file)
            where = "" if checksum.file == checkpoint.path else f"{shard}: "
            yield Failure(error.kind, where + error.message)


def _matches(checksum: Checksum) -> bool:
    """A file that cannot be read, or ends early, is left to whoever reads its data to report."""
    crc = 0
    try:
        with open(checksum.file, "rb", buffering=0) as file:
            for at in range(0, checksum.nbytes, _PIECE):
                count = min(_PIECE, checksum.nbytes - at)
                piece = read_at(file, checksum.offset + at, count)
                if len(piece) < count:
                    return True
                crc = zlib.crc32(piece, crc)
    except OSError:
        return True
    return crc == checksum.crc


def check_unchanged(path: str | Path, before: Stamp) -> None:
    """Raise InputError when a file is no longer the one whose headers were read."""
    if stamp(path) != before:
        raise InputError(
            path,
            "changed",
            "changed while it was being read; the statistics would mix two versions. "
            "Wait for the writer to finish and run again",
        )


#: Places of a file that a sample is of, and bytes of each.
_PLACES, _SAMPLE = 16, 4096


def sample(path: str | Path, size: int) -> str:
    """A digest of a file's size and of bytes from its start to its end.

    Not of all: it tells one step of training from the next, which changes every weight.
    """
    digest = hashlib.blake2b(str(size).encode(), digest_size=16)
    try:
        with open(path, "rb", buffering=0) as file:
            for place in range(_PLACES):
                digest.update(
                    read_at(file, max(0, size - _SAMPLE) * place // (_PLACES - 1), _SAMPLE)
                )
    except OSError as error:
        raise unreadable(path, error) from None
    return digest.hexdigest()
