"""Listing zip archives that strangers made: where each stored member's bytes lie, and nothing else.

Every member's local header must agree with the central directory and no two members may share
bytes; tricks with either make readers disagree about what a file holds.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NoReturn

from gradscope.checkpoints.unpickle import printable
from gradscope.errors import InputError

STORED = 0
DEFLATED = 8
MAX_MEMBERS = 1_000_000

_END = struct.Struct("<4s4H2LH")
_LOCATOR64 = struct.Struct("<4sLQL")
_END64 = struct.Struct("<4sQ2H2L4Q")
_CENTRAL = struct.Struct("<4s6H3L5H2L")
_LOCAL = struct.Struct("<4s5H3L2H")
_LONGEST_COMMENT = 0xFFFF
_ESCAPED = 0xFFFFFFFF
_ENCRYPTED = 1 | 1 << 6
_SIZES_FOLLOW = 1 << 3
_UTF8 = 1 << 11


@dataclass(frozen=True, slots=True)
class Member:
    """One file of an archive; ``offset`` is the absolute position of its (packed) bytes."""

    name: str
    offset: int
    packed_size: int
    size: int
    method: int
    crc: int


@dataclass(frozen=True, slots=True)
class Archive:
    """The members of a checked zip archive, by name."""

    path: str
    members: Mapping[str, Member]

    def stored(self, name: str) -> Member:
        """A member whose bytes can be read in place; InputError when missing or compressed."""
        member = self.members.get(name)
        if member is None:
            raise InputError(self.path, "malformed", f"the archive has no member {printable(name)}")
        if member.method != STORED:
            raise InputError(
                self.path,
                "unsupported",
                f"member {printable(name)} is compressed, which torch never does to tensors. "
                "Unpack the archive and pack it again without compression (zip -0)",
            )
        return member

    def read(self, file: BinaryIO, name: str, longest: int) -> bytes:
        """The bytes of a small stored member."""
        member = self.stored(name)
        if member.size > longest:
            message = (
                f"member {printable(name)} has {member.size} bytes; at most {longest} are read"
            )
            raise InputError(self.path, "malformed", message)
        return _read_at(file, member.offset, member.size)


@dataclass(frozen=True, slots=True)
class _Entry:
    """One record of the central directory."""

    raw_name: bytes
    name: str
    flags: int
    method: int
    crc: int
    packed_size: int
    size: int
    header: int


@dataclass(frozen=True, slots=True)
class _Extent:
    """A region of a file that an archive fills."""

    path: str
    file: BinaryIO
    start: int
    size: int

    def read(self, offset: int, count: int) -> bytes:
        """Bytes at an offset into the archive; fewer than asked at its end."""
        count = min(count, self.size - offset)
        return _read_at(self.file, self.start + offset, count) if offset >= 0 < count else b""

    def fail(self, message: str) -> NoReturn:
        raise InputError(self.path, "malformed", f"damaged zip archive: {message}")


def read_archive(file: BinaryIO, path: str | Path, start: int, size: int) -> Archive:
    """List the archive that fills ``size`` bytes at ``start`` of a file, after checking all of it.

    Raises InputError: ``truncated`` when there is no directory at its end, ``malformed`` when
    headers disagree, members overlap, repeat a name or lie outside, ``unsupported`` when encrypted.
    """
    extent = _Extent(str(path), file, start, size)
    try:
        count, length, directory = _find_directory(extent)
        entries = _central_entries(extent, count, length, directory)
        return Archive(str(path), _checked_members(extent, entries, directory))
    except (struct.error, UnicodeDecodeError) as error:
        extent.fail(str(error))


def _read_at(file: BinaryIO, offset: int, count: int) -> bytes:
    file.seek(offset)
    return file.read(count)


def _find_directory(extent: _Extent) -> tuple[int, int, int]:
    """Member count, length and offset of the central directory."""
    at = max(0, extent.size - _END.size - _LONGEST_COMMENT)
    tail = extent.read(at, extent.size)
    found = tail.rfind(b"PK\5\6")
    if found < 0 or found + _END.size > len(tail):
        raise InputError(
            extent.path,
            "truncated",
            f"the archive's directory is missing from the end of its {extent.size} bytes: the file "
            "is incomplete. Copy or download it again, or save it again",
        )
    _, disk, first_disk, _, count, length, offset, comment = _END.unpack_from(tail, found)
    end = at + found
    if end + _END.size + comment != extent.size or disk or first_disk:
        extent.fail("its end record does not end the file")
    locator = extent.read(end - _LOCATOR64.size, _LOCATOR64.size)
    if locator.startswith(b"PK\6\7"):
        count, length, offset, end = _find_directory64(extent, locator)
    if offset + length != end:
        extent.fail("its directory does not lie where its end record says")
    if count > MAX_MEMBERS:
        extent.fail(f"it declares {count} members; at most {MAX_MEMBERS} are read")
    return count, length, offset


def _find_directory64(extent: _Extent, locator: bytes) -> tuple[int, int, int, int]:
    _, _, at, _ = _LOCATOR64.unpack(locator)
    record = _END64.unpack(extent.read(at, _END64.size))
    if record[0] != b"PK\6\6":
        extent.fail("its zip64 end record is missing")
    count, length, offset = record[7:10]
    return count, length, offset, at


def _central_entries(extent: _Extent, count: int, length: int, offset: int) -> list[_Entry]:
    if count * _CENTRAL.size > length:
        extent.fail(f"its directory of {length} bytes cannot hold {count} members")
    directory = extent.read(offset, length)
    entries = []
    at = 0
    for _ in range(count):
        entry, at = _central_entry(extent, directory, at)
        entries.append(entry)
    if at != len(directory):
        extent.fail("its directory holds more than the declared members")
    return entries


def _central_entry(extent: _Extent, directory: bytes, at: int) -> tuple[_Entry, int]:
    fields = _CENTRAL.unpack_from(directory, at)
    magic, _, _, flags, method, _, _, crc, packed, size, names, extras, comments = fields[:13]
    header = fields[16]
    at += _CENTRAL.size
    raw = directory[at : at + names]
    extra = directory[at + names : at + names + extras]
    end = at + names + extras + comments
    if magic != b"PK\1\2" or end > len(directory):
        extent.fail("its directory is not one")
    size, packed, header = _widened(extra, (size, packed, header))
    name = raw.decode("utf-8" if flags & _UTF8 else "cp437")
    return _Entry(raw, name, flags, method, crc, packed, size, header), end


def _widened(extra: bytes, values: tuple[int, ...]) -> tuple[int, ...]:
    """Values with those too large for 32 bits taken from the zip64 extra field, in order."""
    if _ESCAPED not in values:
        return values
    wide = iter(_zip64_values(extra))
    return tuple(next(wide, value) if value == _ESCAPED else value for value in values)


def _zip64_values(extra: bytes) -> tuple[int, ...]:
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, at)
        if kind == 1:
            count = min(length, len(extra) - at - 4) // 8
            return struct.unpack_from(f"<{count}Q", extra, at + 4)
        at += 4 + length
    return ()


def _checked_members(extent: _Extent, entries: list[_Entry], directory: int) -> dict[str, Member]:
    members: dict[str, Member] = {}
    free = 0
    for entry in sorted(entries, key=lambda entry: entry.header):
        shown = printable(entry.name)
        if entry.header < free:
            extent.fail(f"member {shown} overlaps another one")
        if entry.name in members:
            extent.fail(f"it has two members named {shown}")
        member = _checked_member(extent, entry)
        free = member.offset - extent.start + member.packed_size
        if free > directory:
            extent.fail(f"member {shown} does not fit between its header and the directory")
        members[entry.name] = member
    return members


def _checked_member(extent: _Extent, entry: _Entry) -> Member:
    """The member with its data offset, after its local header was compared with the directory."""
    shown = printable(entry.name)
    if entry.flags & _ENCRYPTED:
        raise InputError(
            extent.path, "unsupported", f"member {shown} is encrypted; decrypt it first"
        )
    header = extent.read(entry.header, _LOCAL.size)
    if len(header) < _LOCAL.size:
        extent.fail(f"the header of member {shown} lies outside the file")
    magic, _, flags, method, _, _, _, packed, size, names, extras = _LOCAL.unpack(header)
    at = entry.header + _LOCAL.size
    if magic != b"PK\3\4" or extent.read(at, names) != entry.raw_name:
        extent.fail(f"member {shown} has another name, or no header, where its bytes are")
    size, packed = _widened(extent.read(at + names, extras), (size, packed))
    follow = flags & _SIZES_FOLLOW and not size and not packed
    sizes_agree = follow or (size, packed) == (entry.size, entry.packed_size)
    if method != entry.method or flags & _ENCRYPTED or not sizes_agree:
        extent.fail(f"the two headers of member {shown} disagree")
    if method == STORED and entry.size != entry.packed_size:
        extent.fail(f"member {shown} is stored, but its two sizes differ")
    offset = extent.start + at + names + extras
    return Member(entry.name, offset, entry.packed_size, entry.size, method, entry.crc)
