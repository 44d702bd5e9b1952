"""What a torch file yields: tensors as strided views of storages, addressed in place."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import filterfalse
from typing import BinaryIO, Protocol

from gradscope.checkpoints.statedict import StateDict
from gradscope.checkpoints.tensors import (
    DTYPE_BITS,
    Checksum,
    Failure,
    Part,
    Problem,
    Skipped,
    TensorRef,
)
from gradscope.checkpoints.torch_names import is_plain
from gradscope.checkpoints.torch_pickle import StorageRecord, TensorRecord
from gradscope.checkpoints.tree import NamedTensors
from gradscope.containers.files import Stamp, read_at
from gradscope.errors import InputError
from gradscope.text import escaped, listed, quoted

#: An expanded view repeats its elements; beyond this many, analysing them all is pointless.
_MAX_REPEATED = 1 << 24

STORAGE_DTYPES: Mapping[str, str] = {
    "BoolStorage": "BOOL", "ByteStorage": "U8", "CharStorage": "I8", "ShortStorage": "I16",
    "IntStorage": "I32", "LongStorage": "I64", "HalfStorage": "F16", "BFloat16Storage": "BF16",
    "FloatStorage": "F32", "DoubleStorage": "F64", "ComplexFloatStorage": "C64",
    "ComplexDoubleStorage": "C128",
}  # fmt: skip
_DTYPES: Mapping[str, str] = {
    "bool": "BOOL", "uint8": "U8", "int8": "I8", "uint16": "U16", "int16": "I16", "uint32": "U32",
    "int32": "I32", "uint64": "U64", "int64": "I64", "float16": "F16", "bfloat16": "BF16",
    "float32": "F32", "float64": "F64", "complex64": "C64", "complex128": "C128",
    "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "float8_e4m3fnuz": "F8_E4M3FNUZ",
    "float8_e5m2fnuz": "F8_E5M2FNUZ", "float8_e8m0fnu": "F8_E8M0",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Source:
    """An open file and what is known about it."""

    file: BinaryIO
    path: str
    stamp: Stamp

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return self.stamp[0]

    def at(self, offset: int, count: int) -> bytes:
        """Up to ``count`` bytes at a position."""
        return read_at(self.file, offset, count)


@dataclass(frozen=True, slots=True)
class Region:
    """Where a storage's bytes lie in the file."""

    offset: int
    nbytes: int
    checksum: Checksum | None = None


class Storages(Protocol):
    """Finds the bytes of a storage."""

    @property
    def big_endian(self) -> bool:
        """The byte order of all elements."""

    def locate(self, storage: StorageRecord) -> Region:
        """Where a storage's bytes lie."""


@dataclass(slots=True)
class Contents:
    """What one torch file yields, in the making."""

    path: str
    format: str
    tensors: list[TensorRef] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    metadata: dict[str, object] = field(default_factory=dict)
    classes: tuple[str, ...] = ()
    module: str | None = None
    versions: Mapping[str, int] = field(default_factory=dict)

    def add(self, item: TensorRef | Skipped) -> None:
        """Record one tensor, or why it is not analysed."""
        if isinstance(item, TensorRef):
            self.tensors.append(item)
        else:
            self.skipped.append(item)

    def add_state_dict(self, found: StateDict, storages: Storages) -> None:
        """Record a state dict, and what was left around it."""
        self.notes.extend(found.notes)
        self.skipped.extend(found.skipped)
        self.metadata.update(found.scalars)
        self.module = found.module
        self.versions = found.versions
        self.add_tensors(found.tensors, storages)
        self.notes.extend(_sparse_note(found.tensors))
        for aside in found.asides:
            self.add_tensors(aside.tensors, storages, part=aside.part)

    def add_tensors(
        self, tensors: NamedTensors, storages: Storages, prefix: str = "", part: Part = "model"
    ) -> None:
        """Record tensors, under names that are made unique."""
        taken = dict.fromkeys((ref.name for ref in self.tensors), 1)
        for inner, record in tensors:
            name = self._unique(prefix + inner, taken, part)
            self.add(_of_part(part, address(name, record, self.path, storages)))

    def add_names(self, names: Iterable[str]) -> None:
        """Record which classes of programs a pickle names; they were not built."""
        self.classes = tuple(dict.fromkeys((*self.classes, *filterfalse(is_plain, names))))
        if self.classes:
            shown = listed((escaped(n, 120) for n in self.classes), len(self.classes), 3)
            self.notes.append(f"the pickle also names objects, which were not built: {shown}")

    def _unique(self, name: str, taken: dict[str, int], part: Part) -> str:
        """Nested names can collide with dotted ones: ``{"a.b": …, "a": {"b": …}}``."""
        if name not in taken:
            taken[name] = 1
            return name
        if taken[name] == 1 and part == "model":
            self.problems.append(_collision(name))
        free = name
        while free in taken:
            taken[name] += 1
            free = f"{name}#{taken[name]}"
        taken[free] = 1
        return free


def _sparse_note(tensors: NamedTensors) -> Iterator[str]:
    sparse = {name.rpartition(".")[0]: record.sparse for name, record in tensors if record.sparse}
    if sparse:
        shown = listed((f"{escaped(n)} ({layout})" for n, layout in sparse.items()), len(sparse))
        yield f"of sparse tensors the stored values and their indices were read: {shown}"


def _of_part(part: Part, item: TensorRef | Skipped) -> TensorRef | Skipped:
    """An array or object that lies loose beside a model is nobody's tensor."""
    if isinstance(item, TensorRef):
        return item if part == "model" else replace(item, part=part)
    return replace(item, deliberate=True) if part == "other" else item


def _collision(name: str) -> Problem:
    message = f"several entries of the file lead to the tensor name {quoted(name)}"
    return Problem("duplicate-tensor-name", name, message, "save a flat state dict")


def address(name: str, record: TensorRecord, path: str, storages: Storages) -> TensorRef | Skipped:
    """Where a tensor's elements lie, or why it is not analysed."""
    if record.unreadable or record.storage is None:
        return Skipped(name, record.unreadable or "tensor without a storage")
    dtype = _dtype(record, record.storage)
    if dtype is None:
        spelled = (record.dtype or record.storage.kind).removeprefix("torch.")
        return Skipped(name, f"dtype {escaped(spelled, 120)} is not supported")
    region = storages.locate(record.storage)
    view = Strided(dtype, record.shape, record.strides, record.offset)
    return placed(name, view, region, path, storages.big_endian)


def _dtype(record: TensorRecord, storage: StorageRecord) -> str | None:
    if record.dtype is not None:
        return _DTYPES.get(record.dtype.removeprefix("torch."))
    return STORAGE_DTYPES.get(storage.kind)


@dataclass(frozen=True, slots=True)
class Strided:
    """A view of a storage, in elements."""

    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int

    @property
    def itemsize(self) -> int:
        """Bytes of an element."""
        return DTYPE_BITS[self.dtype] // 8

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    def end(self) -> int:
        """One more than the largest element index reached; 0 when there are no elements."""
        if self.numel == 0:
            return 0
        steps = zip(self.shape, self.strides, strict=True)
        return self.offset + sum((size - 1) * stride for size, stride in steps) + 1

    def needed_strides(self) -> tuple[int, ...] | None:
        """None when elements follow each other in row-major order."""
        expected = 1
        for size, stride in zip(reversed(self.shape), reversed(self.strides), strict=True):
            if size != 1 and stride != expected:
                return self.strides if self.numel else None
            expected *= size
        return None


def placed(
    name: str, view: Strided, region: Region, path: str, big_endian: bool
) -> TensorRef | Skipped:
    """The address of a view of a region, or why it is not analysed.

    Raises InputError when it reaches beyond the region.
    """
    if view.numel >= 1 << 63:
        raise InputError(path, "malformed", f"tensor {quoted(name)} has an impossible shape")
    end = view.end() * view.itemsize
    if end > region.nbytes:
        raise InputError(
            path,
            "malformed",
            f"tensor {quoted(name)} reaches byte {end:,} of a storage that has only "
            f"{region.nbytes:,}. Save the file again",
        )
    if view.numel > max(_MAX_REPEATED, region.nbytes // view.itemsize):
        return Skipped(name, f"an expanded view: {view.numel:,} elements that repeat a few bytes")
    offset = region.offset + (view.offset * view.itemsize if view.numel else 0)
    return TensorRef(
        name=name,
        dtype=view.dtype,
        shape=view.shape,
        file=path,
        offset=offset,
        strides=view.needed_strides(),
        big_endian=big_endian,
        checksum=region.checksum,
    )
