"""Listing the arrays of NumPy's .npz and .npy files; pickled arrays are refused, never loaded."""

from __future__ import annotations

import atexit
import io
import math
import os
import shutil
import struct
import tempfile
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import IO, TYPE_CHECKING, Any, BinaryIO

from numpy.lib import format as npy

from gradscope.checkpoints.archive import DEFLATED, STORED, Archive, Member, read_archive
from gradscope.checkpoints.files import stamp
from gradscope.checkpoints.tensors import Checkpoint, Failure, Skipped, TensorRef
from gradscope.checkpoints.unpickle import printable
from gradscope.errors import InputError

if TYPE_CHECKING:
    import numpy as np

    from gradscope.errors import InputKind

#: A header is at most 10,000 characters to NumPy; this leaves room for its magic and padding.
_HEADER_ROOM = 32 << 10
_PIECE = 1 << 20
#: Deflate reaches about 1000:1 on zeros; neither a ratio nor a size alone makes a bomb.
_BOMB_RATIO = 200
_BOMB_BYTES = 1 << 30

_DTYPES = {
    ("b", 1): "BOOL",
    ("u", 1): "U8", ("u", 2): "U16", ("u", 4): "U32", ("u", 8): "U64",
    ("i", 1): "I8", ("i", 2): "I16", ("i", 4): "I32", ("i", 8): "I64",
    ("f", 2): "F16", ("f", 4): "F32", ("f", 8): "F64",
    ("c", 8): "C64", ("c", 16): "C128",
}  # fmt: skip
_UNSUPPORTED = {
    "f": "extended-precision floats, whose layout depends on the machine",
    "c": "extended-precision complex numbers, whose layout depends on the machine",
    "M": "dates",
    "m": "time differences",
    "S": "byte strings",
    "U": "strings",
    "T": "strings",
    "V": "structured or raw bytes (NumPy saves bfloat16 and float8 so, losing their type)",
}


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
    found = _Found(path)
    try:
        with open(path, "rb") as file:
            _read(file, found, before[0])
    except OSError as error:
        raise InputError(path, "missing", f"cannot be read: {error.strerror or error}") from None
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
class _Found:
    """What one file yields, in the making."""

    path: str
    format: str = "npz"
    tensors: list[TensorRef] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    unpacked: IO[bytes] | None = None


@dataclass(frozen=True, slots=True)
class _Header:
    """The header of an .npy file; ``length`` is where the elements start."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    fortran: bool
    length: int

    @property
    def size(self) -> int:
        """Bytes of the header and of the elements."""
        return self.length + math.prod(self.shape) * self.dtype.itemsize

    @property
    def strides(self) -> tuple[int, ...] | None:
        """Element strides of a column-major array that is not also row-major."""
        longer = [size for size in self.shape if size != 1]
        if not self.fortran or len(longer) < 2 or 0 in longer:
            return None
        return tuple(math.prod(self.shape[:axis]) for axis in range(len(self.shape)))


def _read(file: BinaryIO, found: _Found, size: int) -> None:
    start = file.read(_HEADER_ROOM)
    if start.startswith(b"PK"):
        archive = read_archive(file, found.path, 0, size)
        for member in archive.members.values():
            _read_member(file, found, archive, member)
    elif start.startswith(npy.MAGIC_PREFIX):
        _read_bare(start, found, size)
    else:
        raise _not_numpy(found.path, start)


def _not_numpy(path: str, start: bytes) -> InputError:
    if (npy.MAGIC_PREFIX + b"PK").startswith(start) or npy.MAGIC_PREFIX.startswith(start):
        return InputError(path, "truncated", "is empty or ends inside its first bytes")
    return InputError(path, "malformed", "is no NumPy file: neither a zip archive nor an .npy")


def _read_bare(start: bytes, found: _Found, size: int) -> None:
    found.format = "npy"
    header = _header(start, found.path, "the array", in_archive=False)
    if header.size > size:
        raise InputError(
            found.path,
            "truncated",
            f"has {size} bytes of the {header.size} its header declares. Copy or download it again",
        )
    if header.size < size:
        found.notes.append(f"{size - header.size} bytes after the array were not read")
    dtype = _dtype(header, "array", found)
    if dtype:
        found.tensors.append(_ref("array", dtype, header, found.path, header.length))


def _read_member(file: BinaryIO, found: _Found, archive: Archive, member: Member) -> None:
    name = member.name.removesuffix(".npy").encode("utf-8", "backslashreplace").decode()
    if name == member.name:
        found.skipped.append(Skipped(name, "not a NumPy array"))
    elif member.method == STORED:
        _read_stored(file, found, archive, member, name)
    elif member.method == DEFLATED:
        _read_deflated(file, found, member, name)
    else:
        message = f"array {printable(name)} is compressed in a way that NumPy does not use"
        found.failures.append(Failure("unsupported", message))


def _read_stored(
    file: BinaryIO, found: _Found, archive: Archive, member: Member, name: str
) -> None:
    file.seek(member.offset)
    start = file.read(min(_HEADER_ROOM, member.size))
    header = _member_header(start, found.path, member, name)
    dtype = _dtype(header, name, found)
    if dtype:
        offset = archive.stored(member.name).offset + header.length
        found.tensors.append(_ref(name, dtype, header, found.path, offset))


def _member_header(start: bytes, path: str, member: Member, name: str) -> _Header:
    header = _header(start, path, f"array {printable(name)}", in_archive=True)
    if header.size != member.size:
        message = f"array {printable(name)} has {member.size} bytes; its header says {header.size}"
        raise InputError(path, "malformed", message)
    return header


def _header(start: bytes, path: str, what: str, *, in_archive: bool) -> _Header:
    """Parse an .npy header; NumPy's own parser evaluates literals only."""
    stream = io.BytesIO(start)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # headers that Python 2 wrote
            shape, fortran, dtype = _parsed_header(stream)
    # What literal_eval and np.dtype raise on hostile text is not documented.
    except Exception as error:
        reason = printable(str(error)) or type(error).__name__
        cut_off = not in_archive and _ends_inside_header(start)
        kind: InputKind = "truncated" if cut_off else "malformed"
        raise InputError(path, kind, f"the header of {what} cannot be read: {reason}") from None
    if dtype.hasobject:
        raise InputError(path, "unsafe", f"{what} {_PICKLED}")
    if any(type(n) is not int or not 0 <= n < 1 << 63 for n in shape) or len(shape) > 64:
        raise InputError(path, "malformed", f"{what} has an impossible shape")
    return _Header(dtype, shape, fortran, stream.tell())


def _parsed_header(stream: BinaryIO) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    version = npy.read_magic(stream)
    if version == (1, 0):
        return npy.read_array_header_1_0(stream)
    if version in ((2, 0), (3, 0)):
        # Version 3 only differs in the encoding of field names, and records are not analysed.
        return npy.read_array_header_2_0(stream)
    raise ValueError(f"version {version} of the format is unknown")


def _ends_inside_header(start: bytes) -> bool:
    if len(start) < 12:
        return True
    layout = "<H" if start[6] == 1 else "<I"
    (length,) = struct.unpack_from(layout, start, 8)
    return len(start) < 8 + struct.calcsize(layout) + int(length) <= _HEADER_ROOM


def _dtype(header: _Header, name: str, found: _Found) -> str | None:
    """The name of a supported dtype; otherwise None, with the reason recorded."""
    dtype = _DTYPES.get((header.dtype.kind, header.dtype.itemsize))
    if dtype is None:
        reason = _UNSUPPORTED.get(header.dtype.kind, "not numbers")
        found.skipped.append(Skipped(name, f"dtype {header.dtype.str}: {reason}"))
    return dtype


def _ref(
    name: str, dtype: str, header: _Header, path: str, offset: int, unpacked: str | None = None
) -> TensorRef:
    return TensorRef(
        name=name,
        dtype=dtype,
        shape=header.shape,
        file=path,
        offset=offset,
        strides=header.strides,
        big_endian=header.dtype.str.startswith(">"),
        unpacked=unpacked,
    )


# --- compressed members ---------------------------------------------------------------------------


def _read_deflated(file: BinaryIO, found: _Found, member: Member, name: str) -> None:
    pieces = _inflated(file, found.path, member, name)
    start = b""
    for piece in pieces:
        start += piece
        if len(start) >= _HEADER_ROOM:
            break
    header = _member_header(start, found.path, member, name)
    dtype = _dtype(header, name, found)
    if dtype:
        _refuse_bomb(found.path, member, header, name)
        target = _temporary(found, member.size)
        offset = target.tell() + header.length
        _unpack(target, start, pieces, found, member, name)
        found.tensors.append(_ref(name, dtype, header, found.path, offset, target.name))


def _refuse_bomb(path: str, member: Member, header: _Header, name: str) -> None:
    if header.size > _BOMB_BYTES and header.size > _BOMB_RATIO * member.packed_size:
        raise InputError(
            path,
            "unsafe",
            f"array {printable(name)} would inflate from {member.packed_size} bytes to "
            f"{header.size}. If that is right, save it uncompressed with numpy.savez",
        )


def _inflated(file: BinaryIO, path: str, member: Member, name: str) -> Iterator[bytes]:
    """The member's bytes in pieces; never more than the archive declares, and checksummed."""
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    left, total, crc, at = member.packed_size, 0, 0, member.offset
    try:
        while not inflater.eof:
            packed = inflater.unconsumed_tail
            if not packed and left:
                file.seek(at)
                packed = file.read(min(left, _PIECE))
                at, left = at + len(packed), left - len(packed)
            piece = inflater.decompress(packed, _PIECE)
            total, crc = total + len(piece), zlib.crc32(piece, crc)
            if total > member.size or not (piece or packed):
                break
            yield piece
    except zlib.error as error:
        raise _damaged(path, name, str(error)) from None
    if total != member.size or not inflater.eof:
        raise _damaged(path, name, f"it does not inflate to the declared {member.size} bytes")
    if crc != member.crc:
        raise _damaged(path, name, "its checksum is wrong")


def _damaged(path: str, name: str, reason: str) -> InputError:
    message = f"array {printable(name)} is damaged: {printable(reason)}. Copy or save it again"
    return InputError(path, "malformed", message)


def _unpack(
    target: IO[bytes],
    start: bytes,
    pieces: Iterator[bytes],
    found: _Found,
    member: Member,
    name: str,
) -> None:
    try:
        target.write(start)
        for piece in pieces:
            target.write(piece)
        target.flush()
    except OSError as error:
        message = f"array {printable(name)} of {member.size} bytes cannot be unpacked: "
        raise InputError(found.path, "unsupported", message + str(error.strerror)) from None


_kept: list[tuple[int, IO[bytes]]] = []


def _temporary(found: _Found, size: int) -> IO[bytes]:
    """The temporary file that takes one archive's inflated arrays, at its end."""
    if found.unpacked is None:
        # Closed at exit: the addresses in the checkpoint outlive this function.
        found.unpacked = tempfile.NamedTemporaryFile(prefix="gradscope-", suffix=".unpacked")  # noqa: SIM115
        _kept.append((os.getpid(), found.unpacked))
    free = shutil.disk_usage(os.path.dirname(found.unpacked.name)).free
    if size > free:
        raise InputError(
            found.path,
            "unsupported",
            f"is compressed: an array needs {size} bytes in {tempfile.gettempdir()}, which has "
            f"{free}. Set TMPDIR, or save the file uncompressed with numpy.savez",
        )
    return found.unpacked


@atexit.register
def _remove_temporaries() -> None:
    """Delete what this process unpacked; a forked child leaves its parent's files alone."""
    for owner, file in _kept:
        if owner == os.getpid():
            file.close()
