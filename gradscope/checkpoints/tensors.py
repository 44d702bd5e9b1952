"""Where tensors lie: addresses built from headers alone, and what else a container says."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

from gradscope.errors import InputKind

if TYPE_CHECKING:  # headers are read without it
    import numpy.typing as npt

#: Bits per element of every dtype, in safetensors' spelling (C128 is NumPy's and torch's).
DTYPE_BITS: Mapping[str, int] = {
    "BOOL": 8,
    "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
    "F8_E4M3": 8, "F8_E5M2": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "F8_E8M0": 8,
    "F16": 16, "BF16": 16, "F32": 32, "F64": 64, "C64": 64, "C128": 128,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Checksum:
    """What an archive recorded of one stored member: the CRC-32 of ``nbytes`` at ``offset``."""

    member: str
    file: str
    offset: int
    nbytes: int
    crc: int


@runtime_checkable  # for pydantic, which writes and reads addresses
class Decoding(Protocol):
    """How the elements of a tensor that is stored in another form are computed when read."""

    @property
    def nbytes(self) -> int:
        """Bytes of the stored form."""
        ...

    def read(self, start: int, stop: int) -> npt.NDArray[Any]:
        """Elements ``start`` to ``stop`` in row-major order. Raises InputError as a tile does."""
        ...


#: What a tensor belongs to: the model, or what training keeps beside it (the state of an optimizer,
#: the weights in full precision that it updates, averages of the weights, loose ends).
Part = Literal["model", "optimizer", "master", "average", "other"]


@dataclass(frozen=True, slots=True)
class TensorRef:
    """The address of one tensor, built from headers alone; picklable, hashable, holds no handle.

    ``shape`` counts elements, also for sub-byte types. ``offset`` is the absolute byte position of
    element ``[0, …, 0]`` in ``source``; ``strides`` are in elements and None when the tensor is
    stored contiguously in row-major order. ``nbytes`` counts the bytes of the elements alone.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    offset: int
    strides: tuple[int, ...] | None = None
    big_endian: bool = False
    #: Where the bytes are, when not in ``file``: an unpacked member of a compressed archive.
    unpacked: str | None = None
    #: Of the archive's member that holds the bytes, where it recorded one; see ``verified``.
    checksum: Checksum | None = None
    #: Where the elements are not stored but computed: quantised weights.
    decoding: Decoding | None = None
    part: Part = "model"

    @property
    def source(self) -> str:
        """The path to read bytes from."""
        return self.unpacked or self.file

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the elements as they are stored, rounded up for sub-byte types."""
        if self.decoding is not None:
            return self.decoding.nbytes
        return -(-self.numel * DTYPE_BITS[self.dtype] // 8)

    @property
    def rows(self) -> int | None:
        """Length of dimension 0 where there are two or more dimensions, else None."""
        return self.shape[0] if len(self.shape) >= 2 else None

    @property
    def row_numel(self) -> int:
        """Elements of one slice along dimension 0."""
        return math.prod(self.shape[1:])


ProblemKind = Literal["truncated-file", "missing-shard", "index-mismatch", "duplicate-tensor-name"]


@dataclass(frozen=True, slots=True)
class Problem:
    """Something wrong with a container that still lets (part of) its tensors be read."""

    kind: ProblemKind
    subject: str
    message: str
    remedy: str
    evidence: Mapping[str, int | float | str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Skipped:
    """Something that was not analysed, and why."""

    subject: str
    reason: str
    #: No part of the model, or left out on request: the result is complete without it.
    deliberate: bool = False


@dataclass(frozen=True, slots=True)
class Failure:
    """A part of an input that could not be read, while the rest could: ends in exit code 3."""

    kind: InputKind
    message: str


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """One checkpoint, of one or more files, as its headers describe it."""

    path: str
    format: str
    nbytes: int
    tensors: tuple[TensorRef, ...]
    problems: tuple[Problem, ...] = ()
    skipped: tuple[Skipped, ...] = ()
    #: Left out on request; others may depend on them: the scales of quantised weights.
    left_out: tuple[TensorRef, ...] = ()
    failures: tuple[Failure, ...] = ()
    #: Worth telling a person, but not findings: which nested dict was taken, a stripped prefix.
    notes: tuple[str, ...] = ()
    #: Scalars found beside the tensors (``step``, ``epoch``), the header's metadata, config.json.
    metadata: Mapping[str, object] = field(default_factory=dict)
    #: path -> (size, mtime_ns, inode) when the headers were read, to notice a file that changes.
    stamps: Mapping[str, tuple[int, int, int]] = field(default_factory=dict)
    #: Classes of programs that its pickle names, which were not built.
    classes: tuple[str, ...] = ()
    #: The class of the pickled module that the tensors are of, where a whole module was saved.
    module: str | None = None
    #: The version of each module's code that a state dict notes, by the module's name.
    versions: Mapping[str, int] = field(default_factory=dict)

    def model(self) -> Checkpoint:
        """The same without what training keeps beside the model."""
        return replace(self, tensors=tuple(ref for ref in self.tensors if ref.part == "model"))
