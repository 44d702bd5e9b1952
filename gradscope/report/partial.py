"""Partial reports: what one of several jobs found, and what ``merge`` needs to join them.

The verdict of a whole rests on all of it. So a part carries, beside the report of its own share,
the state that the report has no place for: packed JSON, of which only data can come out.
"""

from __future__ import annotations

import base64
import hashlib
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

from gradscope.errors import InputError
from gradscope.report.model import AnyReport, Record, Report
from gradscope.text import listed, plural, quoted

R = TypeVar("R")

#: Bytes of state that are unpacked; that of a million tensors is a tenth of it.
_MOST = 4 << 30


class Source(Record):
    """A file as a job saw it: ``sample`` is a digest of bytes from its start to its end."""

    path: str
    bytes: int
    sample: str


class Partial(Record):
    """Which part of a run a report is of."""

    index: int
    of: int
    #: What was asked for, as far as it decides what is measured.
    options: Mapping[str, Any]
    files: tuple[Source, ...]
    #: A digest of all that the headers and the documents beside them say.
    headers: str
    #: See ``packed``, and a digest of it.
    state: str
    digest: str


class PartialReport(Report[R], Generic[R]):
    """The report of one job of several: it is no verdict of the whole."""

    partial: Partial

    @property
    def part(self) -> str:
        """Which part of the run it is of."""
        return f"{self.partial.index}/{self.partial.of}"


class Part(NamedTuple):
    """A partial report, and the file it was read from."""

    path: str
    report: PartialReport[Any]

    @property
    def partial(self) -> Partial:
        """Which part it is."""
        return self.report.partial


def spelled(state: Mapping[str, Any]) -> str:
    """A state as JSON. What JSON cannot say (objects of a foreign pickle) is left out."""
    return json.dumps(state, separators=(",", ":"), skipkeys=True, default=lambda _: None)


def packed(state: Mapping[str, Any]) -> str:
    """A state as a compact text; see ``unpacked``."""
    return base64.b64encode(zlib.compress(spelled(state).encode(), 9)).decode()


def digest(text: str) -> str:
    """What tells one text from another, and one that was damaged."""
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def unpacked(part: Part) -> Any:
    """The state of a part. Raises InputError for a part that is damaged."""
    try:
        if digest(part.partial.state) != part.partial.digest:
            raise ValueError("its digest is another")
        unpack = zlib.decompressobj()
        text = unpack.decompress(base64.b64decode(part.partial.state, validate=True), _MOST)
        if not unpack.eof:
            raise ValueError("it does not end")
        return json.loads(text)
    except (ValueError, RecursionError, zlib.error) as error:
        raise damaged(part, str(error)) from error


def damaged(part: Part, why: str) -> InputError:
    """What to raise for a part whose state is not what was written."""
    return InputError(
        part.path, "malformed", f"its state is damaged ({why}): run part {part.report.part} again"
    )


def complete(reports: Sequence[tuple[str, AnyReport]], version: str) -> list[Part]:
    """The parts of one run by their number.

    Raises InputError for whole reports, parts of several runs or of another version, parts that
    are missing, and parts that are there twice.
    """
    parts = [_part(path, report, version) for path, report in reports]
    first = parts[0]
    for other in parts[1:]:
        for said in _differences(first, other):
            raise InputError(other.path, "malformed", said)
    by_index: dict[int, Part] = {}
    for part in parts:
        twin = by_index.setdefault(part.partial.index, part)
        if twin is not part:
            raise InputError(
                part.path,
                "malformed",
                f"is part {part.report.part}, and so is {quoted(twin.path)}: give each part once",
            )
    of = first.partial.of
    if missing := [f"{i}/{of}" for i in range(of) if i not in by_index]:
        what = f"part {missing[0]} is" if len(missing) == 1 else f"{len(missing)} parts are"
        named = "" if len(missing) == 1 else f": {listed(missing, len(missing), 8)}"
        raise InputError(
            first.path,
            "missing",
            f"{plural(len(parts), 'part')} of {of} given; {what} missing{named}",
        )
    return [by_index[index] for index in range(of)]


def _part(path: str, report: AnyReport, version: str) -> Part:
    if not isinstance(report, PartialReport):
        raise InputError(
            path, "malformed", "is a whole report: only parts, of --shard i/n, are merged"
        )
    if report.tool.version != version:
        raise InputError(
            path,
            "unsupported",
            f"written by gradscope {report.tool.version}; this is {version}, which may measure "
            "otherwise: merge with the version that wrote the parts",
        )
    return Part(path, report)


def _differences(first: Part, other: Part) -> Iterator[str]:
    """Why two parts are not of one run; the first reason is the one to tell."""
    a, b = first.partial, other.partial
    beside = f"{quoted(first.path)}"
    if first.report.command != other.report.command:
        yield f"is a part of `{other.report.command}`, {beside} of `{first.report.command}`"
    if a.of != b.of:
        yield f"is one of {plural(b.of, 'part')}, {beside} one of {a.of}: merge parts of one run"
    for name in dict.fromkeys((*a.options, *b.options)):
        if a.options.get(name) != b.options.get(name):
            yield (
                f"was made with other options than {beside}: {name} is "
                f"{_shown(b.options.get(name))}, and {_shown(a.options.get(name))} there"
            )
    yield from _other_files({s.path: s for s in a.files}, {s.path: s for s in b.files}, beside)
    if a.headers != b.headers:
        yield (
            f"saw another checkpoint than {beside}: the headers, or a document beside them such as "
            "config.json, differ"
        )


def _other_files(
    first: Mapping[str, Source], other: Mapping[str, Source], beside: str
) -> Iterator[str]:
    for path in dict.fromkeys((*first, *other)):
        a, b = first.get(path), other.get(path)
        if a is None or b is None:
            has, lacks = ("it", beside) if a is None else (beside, "it")
            yield f"is of other files: {has} read {quoted(path)}, {lacks} did not"
        elif a.bytes != b.bytes:
            yield f"saw {quoted(path)} with {b.bytes:,} bytes, {beside} with {a.bytes:,}"
        elif a.sample != b.sample:
            yield (
                f"saw another content of {quoted(path)} than {beside}: the file was changed between"
                " the jobs, or is not the same one everywhere"
            )


def _shown(value: object) -> str:
    return quoted(json.dumps(value), 60) if value is not None else "not given"
