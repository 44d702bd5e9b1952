"""Listing the arrays of NumPy's .npz and .npy files; pickled arrays are refused, never loaded."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import IO, TYPE_CHECKING, BinaryIO

from gradscope.checkpoints.integrity import DAMAGED, checksum_of
from gradscope.checkpoints.leftover import leftover
from gradscope.checkpoints.tensors import Checkpoint, Checksum, Failure, Skipped, TensorRef
from gradscope.containers import npy
from gradscope.containers.files import read_at, stamp, unreadable
from gradscope.containers.zip import (
    DEFLATED,
    STORED,
    Archive,
    DamagedMemberError,
    Member,
    read_archive,
)
from gradscope.containers.zip_bounds import first_end
from gradscope.errors import InputError
from gradscope.text import quoted, size

if TYPE_CHECKING:
    from gradscope.errors import InputKind

_DTYPES = {
    ("b", 1): "BOOL",
    ("u", 1): "U8", ("u", 2): "U16", ("u", 4): "U32", ("u", 8): "U64",
    ("i", 1): "I8", ("i", 2): "I16", ("i", 4): "I32", ("i", 8): "I64",
    ("f", 2): "F16", ("f", 4): "F32", ("f", 8): "F64",
    ("c", 8): "C64", ("c", 16): "C128",
    # ml_dtypes' bfloat16, which NumPy does not know and saves as two raw bytes.
    ("V", 2): "BF16",
}  # fmt: skip
_UNSUPPORTED = {
    "f": "extended-precision floats, whose layout depends on the machine",
    "c": "extended-precision complex numbers, whose layout depends on the machine",
    "V": "records or raw bytes (NumPy saves float8 so, losing which): save it as float32",
}
#: Arrays that can be no weights, whoever saved them beside some.
_NO_NUMBERS = {
    "M": "dates",
    "m": "time differences",
    "S": "byte strings",
    "U": "strings",
    "T": "strings",
}
_AS_BFLOAT16 = "arrays of raw 2-byte elements are read as bfloat16, which NumPy saves so"

_PICKLED = (
    "holds pickled Python objects, which only executing them could build; gradscope never does. "
    "Save it again as an array of numbers"
)


def read_npz(path: str) -> Checkpoint:
    """The arrays of an .npz archive or .npy file, addressed in place where they are stored.

    Compressed members are inflated into a temporary file that lives as long as the process. Raises
    InputError when the file is damaged or holds pickled objects.
    """
    before = stamp(path)
    found = _Arrays(path)
    try:
        with open(path, "rb") as file:
            _read(file, found, before[0])
    except OSError as error:
        raise unreadable(path, error) from None
    return Checkpoint(
        path=path,
        format=found.format,
        nbytes=before[0],
        tensors=tuple(found.tensors),
        skipped=tuple(found.skipped),
        failures=tuple(found.failures),
        notes=tuple(found.notes),
        stamps={path: before},
    )


@dataclass(slots=True)
class _Arrays:
    """The arrays of one file, in the making."""

    path: str
    format: str = "npz"
    tensors: list[TensorRef] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    unpacked: IO[bytes] | None = None

    def add(
        self,
        name: str,
        header: npy.Header,
        unpacked: str | None,
        start: int,
        checksum: Checksum | None = None,
    ) -> None:
        """Record an array whose .npy file starts at ``start``, or why it is not analysed."""
        dtype = _dtype(header)
        if dtype is None:
            self.skipped.append(_left_out(name, header))
            return
        if header.dtype.kind == "V" and _AS_BFLOAT16 not in self.notes:
            self.notes.append(_AS_BFLOAT16)
        self.tensors.append(
            TensorRef(
                name=name,
                dtype=dtype,
                shape=header.shape,
                file=self.path,
                offset=start + header.length,
                strides=header.strides,
                big_endian=header.dtype.str.startswith(">"),
                unpacked=unpacked,
                checksum=checksum,
            )
        )


def _left_out(name: str, header: npy.Header) -> Skipped:
    kind, shown = header.dtype.kind, f"dtype {header.dtype.str}"
    if kind in _NO_NUMBERS:
        return Skipped(name, f"{shown}: {_NO_NUMBERS[kind]}, no numbers", deliberate=True)
    return Skipped(name, f"{shown}: {_UNSUPPORTED.get(kind, 'not numbers')}")


def _dtype(header: npy.Header) -> str | None:
    if header.dtype.names is not None or header.dtype.subdtype is not None:
        return None
    return _DTYPES.get((header.dtype.kind, header.dtype.itemsize))


def _read(file: BinaryIO, found: _Arrays, nbytes: int) -> None:
    start = file.read(npy.HEADER_ROOM)
    if start.startswith(b"PK"):
        end = first_end(file, found.path, nbytes)
        archive = read_archive(file, found.path, 0, end)
        for member in archive.members.values():
            _read_member(file, found, archive, member)
        found.failures.extend(leftover(file, end, nbytes, "the zip archive"))
    elif start.startswith(npy.MAGIC):
        end = _read_bare(start, found, nbytes)
        found.failures.extend(leftover(file, end, nbytes, "the array"))
    else:
        raise _not_numpy(found.path, start)


def _not_numpy(path: str, start: bytes) -> InputError:
    if (npy.MAGIC + b"PK").startswith(start) or npy.MAGIC.startswith(start):
        return InputError(path, "truncated", "is empty or ends inside its first bytes")
    return InputError(path, "malformed", "is neither a zip archive of arrays nor an .npy file")


def _read_bare(start: bytes, found: _Arrays, nbytes: int) -> int:
    """Record the array of an .npy file; returns where it ends."""
    found.format = "npy"
    header = _header(start, found.path, "the array", in_archive=False)
    if header.size > nbytes:
        raise InputError(
            found.path,
            "truncated",
            f"has {nbytes:,} bytes of the {header.size:,} that its header declares. Copy or "
            "download it again",
        )
    found.add("array", header, None, 0)
    return header.size


def _read_member(file: BinaryIO, found: _Arrays, archive: Archive, member: Member) -> None:
    name = member.name.removesuffix(".npy").encode("utf-8", "backslashreplace").decode()
    if name == member.name:
        found.skipped.append(Skipped(name, "not a NumPy array"))
    elif member.method == STORED:
        start = read_at(file, member.offset, min(npy.HEADER_ROOM, member.size))
        header = _member_header(start, found.path, member, name)
        found.add(name, header, None, member.offset, checksum_of(member, found.path))
    elif member.method == DEFLATED:
        _read_deflated(file, found, archive, member, name)
    else:
        message = f"array {quoted(name)} is compressed in a way that NumPy does not use"
        found.failures.append(Failure("unsupported", message))


def _member_header(start: bytes, path: str, member: Member, name: str) -> npy.Header:
    header = _header(start, path, f"array {quoted(name)}", in_archive=True)
    if header.size != member.size:
        message = (
            f"array {quoted(name)} has {member.size:,} bytes where its header declares "
            f"{header.size:,}. Save the file again"
        )
        raise InputError(path, "malformed", message)
    return header


def _header(start: bytes, path: str, what: str, *, in_archive: bool) -> npy.Header:
    try:
        header = npy.read_header(start)
    except npy.HeaderError as error:
        cut_off = not in_archive and npy.ends_inside_header(start)
        kind: InputKind = "truncated" if cut_off else "malformed"
        raise InputError(path, kind, f"the header of {what} cannot be read: {error}") from None
    if header.is_pickled:
        raise InputError(path, "unsafe", f"{what} {_PICKLED}")
    return header


# --- compressed members ---------------------------------------------------------------------------


def _read_deflated(
    file: BinaryIO, found: _Arrays, archive: Archive, member: Member, name: str
) -> None:
    """Inflate one array into the temporary file; a damaged one costs no other array."""
    try:
        pieces = archive.pieces(file, member)
        start = _first_bytes(pieces)
        header = _member_header(start, found.path, member, name)
        if _dtype(header) is None:
            found.add(name, header, None, 0)
            return
        _refuse_bomb(found.path, member, name)
        target = _temporary(found, member.size)
        offset = target.tell()
        _unpack(target, start, pieces, found.path, member, name)
        found.add(name, header, target.name, offset)
    except DamagedMemberError as error:
        found.failures.append(Failure(error.kind, error.message))
        found.skipped.append(Skipped(name, DAMAGED))


def _first_bytes(pieces: Iterator[bytes]) -> bytes:
    start = b""
    for piece in pieces:
        start += piece
        if len(start) >= npy.HEADER_ROOM:
            break
    return start


def _refuse_bomb(path: str, member: Member, name: str) -> None:
    if member.is_bomb:
        raise InputError(
            path,
            "unsafe",
            f"array {quoted(name)} would inflate from {size(member.packed_size)} to "
            f"{size(member.size)}. If that is right, save it uncompressed with numpy.savez",
        )


def _unpack(
    target: IO[bytes], start: bytes, pieces: Iterator[bytes], path: str, member: Member, name: str
) -> None:
    try:
        target.write(start)
        for piece in pieces:
            target.write(piece)
        target.flush()
    except OSError as error:
        message = f"array {quoted(name)} of {size(member.size)} cannot be unpacked: "
        raise InputError(path, "unsupported", message + str(error.strerror)) from None


_kept: list[tuple[int, IO[bytes]]] = []


def _temporary(found: _Arrays, needed: int) -> IO[bytes]:
    """The temporary file that takes one archive's inflated arrays, at its end."""
    if found.unpacked is None:
        # Closed at exit: the addresses in the checkpoint outlive this function.
        found.unpacked = tempfile.NamedTemporaryFile(prefix="gradscope-", suffix=".unpacked")  # noqa: SIM115
        _kept.append((os.getpid(), found.unpacked))
    free = shutil.disk_usage(os.path.dirname(found.unpacked.name)).free
    if needed > free:
        raise InputError(
            found.path,
            "unsupported",
            f"is compressed: an array needs {size(needed)} in {tempfile.gettempdir()}, which has "
            f"{size(free)} left. Set TMPDIR, or save the file uncompressed with numpy.savez",
        )
    return found.unpacked


@atexit.register
def _remove_temporaries() -> None:
    """Delete what this process unpacked; a forked child leaves its parent's files alone."""
    for owner, file in _kept:
        if owner == os.getpid():
            file.close()
