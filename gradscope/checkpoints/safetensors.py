"""Reading safetensors headers strictly: every byte is accounted for, none is trusted."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice

from gradscope.checkpoints.files import stamp
from gradscope.checkpoints.tensors import (
    DTYPE_BITS,
    Checkpoint,
    Failure,
    Problem,
    Skipped,
    TensorRef,
)
from gradscope.errors import InputError

#: The format's own limit: a longer header is refused by every safetensors reader.
HEADER_CAP = 100_000_000

_METADATA = "__metadata__"
_FIELDS = ("dtype", "shape", "data_offsets")
_DTYPES = {name: bits for name, bits in DTYPE_BITS.items() if name != "C128"}
_MAX_DIM = 2**48
_MAX_COUNT = 2**63
#: NumPy's limit; the format itself has none.
_MAX_DIMS = 64
#: The reference's JSON parser stops here, so a deeper header is not portable.
_MAX_DEPTH = 128
_MAX_DUPLICATES_NAMED = 20
_FETCH_AGAIN = "fetch the file again and compare its size or SHA-256"


class MalformedError(Exception):
    """What is wrong with some input, said where its path is not known yet."""


class Repeated(dict[str, object]):
    """A JSON object in which a key occurs more than once; ``pairs`` keeps every occurrence."""

    def __init__(self, pairs: list[tuple[str, object]]) -> None:
        super().__init__(pairs)
        self.pairs = pairs

    def repeated(self) -> list[str]:
        """The keys that occur more than once, in order of their second occurrence."""
        seen: set[str] = set()
        again: dict[str, None] = {}
        for key, _ in self.pairs:
            (again.setdefault(key) if key in seen else seen.add(key))
        return list(again)


def read_safetensors(path: str) -> Checkpoint:
    """The tensors a safetensors file describes, checked against its size; no tensor data is read.

    A file that ends too early is no error: what is complete is returned, with a Failure. Raises
    InputError when the header is cut off or contradicts itself.
    """
    before = stamp(path)
    header = _header_bytes(path, before[0])
    try:
        return _checkpoint(path, header, before)
    except MalformedError as error:
        raise InputError(path, "malformed", str(error)) from None


def strict_json(data: bytes, what: str) -> object:
    """Parse strictly: UTF-8 only, no NaN or Infinity, and a repeated key yields a `Repeated`."""
    text = _decoded(data, what)
    try:
        return json.loads(text, object_pairs_hook=_object, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        at = len(text[: error.pos].encode())
        raise MalformedError(f"{what} is not valid JSON: {error.msg} at byte {at:,}") from None
    except RecursionError:
        raise MalformedError(
            f"{what} is nested too deeply to be a description of tensors"
        ) from None
    except ValueError:
        raise MalformedError(f"{what} holds an integer of thousands of digits") from None


def human_size(count: int) -> str:
    """A number of bytes as people write it: ``512 bytes``, ``1.2 GB``."""
    if count < 1000:
        return "1 byte" if count == 1 else f"{count} bytes"
    size = count / 1000
    for unit in ("kB", "MB", "GB", "TB"):
        if size < 999.95:
            return f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:,.1f} PB"


def quoted(name: str) -> str:
    """A name for use in a message, cut where it is absurdly long."""
    return f"'{name}'" if len(name) <= 200 else f"'{name[:200]}…' ({len(name):,} characters)"


def listed(names: Iterable[str], total: int, shown: int = 3) -> str:
    """The first few names, and how many more there are."""
    text = ", ".join(quoted(name) for name in islice(names, shown))
    return f"{text} and {total - shown:,} more" if total > shown else text


def is_text(value: str) -> bool:
    """Whether a string can be written out: JSON escapes can smuggle in half a surrogate pair."""
    if value.isascii():
        return True
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def read_start(path: str, count: int) -> bytes:
    """The first bytes of a file, as many as there are up to ``count``."""
    try:
        with open(path, "rb") as file:
            return file.read(count)
    except OSError as error:
        reason = error.strerror or str(error)
        raise InputError(path, "missing", f"cannot be read: {reason}") from None


# The header's bytes and its JSON.


def _header_bytes(path: str, size: int) -> bytes:
    """The header, after its length was found to be possible: no allocation is sized by a claim."""
    if size < 8:
        message = f"is {human_size(size)}, too short for a safetensors file; {_FETCH_AGAIN}"
        raise InputError(path, "truncated", message)
    length = int.from_bytes(read_start(path, 8), "little")
    _check_length(path, length, size)
    data = read_start(path, 8 + length)[8:]
    if len(data) < length:
        raise InputError(path, "changed", "became shorter while it was being read; run again")
    return data


def _check_length(path: str, length: int, size: int) -> None:
    if length > HEADER_CAP:
        message = (
            f"the first 8 bytes claim a header of {length:,} bytes, the format allows "
            f"{HEADER_CAP:,}: the file is damaged or not a safetensors file"
        )
        raise InputError(path, "malformed", message)
    if 8 + length > size:
        message = (
            f"truncated: the header claims {length:,} bytes and the file has {size - 8:,} after "
            f"its first 8, so not even the list of tensors is complete; {_FETCH_AGAIN}"
        )
        raise InputError(path, "truncated", message)


def _decoded(data: bytes, what: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise MalformedError(f"{what} is not UTF-8 at byte {error.start:,}") from None


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    plain = dict(pairs)
    return plain if len(plain) == len(pairs) else Repeated(pairs)


def _refuse_constant(literal: str) -> object:
    raise MalformedError(f"{literal} is used as a number, which JSON does not have")


def _json_type(value: object) -> str:
    kinds: list[tuple[type, str]] = [
        (dict, "an object"),
        (list, "an array"),
        (str, "a string"),
        (bool, "a boolean"),
        (int, "an integer"),
        (float, "a number with a fraction or exponent"),
    ]
    return next((words for kind, words in kinds if isinstance(value, kind)), "null")


# Entries: what the header says of each tensor.


@dataclass(frozen=True, slots=True)
class _Entry:
    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def range(self) -> tuple[int, int]:
        return self.begin, self.end


def _entry(name: str, value: object) -> _Entry:
    fields = _fields(name, value)
    entry = _Entry(
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
            f"tensor {quoted(name)} is described by {_json_type(value)}, not an object"
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
    raise MalformedError(f"tensor {quoted(name)}: dtype is {_json_type(value)}, not a name")


def _shape(name: str, value: object) -> tuple[int, ...]:
    if not isinstance(value, list):
        raise MalformedError(f"tensor {quoted(name)}: shape is {_json_type(value)}, not an array")
    for dim in value:
        if type(dim) is not int:
            raise MalformedError(f"tensor {quoted(name)}: a dimension is {_json_type(dim)}")
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


def _check_size(entry: _Entry) -> None:
    numel = _numel(entry)
    if entry.dtype not in _DTYPES:
        return
    bits, stored = numel * _DTYPES[entry.dtype], entry.end - entry.begin
    if bits == 8 * stored:
        return
    what = f"tensor {quoted(entry.name)}: {numel:,} elements of {entry.dtype}"
    if bits % 8:
        raise MalformedError(f"{what} do not fill a whole number of bytes")
    had = f"its offsets {entry.begin:,} to {entry.end:,} give {stored:,}"
    raise MalformedError(f"{what} take {bits // 8:,} bytes, {had}")


def _numel(entry: _Entry) -> int:
    """Number of elements; refused where the non-zero dimensions overflow, as a reshape would."""
    extent = 1
    for dim in entry.shape:
        extent *= dim or 1
        if extent >= _MAX_COUNT:
            raise MalformedError(
                f"tensor {quoted(entry.name)}: its dimensions multiply beyond 2^63"
            )
    return 0 if 0 in entry.shape else extent


# The header as a whole.


@dataclass(frozen=True, slots=True)
class _Header:
    kept: tuple[_Entry, ...]
    #: Earlier descriptions of a name that is described again; ``kept`` has the last.
    dropped: tuple[_Entry, ...]
    metadata: Mapping[str, object]
    notes: tuple[str, ...]


def _header(data: bytes) -> _Header:
    value = strict_json(data, "the header")
    if not isinstance(value, dict):
        raise MalformedError(f"the header is {_json_type(value)}, not a JSON object")
    pairs = value.pairs if isinstance(value, Repeated) else list(value.items())
    metadata, notes = _metadata(pairs)
    described = [(name, fields) for name, fields in pairs if name != _METADATA]
    entries = [_entry(name, fields) for name, fields in described]
    last = {entry.name: entry for entry in entries}
    dropped = [entry for entry in entries if last[entry.name] is not entry]
    notes = [*_spacing_note(data), *notes, *_extra_note(described)]
    return _Header(_file_order(last.values()), tuple(dropped), metadata, tuple(notes))


def _file_order(entries: Iterable[_Entry]) -> tuple[_Entry, ...]:
    return tuple(sorted(entries, key=lambda entry: entry.range))


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
        raise MalformedError(f"__metadata__ is {_json_type(value)}, not an object")
    for key, item in value.items():
        if not isinstance(item, str):
            raise MalformedError(f"__metadata__[{quoted(key)}] is {_json_type(item)}, not a string")
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
    if any(_too_deep(fields) for _, fields in having):
        raise MalformedError(f"the header is nested deeper than {_MAX_DEPTH} levels")
    yield (
        f"{len(having):,} tensor(s) have fields that the format does not define, which are ignored "
        f"({listed(extra, len(extra))} of {quoted(name)})"
    )


def _too_deep(value: object) -> bool:
    level: list[object] = [value]
    for _ in range(_MAX_DEPTH - 1):
        containers = [item for item in level if isinstance(item, (dict, list))]
        level = [child for item in containers for child in _children(item)]
        if not level:
            return False
    return True


def _children(container: dict[str, object] | list[object]) -> Iterable[object]:
    return container.values() if isinstance(container, dict) else container


# The layout: tensors must tile the data without holes.


def _layout_end(header: _Header) -> int:
    """Where the data end; raises unless the tensors cover every byte before that exactly once."""
    end, last = 0, None
    for entry in _covering(header):
        if entry.begin != end and not _repeats(entry, last):
            raise MalformedError(_layout_fault(entry, last, end))
        end, last = max(end, entry.end), entry
    return end


def _covering(header: _Header) -> tuple[_Entry, ...]:
    kept = {entry.name: entry.range for entry in header.kept}
    moved = {entry.range: entry for entry in header.dropped if entry.range != kept[entry.name]}
    return _file_order((*header.kept, *moved.values()))


def _repeats(entry: _Entry, last: _Entry | None) -> bool:
    """Two descriptions of one name may overlap: that is reported as the duplicate it is."""
    return last is not None and entry.name == last.name and entry.begin <= last.end


def _layout_fault(entry: _Entry, last: _Entry | None, end: int) -> str:
    here = f"tensor {quoted(entry.name)} (bytes {entry.begin:,} to {entry.end:,})"
    if last is None:
        return f"the data start with {entry.begin:,} bytes that belong to no tensor, before {here}"
    before = f"tensor {quoted(last.name)} (bytes {last.begin:,} to {last.end:,})"
    if entry.begin < end:
        return f"{here} overlaps {before}"
    return (
        f"bytes {end:,} to {entry.begin:,} of the data belong to no tensor: {before}, then {here}"
    )


# From header to checkpoint.


def _checkpoint(path: str, data: bytes, before: tuple[int, int, int]) -> Checkpoint:
    header, start, size = _header(data), 8 + len(data), before[0]
    end = _layout_end(header)
    _check_no_tail(size - start - end)
    complete = [entry for entry in header.kept if start + entry.end <= size]
    cut = _Cut(start + end, size, tuple(complete), header.kept)
    readable = [entry for entry in complete if _unreadable(entry) is None]
    return Checkpoint(
        path=path,
        format="safetensors",
        nbytes=size,
        tensors=tuple(_ref(path, entry, start) for entry in readable),
        problems=(*_duplicates(header), *cut.problems(os.path.basename(path))),
        skipped=tuple(_skipped(header.kept, size - start)),
        failures=tuple(cut.failures()),
        notes=(*header.notes, *_unnamed_duplicates(header)),
        metadata=header.metadata,
        stamps={path: before},
    )


def _check_no_tail(extra: int) -> None:
    if extra > 0:
        raise MalformedError(
            f"{extra:,} extra bytes after the last tensor: two files were joined, or the file is "
            f"also something else; {_FETCH_AGAIN}"
        )


def _ref(path: str, entry: _Entry, start: int) -> TensorRef:
    return TensorRef(entry.name, entry.dtype, entry.shape, path, start + entry.begin)


def _skipped(entries: Iterable[_Entry], available: int) -> Iterator[Skipped]:
    for entry in entries:
        if entry.end > available:
            yield Skipped(entry.name, _shortfall(entry, available))
        elif reason := _unreadable(entry):
            yield Skipped(entry.name, reason)


def _shortfall(entry: _Entry, available: int) -> str:
    if entry.begin >= available:
        return "missing: it lies beyond the end of the truncated file"
    missing = entry.end - available
    return f"incomplete: {missing:,} of its {entry.end - entry.begin:,} bytes are missing"


def _unreadable(entry: _Entry) -> str | None:
    if entry.dtype not in _DTYPES:
        known = ", ".join(_DTYPES)
        return f"unknown dtype {quoted(entry.dtype)}; the dtypes of the format are {known}"
    if len(entry.shape) > _MAX_DIMS:
        return f"{len(entry.shape):,} dimensions; at most {_MAX_DIMS} can be analysed"
    return None


@dataclass(frozen=True, slots=True)
class _Cut:
    """How much of a file is there."""

    expected: int
    size: int
    complete: tuple[_Entry, ...]
    entries: tuple[_Entry, ...]

    @property
    def missing(self) -> int:
        return self.expected - self.size

    def failures(self) -> Iterator[Failure]:
        if self.missing > 0:
            cause = "the download or copy did not finish"
            yield Failure("truncated", f"{self._message()}; {cause}: {_FETCH_AGAIN}")

    def problems(self, file: str) -> Iterator[Problem]:
        if self.missing > 0:
            evidence = {
                "missing_bytes": self.missing,
                "expected_bytes": self.expected,
                "complete_tensors": len(self.complete),
                "tensors": len(self.entries),
            }
            remedy = f"The download or copy did not finish: {_FETCH_AGAIN}."
            yield Problem("truncated-file", file, self._message(), remedy, evidence)

    def _message(self) -> str:
        sizes = f"{human_size(self.missing)} of {human_size(self.expected)}"
        counts = f"{len(self.complete):,} of {len(self.entries):,} tensors are complete"
        if not self.complete:
            return f"truncated: {sizes} missing; no tensor is complete ({counts})"
        last = quoted(self.complete[-1].name)
        return f"truncated: {sizes} missing; last complete tensor is {last} ({counts})"


def _duplicates(header: _Header) -> Iterator[Problem]:
    if not header.dropped:
        return
    kept = {entry.name: entry for entry in header.kept}
    first = {entry.name: entry for entry in reversed(header.dropped)}
    for name in islice(dict.fromkeys(e.name for e in header.dropped), _MAX_DUPLICATES_NAMED):
        yield _duplicate(first[name], kept[name])


def _unnamed_duplicates(header: _Header) -> Iterator[str]:
    rest = len({entry.name for entry in header.dropped}) - _MAX_DUPLICATES_NAMED
    if rest > 0:
        yield f"{rest:,} more tensor names are described more than once"


def _duplicate(first: _Entry, last: _Entry) -> Problem:
    message = (
        f"the header describes tensor {quoted(last.name)} more than once: {_described(first)}, "
        f"and at last {_described(last)}; parsers disagree which one wins (the last is analysed)"
    )
    remedy = "Write the file again from a trusted source: no correct writer repeats a name."
    evidence: dict[str, int | float | str] = {
        "first_range": f"{first.begin}-{first.end}",
        "last_range": f"{last.begin}-{last.end}",
        "first": _described(first),
        "last": _described(last),
    }
    return Problem("duplicate-tensor-name", last.name, message, remedy, evidence)


def _described(entry: _Entry) -> str:
    shape = "[" + ", ".join(str(dim) for dim in entry.shape[:_MAX_DIMS]) + "]"
    return f"{entry.dtype[:40]} {shape} in bytes {entry.begin:,} to {entry.end:,}"
