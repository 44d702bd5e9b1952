"""Safetensors files as checkpoints: what is complete, what is cut off, what is described twice."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

from gradscope.checkpoints.safetensors_header import (
    DTYPES,
    Entry,
    Header,
    layout_end,
    read_header,
)
from gradscope.checkpoints.tensors import Checkpoint, Failure, Problem, Skipped, TensorRef
from gradscope.containers.files import Stamp, read_start, stamp
from gradscope.containers.strict_json import MalformedError
from gradscope.errors import InputError
from gradscope.text import quoted
from gradscope.text import size as size_of

#: The format's own limit: a longer header is refused by every safetensors reader.
HEADER_CAP = 100_000_000
FETCH_AGAIN = "fetch the file again and compare its size or SHA-256"

#: NumPy's limit; the format itself has none.
_MAX_DIMS = 64
_MAX_DUPLICATES_NAMED = 20


def read_safetensors(path: str) -> Checkpoint:
    """The tensors a safetensors file describes, checked against its size; no tensor data is read.

    A file that ends too early is not an error: what is complete is returned, with a Failure. Raises
    InputError when the header is cut off or contradicts itself.
    """
    before = stamp(path)
    header = _header_bytes(path, before[0])
    try:
        return _checkpoint(path, header, before)
    except MalformedError as error:
        raise InputError(path, "malformed", str(error)) from None


def _header_bytes(path: str, size: int) -> bytes:
    """The header, after its length was found to be possible: no allocation is sized by a claim."""
    if size < 8:
        message = f"is {size_of(size)}, too short for a safetensors file; {FETCH_AGAIN}"
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
            f"its first 8, so not even the list of tensors is complete; {FETCH_AGAIN}"
        )
        raise InputError(path, "truncated", message)


def _checkpoint(path: str, data: bytes, before: Stamp) -> Checkpoint:
    header, start, size = read_header(data), 8 + len(data), before[0]
    end = layout_end(header)
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
            f"also something else; {FETCH_AGAIN}"
        )


def _ref(path: str, entry: Entry, start: int) -> TensorRef:
    return TensorRef(entry.name, entry.dtype, entry.shape, path, start + entry.begin)


def _skipped(entries: Iterable[Entry], available: int) -> Iterator[Skipped]:
    for entry in entries:
        if entry.end > available:
            yield Skipped(entry.name, _shortfall(entry, available))
        elif reason := _unreadable(entry):
            yield Skipped(entry.name, reason)


def _shortfall(entry: Entry, available: int) -> str:
    if entry.begin >= available:
        return "missing: it lies beyond the end of the truncated file"
    missing = entry.end - available
    return f"incomplete: {missing:,} of its {entry.end - entry.begin:,} bytes are missing"


def _unreadable(entry: Entry) -> str | None:
    if entry.dtype not in DTYPES:
        known = ", ".join(DTYPES)
        return f"unknown dtype {quoted(entry.dtype)}; the dtypes of the format are {known}"
    if len(entry.shape) > _MAX_DIMS:
        return f"{len(entry.shape):,} dimensions; at most {_MAX_DIMS} can be analysed"
    return None


@dataclass(frozen=True, slots=True)
class _Cut:
    """How much of a file is there."""

    expected: int
    size: int
    complete: tuple[Entry, ...]
    entries: tuple[Entry, ...]

    @property
    def missing(self) -> int:
        return self.expected - self.size

    def failures(self) -> Iterator[Failure]:
        if self.missing > 0:
            cause = "the download or copy did not finish"
            yield Failure("truncated", f"{self._message()}; {cause}: {FETCH_AGAIN}")

    def problems(self, file: str) -> Iterator[Problem]:
        if self.missing > 0:
            evidence = {
                "missing_bytes": self.missing,
                "expected_bytes": self.expected,
                "complete_tensors": len(self.complete),
                "tensors": len(self.entries),
            }
            remedy = f"The download or copy did not finish: {FETCH_AGAIN}."
            yield Problem("truncated-file", file, self._message(), remedy, evidence)

    def _message(self) -> str:
        sizes = f"{size_of(self.missing)} of {size_of(self.expected)}"
        counts = f"{len(self.complete):,} of {len(self.entries):,} tensors are complete"
        if not self.complete:
            return f"truncated: {sizes} missing; no tensor is complete ({counts})"
        last = quoted(self.complete[-1].name)
        return f"truncated: {sizes} missing; last complete tensor is {last} ({counts})"


def _duplicates(header: Header) -> Iterator[Problem]:
    if not header.dropped:
        return
    kept = {entry.name: entry for entry in header.kept}
    first = {entry.name: entry for entry in reversed(header.dropped)}
    for name in islice(dict.fromkeys(e.name for e in header.dropped), _MAX_DUPLICATES_NAMED):
        yield _duplicate(first[name], kept[name])


def _unnamed_duplicates(header: Header) -> Iterator[str]:
    rest = len({entry.name for entry in header.dropped}) - _MAX_DUPLICATES_NAMED
    if rest > 0:
        yield f"{rest:,} more tensor names are described more than once"


def _duplicate(first: Entry, last: Entry) -> Problem:
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


def _described(entry: Entry) -> str:
    shape = "[" + ", ".join(str(dim) for dim in entry.shape[:_MAX_DIMS]) + "]"
    return f"{entry.dtype[:40]} {shape} in bytes {entry.begin:,} to {entry.end:,}"
