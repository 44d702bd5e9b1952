"""The header of a safetensors file, read strictly: every byte is accounted for, none is trusted.

The ``safetensors`` library writes such files wherever this project makes one, and is what this
reader is tested against. It is not used to read: it gives no offsets (statistics are measured in
place), refuses a truncated file that still has complete tensors, and silently keeps one of two
tensors with the same name.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from operator import attrgetter
from typing import NamedTuple

from gradscope.checkpoints.tensors import DTYPE_BITS
from gradscope.containers.strict_json import (
    MAX_DEPTH,
    MalformedError,
    Repeated,
    is_text,
    is_too_deep,
    parse,
    type_name,
)
from gradscope.text import listed, plural, quoted

#: The dtypes of the format, and bits per element.
DTYPES: Mapping[str, int] = {name: bits for name, bits in DTYPE_BITS.items() if name != "C128"}

_METADATA = "__metadata__"
_FIELDS = ("dtype", "shape", "data_offsets")
_MAX_DIM = 2**48
_MAX_COUNT = 2**63


class Entry(NamedTuple):
    """What the header says of one tensor; offsets count from the first byte after the header."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


#: Where an entry's bytes lie, to compare.
_range = attrgetter("begin", "end")


def _entry(name: str, value: object) -> Entry:
    fields = _fields(name, value)
    entry = Entry(
        name,
        _dtype(name, fields["dtype"]),
        _shape(name, fields["shape"]),
        *_offsets(name, fields["data_offsets"]),
    )
    _check_size(entry)
    return entry


def _fields(name: str, value: object) -> dict[str, object]:
    if not is_text(name):
        raise MalformedError(f"tensor name {ascii(name)[:200]} is not valid Unicode")
    if not isinstance(value, dict):
        raise MalformedError(
            f"tensor {quoted(name)} is described by {type_name(value)}, not an object"
        )
    if isinstance(value, Repeated):
        raise MalformedError(f"tensor {quoted(name)} has the field {_first_repeated(value)} twice")
    for field in _FIELDS:
        if field not in value:
            raise MalformedError(f"tensor {quoted(name)} has no {field}")
    return value


def _first_repeated(value: Repeated) -> str:
    return quoted(value.repeated()[0])


def _dtype(name: str, value: object) -> str:
    if isinstance(value, str) and is_text(value):
        return value
    raise MalformedError(f"tensor {quoted(name)}: dtype is {type_name(value)}, not a name")


def _shape(name: str, value: object) -> tuple[int, ...]:
    if not isinstance(value, list):
        raise MalformedError(f"tensor {quoted(name)}: shape is {type_name(value)}, not an array")
    for dim in value:
        if type(dim) is not int:
            raise MalformedError(f"tensor {quoted(name)}: a dimension is {type_name(dim)}")
        if not 0 <= dim < _MAX_DIM:
            why = "is negative" if dim < 0 else "is 2^48 or more"
            raise MalformedError(f"tensor {quoted(name)}: a dimension {why}")
    return tuple(value)


def _offsets(name: str, value: object) -> tuple[int, int]:
    if not isinstance(value, list) or len(value) != 2:
        raise MalformedError(f"tensor {quoted(name)}: data_offsets is not an array of two integers")
    begin, end = value
    if type(begin) is not int or type(end) is not int:
        raise MalformedError(f"tensor {quoted(name)}: data_offsets are not integers")
    if not (0 <= begin < _MAX_COUNT and 0 <= end < _MAX_COUNT):
        raise MalformedError(f"tensor {quoted(name)}: data_offsets are negative or beyond 2^63")
    if begin > end:
        raise MalformedError(
            f"tensor {quoted(name)}: ends at byte {end:,}, before its start {begin:,}"
        )
    return begin, end


def _check_size(entry: Entry) -> None:
    numel = _numel(entry)
    if entry.dtype not in DTYPES:
        return
    bits, stored = numel * DTYPES[entry.dtype], entry.end - entry.begin
    if bits == 8 * stored:
        return
    what = f"tensor {quoted(entry.name)}: {numel:,} elements of {entry.dtype}"
    if bits % 8:
        raise MalformedError(f"{what} do not fill a whole number of bytes")
    had = f"its offsets {entry.begin:,} to {entry.end:,} give {stored:,}"
    raise MalformedError(f"{what} take {bits // 8:,} bytes, {had}")


def _numel(entry: Entry) -> int:
    """Number of elements; refused where the non-zero dimensions overflow, as a reshape would."""
    extent = 1
    for dim in entry.shape:
        extent *= dim or 1
        if extent >= _MAX_COUNT:
            raise MalformedError(
                f"tensor {quoted(entry.name)}: its dimensions multiply beyond 2^63"
            )
    return 0 if 0 in entry.shape else extent


@dataclass(frozen=True, slots=True)
class Header:
    """Every tensor, in file order."""

    kept: tuple[Entry, ...]
    #: Earlier descriptions of a name that is described again; ``kept`` has the last.
    dropped: tuple[Entry, ...]
    metadata: Mapping[str, object]
    notes: tuple[str, ...]


def read_header(data: bytes) -> Header:
    """Parse a header. Raises MalformedError when it contradicts itself or the format."""
    value = parse(data, "the header")
    if not isinstance(value, dict):
        raise MalformedError(f"the header is {type_name(value)}, not a JSON object")
    pairs = value.pairs if isinstance(value, Repeated) else list(value.items())
    metadata, notes = _metadata(pairs)
    described = [(name, fields) for name, fields in pairs if name != _METADATA]
    entries = [_entry(name, fields) for name, fields in described]
    last = {entry.name: entry for entry in entries}
    dropped = [e for e in entries if last[e.name] is not e] if len(last) < len(entries) else []
    notes = [*_spacing_note(data), *notes, *_extra_note(described)]
    return Header(_file_order(last.values()), tuple(dropped), metadata, tuple(notes))


def _file_order(entries: Iterable[Entry]) -> tuple[Entry, ...]:
    return tuple(sorted(entries, key=_range))


def _metadata(pairs: list[tuple[str, object]]) -> tuple[dict[str, object], list[str]]:
    values = [value for name, value in pairs if name == _METADATA]
    if len(values) > 1:
        raise MalformedError("the header has __metadata__ twice")
    if not values:
        return {}, []
    if values[0] is None:
        return {}, ["__metadata__ is null; the format wants an object or nothing"]
    metadata = _string_map(values[0])
    if isinstance(metadata, Repeated):
        key = _first_repeated(metadata)
        return dict(metadata), [f"__metadata__ has the key {key} twice; the last value is taken"]
    return metadata, []


def _string_map(value: object) -> dict[str, object]:
    if not isinstance(value, dict):
        raise MalformedError(f"__metadata__ is {type_name(value)}, not an object")
    for key, item in value.items():
        if not isinstance(item, str):
            raise MalformedError(f"__metadata__[{quoted(key)}] is {type_name(item)}, not a string")
        if not (is_text(key) and is_text(item)):
            raise MalformedError("__metadata__ holds text that is not valid Unicode")
    return value


def _spacing_note(data: bytes) -> Iterator[str]:
    if data[:1] in (b" ", b"\t", b"\n", b"\r"):
        yield "the header starts with white space; the format wants it to start with '{'"


def _extra_note(described: list[tuple[str, object]]) -> Iterator[str]:
    """Fields the format does not define: the reference ignores them, so they may hide anything."""
    having = [
        (name, fields) for name, fields in described if isinstance(fields, dict) and len(fields) > 3
    ]
    if not having:
        return
    name, fields = having[0]
    extra = [field for field in fields if field not in _FIELDS]
    if any(is_too_deep(fields) for _, fields in having):
        raise MalformedError(f"the header is nested deeper than {MAX_DEPTH} levels")
    yield (
        f"fields that the format does not define are ignored in {plural(len(having), 'tensor')} "
        f"({listed(map(quoted, extra), len(extra))} of {quoted(name)})"
    )


# The layout: tensors must tile the data without holes.


def layout_end(header: Header) -> int:
    """Where the data end; raises unless the tensors cover every byte before that exactly once."""
    end, last = 0, None
    for entry in _covering(header):
        if entry.begin != end and not _repeats(entry, last):
            raise MalformedError(_layout_fault(entry, last, end))
        end, last = max(end, entry.end), entry
    return end


def _covering(header: Header) -> tuple[Entry, ...]:
    if not header.dropped:
        return header.kept
    kept = {entry.name: _range(entry) for entry in header.kept}
    moved = {_range(e): e for e in header.dropped if _range(e) != kept[e.name]}
    return _file_order((*header.kept, *moved.values()))


def _repeats(entry: Entry, last: Entry | None) -> bool:
    """Two descriptions of one name may overlap: that is reported as the duplicate it is."""
    return last is not None and entry.name == last.name and entry.begin <= last.end


def _layout_fault(entry: Entry, last: Entry | None, end: int) -> str:
    here = f"tensor {quoted(entry.name)} (bytes {entry.begin:,} to {entry.end:,})"
    if last is None:
        return f"the data start with {entry.begin:,} bytes that belong to no tensor, before {here}"
    before = f"tensor {quoted(last.name)} (bytes {last.begin:,} to {last.end:,})"
    if entry.begin < end:
        return f"{here} overlaps {before}"
    return (
        f"bytes {end:,} to {entry.begin:,} of the data belong to no tensor: {before}, then {here}"
    )
