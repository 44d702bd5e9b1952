"""Zip archives that strangers made: where each member's bytes lie, and reading them checked.

Every member's local header must agree with the central directory and no two members may share
bytes; tricks with either make readers disagree about what a file holds.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NoReturn

from gradscope.containers.files import read_at
from gradscope.errors import InputError
from gradscope.text import quoted, size

STORED = 0
DEFLATED = 8
MAX_MEMBERS = 1_000_000

_PIECE = 1 << 20
#: Deflate reaches about 1000:1 on zeros; neither a ratio nor a size alone makes a bomb.
_BOMB_RATIO = 200
_BOMB_BYTES = 1 << 30

END = struct.Struct("<4s4H2LH")
LOCATOR64 = struct.Struct("<4sLQL")
END64 = struct.Struct("<4sQ2H2L4Q")
_CENTRAL = struct.Struct("<4s6H3L5H2L")
_LOCAL = struct.Struct("<4s5H3L2H")
LONGEST_COMMENT = 0xFFFF
_ESCAPED = 0xFFFFFFFF
_ENCRYPTED = 1 | 1 << 6
_SIZES_FOLLOW = 1 << 3
_UTF8 = 1 << 11


class DamagedMemberError(InputError):
    """The bytes of one member are not those that its archive's directory describes."""

    def __init__(self, path: str | Path, name: str, reason: str) -> None:
        message = f"member {quoted(name)} is damaged: {reason}. Copy or save the file again"
        super().__init__(path, "malformed", message)


@dataclass(frozen=True, slots=True)
class Member:
    """One file of an archive; ``offset`` is the absolute position of its (packed) bytes."""

    name: str
    offset: int
    packed_size: int
    size: int
    method: int
    #: The CRC-32 of the unpacked bytes; None where none was recorded.
    crc: int | None

    @property
    def is_bomb(self) -> bool:
        """Whether it would inflate to far more than honest data do."""
        return is_bomb([self])


def is_bomb(members: Iterable[Member]) -> bool:
    """Whether members together would inflate to far more than honest data do."""
    packed = unpacked = 0
    for member in members:
        packed, unpacked = packed + member.packed_size, unpacked + member.size
    return unpacked > _BOMB_BYTES and unpacked > _BOMB_RATIO * packed


@dataclass(frozen=True, slots=True)
class Archive:
    """The members of a checked zip archive, by name."""

    path: str
    members: Mapping[str, Member]

    def stored(self, name: str) -> Member:
        """A member whose bytes can be read in place; InputError when missing or compressed."""
        member = self.members.get(name)
        if member is None:
            raise InputError(self.path, "malformed", f"the archive has no member {quoted(name)}")
        if member.method != STORED:
            raise InputError(
                self.path,
                "unsupported",
                f"member {quoted(name)} is compressed, so that it cannot be read in place. "
                "Unpack the archive and pack it again without compression (zip -0)",
            )
        return member

    def read(self, file: BinaryIO, name: str, longest: int) -> bytes:
        """The bytes of a small stored member. Raises InputError, also for a wrong checksum."""
        member = self.stored(name)
        if member.size > longest:
            message = (
                f"member {quoted(name)} has {size(member.size)}; at most {size(longest)} are read"
            )
            raise InputError(self.path, "malformed", message)
        return self.content(file, member)

    def content(self, file: BinaryIO, member: Member) -> bytes:
        """All bytes of a member, unpacked and checked. Raises InputError."""
        return b"".join(self.pieces(file, member))

    def pieces(self, file: BinaryIO, member: Member) -> Iterator[bytes]:
        """The bytes of a member, unpacked; never more than the archive declares.

        Raises DamagedMemberError after the last piece when they are not what the archive
        describes, and InputError (``unsupported``) for a compression other than deflate.
        """
        if member.method not in _UNPACKERS:
            message = (
                f"member {quoted(member.name)} is compressed by method {member.method}, "
                "which is not supported"
            )
            raise InputError(self.path, "unsupported", message)
        total, crc = 0, 0
        try:
            for piece in _UNPACKERS[member.method](file, member):
                total, crc = total + len(piece), zlib.crc32(piece, crc)
                if total > member.size:
                    break
                yield piece
        except zlib.error as error:
            raise DamagedMemberError(self.path, member.name, str(error)) from None
        if total != member.size:
            reason = f"it does not have the declared {member.size:,} bytes"
            raise DamagedMemberError(self.path, member.name, reason)
        if member.crc is not None and crc != member.crc:
            raise DamagedMemberError(self.path, member.name, WRONG_CHECKSUM)


#: What a member is told to have whose bytes changed after they were written.
WRONG_CHECKSUM = "its checksum is wrong"


def _stored(file: BinaryIO, member: Member) -> Iterator[bytes]:
    for at in range(0, member.packed_size, _PIECE):
        yield read_at(file, member.offset + at, min(_PIECE, member.packed_size - at))


def _inflated(file: BinaryIO, member: Member) -> Iterator[bytes]:
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    for packed in _stored(file, member):
        while packed and not inflater.eof:
            yield inflater.decompress(packed, _PIECE)
            packed = inflater.unconsumed_tail
    while not inflater.eof:
        held_back = inflater.decompress(b"", _PIECE)
        if not held_back:
            raise zlib.error("its compressed bytes end too early")
        yield held_back


_UNPACKERS = {STORED: _stored, DEFLATED: _inflated}


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
class Extent:
    """A region of a file that an archive fills."""

    path: str
    file: BinaryIO
    start: int
    size: int

    def read(self, offset: int, count: int) -> bytes:
        """Bytes at an offset into the archive; fewer than asked at its end."""
        count = min(count, self.size - offset)
        return read_at(self.file, self.start + offset, count) if offset >= 0 < count else b""

    def fail(self, message: str) -> NoReturn:
        """Raise InputError (``malformed``)."""
        raise InputError(
            self.path,
            "malformed",
            f"a damaged zip archive: {message}. Copy or save the file again",
        )


def read_archive(file: BinaryIO, path: str | Path, start: int, size: int) -> Archive:
    """List the archive that fills ``size`` bytes at ``start`` of a file, after checking all of it.

    Raises InputError: ``truncated`` when there is no directory at its end, ``malformed`` when
    headers disagree, members overlap, repeat a name or lie outside, ``unsupported`` when encrypted.
    """
    extent = Extent(str(path), file, start, size)
    directory, entries = _directory(extent)
    try:
        return Archive(str(path), _checked_members(extent, entries, directory))
    except struct.error as error:
        extent.fail(str(error))


def member_names(file: BinaryIO, path: str | Path, size: int) -> list[str]:
    """The names of an archive's members, from its directory alone: what tells archives apart.

    Raises InputError: ``truncated`` or ``malformed``.
    """
    _, entries = _directory(Extent(str(path), file, 0, size))
    return [entry.name for entry in entries]


def _directory(extent: Extent) -> tuple[int, list[_Entry]]:
    """The offset of the central directory, and its entries."""
    try:
        count, length, offset = find_directory(extent)
        return offset, _central_entries(extent, count, length, offset)
    except (struct.error, UnicodeDecodeError) as error:
        extent.fail(str(error))


def find_directory(extent: Extent) -> tuple[int, int, int]:
    """Member count, length and offset of the central directory."""
    at = max(0, extent.size - END.size - LONGEST_COMMENT)
    tail = extent.read(at, extent.size)
    found = tail.rfind(b"PK\5\6")
    if found < 0 or found + END.size > len(tail):
        if tail.find(b"PK\5\6") < found:
            extent.fail("its comment holds the mark of an end record")
        raise InputError(
            extent.path,
            "truncated",
            f"a zip archive without the directory that belongs at the end of its {extent.size:,} "
            "bytes: the download or copy did not finish. Copy or download the file again, or save "
            "it again",
        )
    _, disk, first_disk, _, count, length, offset, comment = END.unpack_from(tail, found)
    end = at + found
    if end + END.size + comment != extent.size or disk or first_disk:
        extent.fail("its end record does not end the file")
    where = end - LOCATOR64.size
    locator = extent.read(where, LOCATOR64.size)
    if locator.startswith(b"PK\6\7"):
        count, length, offset, end = find_directory64(extent, locator, where)
    if offset + length != end:
        extent.fail("its directory does not lie where its end record says")
    if count > MAX_MEMBERS:
        extent.fail(f"it declares {count:,} members; at most {MAX_MEMBERS:,} are read")
    return count, length, offset


def find_directory64(extent: Extent, locator: bytes, where: int) -> tuple[int, int, int, int]:
    """The same from the zip64 end record, which ends where its locator begins."""
    _, _, at, _ = LOCATOR64.unpack(locator)
    record = END64.unpack(extent.read(at, END64.size))
    # Its length leaves out the first 12 bytes. The record of another archive may lie there, too.
    if record[0] != b"PK\6\6" or at + 12 + record[1] != where:
        extent.fail("its zip64 end record is missing")
    count, length, offset = record[7:10]
    return count, length, offset, at


def _central_entries(extent: Extent, count: int, length: int, offset: int) -> list[_Entry]:
    if count * _CENTRAL.size > length:
        extent.fail(f"its directory of {length:,} bytes cannot hold {count:,} members")
    directory = extent.read(offset, length)
    entries = []
    at = 0
    for _ in range(count):
        entry, at = _central_entry(extent, directory, at)
        entries.append(entry)
    if at != len(directory):
        extent.fail("its directory holds more than the declared members")
    return entries


def _central_entry(extent: Extent, directory: bytes, at: int) -> tuple[_Entry, int]:
    fields = _CENTRAL.unpack_from(directory, at)
    magic, _, _, flags, method, _, _, crc, packed, size, names, extras, comments = fields[:13]
    header = fields[16]
    at += _CENTRAL.size
    raw = directory[at : at + names]
    extra = directory[at + names : at + names + extras]
    end = at + names + extras + comments
    if magic != b"PK\1\2" or end > len(directory):
        extent.fail("its directory is not a valid one")
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


def _checked_members(extent: Extent, entries: list[_Entry], directory: int) -> dict[str, Member]:
    members: dict[str, Member] = {}
    free = 0
    for entry in sorted(entries, key=lambda entry: entry.header):
        shown = quoted(entry.name)
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


def _checked_member(extent: Extent, entry: _Entry) -> Member:
    """The member with its data offset, after its local header was compared with the directory."""
    shown = quoted(entry.name)
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
    return Member(entry.name, offset, entry.packed_size, entry.size, method, _recorded(entry))


def _recorded(entry: _Entry) -> int | None:
    """The CRC of an entry, or None where its writer left it out, writing 0.

    torch leaves it out of every member under ``torch.serialization.set_crc32_options(False)``, and
    of the storages under ``torch.serialization.skip_data``, which are filled in later; its own
    reader compares no CRC. A true CRC of 0 is not compared either: one in four billion.
    """
    return entry.crc or None
