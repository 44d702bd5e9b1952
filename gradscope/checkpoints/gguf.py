"""GGUF files (llama.cpp): what lies where, and the facts about the model that stand beside it.

The header is read here, with every claim held against the file's size. Blocks of quantised types
are described as rows of bytes with the type's name under ``BLOCKS_KEY``; what they stand for is
computed where it is asked for (``quantization.layouts.ggml``). Source: ggml's docs/gguf.md, v2, v3.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import BinaryIO

from gradscope.checkpoints.ggml_types import BLOCKS, BLOCKS_KEY, PLAIN, BlockType
from gradscope.checkpoints.safetensors import FETCH_AGAIN
from gradscope.checkpoints.tensors import (
    DTYPE_BITS,
    Checkpoint,
    Failure,
    Problem,
    Skipped,
    TensorRef,
)
from gradscope.containers.beginning import Beginning
from gradscope.containers.files import stamp, unreadable
from gradscope.containers.strict_json import MalformedError
from gradscope.errors import InputError
from gradscope.text import quoted
from gradscope.text import size as size_of

MAGIC = b"GGUF"
#: Where a checkpoint's metadata have the architecture.
ARCHITECTURE_KEY = "general.architecture"
_VERSIONS = (2, 3)
#: Scalars by the number of their type; 8 is a string, 9 an array.
_SCALARS = {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"
}  # fmt: skip
_STRING, _ARRAY = 8, 9
#: Limits of what any writer makes: bytes of a name, dimensions, bytes of alignment, nested arrays.
_NAME, _DIMENSIONS, _ALIGNMENT, _DEPTH = 1 << 16, 8, 1 << 20, 4


def recognises(file: Beginning) -> bool:
    """The magic number."""
    return file.start.startswith(MAGIC)


def read_gguf(path: str) -> Checkpoint:
    """The tensors that a GGUF file describes; no tensor data is read.

    A file that ends too early is not an error: what is complete is returned, with a Failure. Raises
    InputError when the header is cut off or contradicts itself.
    """
    before = stamp(path)
    try:
        with open(path, "rb") as file:
            header = _Header.of(file, before[0])
    except OSError as error:
        raise unreadable(path, error) from None
    except MalformedError as error:
        raise InputError(path, "malformed", str(error)) from None
    except EOFError:
        message = f"truncated: the list of tensors is not complete; {FETCH_AGAIN}"
        raise InputError(path, "truncated", message) from None
    return header.checkpoint(path, before)


@dataclass(frozen=True, slots=True)
class _Entry:
    """One tensor: its shape as we write it, and where its bytes begin behind the header."""

    name: str
    shape: tuple[int, ...]
    kind: int
    offset: int

    @property
    def block(self) -> BlockType | None:
        return BLOCKS.get(self.kind)

    @property
    def known(self) -> bool:
        return self.kind in PLAIN or self.kind in BLOCKS

    @property
    def nbytes(self) -> int:
        """0 where the type is not known."""
        if self.block is not None:
            return math.prod(self.shape) // self.block.elements * self.block.nbytes
        return math.prod(self.shape) * DTYPE_BITS[PLAIN[self.kind]] // 8 if self.known else 0

    def ref(self, path: str, start: int) -> TensorRef:
        """Blocks as rows of bytes."""
        block, offset = self.block, start + self.offset
        if block is None:
            return TensorRef(self.name, PLAIN[self.kind], self.shape, path, offset)
        row = self.shape[-1] // block.elements * block.nbytes
        return TensorRef(self.name, "U8", (*self.shape[:-1], row), path, offset)


@dataclass(frozen=True, slots=True)
class _Header:
    metadata: dict[str, object]
    entries: tuple[_Entry, ...]
    #: Where the data begin, and the file's bytes.
    start: int
    size: int

    @classmethod
    def of(cls, file: BinaryIO, size: int) -> _Header:
        """Raises EOFError when the file ends inside, MalformedError for what cannot be."""
        read = _Reader(file)
        read.take(len(MAGIC))
        version = int(read.number("I"))
        if version not in _VERSIONS:
            turned = int.from_bytes(version.to_bytes(4, "little"), "big")
            what = "of the other byte order" if turned in _VERSIONS else f"of version {version}"
            raise MalformedError(
                f"a GGUF file {what}; versions 2 and 3 in little-endian order are read: convert it "
                "again with a current llama.cpp"
            )
        tensors, pairs = int(read.number("Q")), int(read.number("Q"))
        metadata = dict(read.pair() for _ in range(pairs))
        entries = tuple(read.entry() for _ in range(tensors))
        _check(entries)
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or not 0 < alignment <= _ALIGNMENT:
            raise MalformedError(f"general.alignment is {alignment!r}")
        return cls(metadata, entries, -(-read.position // alignment) * alignment, size)

    def checkpoint(self, path: str, before: tuple[int, int, int]) -> Checkpoint:
        """What is there of it."""
        there = [e for e in self.entries if self.start + e.offset + e.nbytes <= self.size]
        blocks = {e.name: e.block.name for e in there if e.block is not None}
        return Checkpoint(
            path=path,
            format="gguf",
            nbytes=self.size,
            tensors=tuple(e.ref(path, self.start) for e in there if e.known),
            problems=tuple(self._problems(path, there)),
            skipped=tuple(self._skipped(there)),
            failures=tuple(Failure("truncated", m) for m in self._cut(there)),
            metadata={**self.metadata, BLOCKS_KEY: blocks},
            stamps={path: before},
        )

    def _cut(self, there: list[_Entry]) -> Iterator[str]:
        if len(there) < len(self.entries):
            end = self.start + max(e.offset + e.nbytes for e in self.entries)
            yield (
                f"truncated: {size_of(end - self.size)} of {size_of(end)} missing; {len(there):,} "
                f"of {len(self.entries):,} tensors are complete; {FETCH_AGAIN}"
            )

    def _problems(self, path: str, there: list[_Entry]) -> Iterator[Problem]:
        for message in self._cut(there):
            evidence = {"complete_tensors": len(there), "tensors": len(self.entries)}
            remedy = f"The download or copy did not finish: {FETCH_AGAIN}."
            yield Problem("truncated-file", os.path.basename(path), message, remedy, evidence)

    def _skipped(self, there: list[_Entry]) -> Iterator[Skipped]:
        kept = set(there)
        for entry in self.entries:
            if entry not in kept:
                yield Skipped(entry.name, "cut off: the file ends before it does")
            elif not entry.known:
                yield Skipped(entry.name, f"its type, number {entry.kind} of ggml, is not known")


def _check(entries: tuple[_Entry, ...]) -> None:
    """Each has a name and bytes of its own, as no two readers should differ about it."""
    seen: set[str] = set()
    for entry in entries:
        if entry.name in seen:
            raise MalformedError(f"the tensor {quoted(entry.name)} is described twice")
        seen.add(entry.name)
    ordered = sorted((e for e in entries if e.nbytes), key=lambda e: e.offset)
    for before, entry in pairwise(ordered):
        if before.offset + before.nbytes > entry.offset:
            message = f"the tensor {quoted(entry.name)} overlaps {quoted(before.name)}"
            raise MalformedError(f"{message}; {FETCH_AGAIN}")


class _Reader:
    """Numbers and texts of a header, in turn; where it is, is counted."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.position = 0

    def take(self, count: int) -> bytes:
        """So many bytes, none of them claimed and not there."""
        found = self._file.read(count)
        if len(found) < count:
            raise EOFError
        self.position += count
        return found

    def number(self, kind: str) -> float:
        """A little-endian scalar, in struct's spelling."""
        form = struct.Struct(f"<{kind}")
        found: float = form.unpack(self.take(form.size))[0]
        return found

    def text(self, most: int) -> bytes:
        """A length, then so many bytes."""
        length = int(self.number("Q"))
        if length > most:
            raise MalformedError(f"a text of {length:,} bytes at byte {self.position:,}")
        return self.take(length)

    def name(self) -> str:
        """A text that must be short and UTF-8."""
        try:
            return self.text(_NAME).decode()
        except UnicodeDecodeError:
            message = f"a name at byte {self.position:,} is not UTF-8; {FETCH_AGAIN}"
            raise MalformedError(message) from None

    def pair(self) -> tuple[str, object]:
        """A key and its value."""
        return self.name(), self.value(int(self.number("I")))

    def value(self, kind: int, depth: int = 0) -> object:
        """A value of metadata; None of arrays, which are about tokens."""
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == _STRING:
            return self.text(1 << 30).decode("utf-8", "replace")
        if kind != _ARRAY or depth == _DEPTH:
            raise MalformedError(f"a value of type {kind} at byte {self.position:,}; {FETCH_AGAIN}")
        inner, count = int(self.number("I")), int(self.number("Q"))
        if inner in _SCALARS:
            self.skip(count * struct.calcsize(f"<{_SCALARS[inner]}"))
        else:
            for _ in range(count):
                self.value(inner, depth + 1)
        return None

    def skip(self, count: int) -> None:
        """Pass over bytes, a piece at a time."""
        while count:
            count -= len(self.take(min(count, 1 << 20)))

    def entry(self) -> _Entry:
        """The description of a tensor; ggml writes the fastest dimension first."""
        name, count = self.name(), int(self.number("I"))
        if count > _DIMENSIONS:
            raise MalformedError(f"the tensor {quoted(name)} has {count:,} dimensions")
        shape = tuple(int(self.number("Q")) for _ in range(count))[::-1]
        kind, offset = int(self.number("I")), int(self.number("Q"))
        block = BLOCKS.get(kind)
        if math.prod(shape) >= 1 << 63 or max(shape, default=0) >= 1 << 48:
            raise MalformedError(f"the tensor {quoted(name)} has shape {list(shape)}")
        if block is not None and (not shape or shape[-1] % block.elements):
            raise MalformedError(
                f"rows of the tensor {quoted(name)} {list(shape)} are not whole blocks of "
                f"{block.elements} ({block.name})"
            )
        return _Entry(name, shape, kind, offset)
