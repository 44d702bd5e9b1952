"""What is known of a quantised weight: its codes, their companions, and what is wrong with them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Literal, Protocol, runtime_checkable

from gradscope.checkpoints.tensors import Decoding, TensorRef


class Kind(StrEnum):
    """What a companion's numbers must be."""

    #: Positive and finite; zero where all of its codes are zero, because makers leave it so.
    SCALE = "scale"
    #: One for the whole tensor or expert: positive and finite.
    GLOBAL = "global scale"
    #: Finite, of any sign: a shift, a table of values.
    SIGNED = "signed"
    #: Indices of groups, from 0 on.
    INDEX = "index"
    #: Codes, zero points, documents: any number.
    ANY = "any"


@dataclass(frozen=True, slots=True)
class Companion:
    """A tensor beside the codes. ``ref`` has the type that its bytes stand for (E8M0 in U8)."""

    ref: TensorRef
    kind: Kind
    #: Of an index: how many groups there are.
    groups: int = 0

    @property
    def name(self) -> str:
        """The tensor's name."""
        return self.ref.name


@runtime_checkable
class Values(Decoding, Protocol):
    """How the values of a weight are computed."""

    @property
    def refs(self) -> tuple[TensorRef, ...]:
        """Every tensor that they depend on."""
        ...


FaultKind = Literal["missing", "shape", "config"]


@dataclass(frozen=True, slots=True)
class Fault:
    """What the headers alone show to be wrong. Faults of one kind and ``what`` have one cause."""

    kind: FaultKind
    #: The tensor that lacks something, or that is wrong.
    subject: str
    #: What is missing, or which tensor is wrong: the same words for every layer.
    what: str
    message: str
    evidence: Mapping[str, int | str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class QuantizedWeight:
    """One weight in codes. ``name`` and ``shape`` are those of the weight that it stands for."""

    name: str
    scheme: str
    shape: tuple[int, ...]
    codes: TensorRef
    companions: tuple[Companion, ...] = ()
    faults: tuple[Fault, ...] = ()
    #: How its values are computed; None where something that takes is missing or not understood.
    decoding: Values | None = None
    #: What the tensors show, to be compared with what a configuration says.
    bits: int | None = None
    group: int | None = None

    @property
    def values(self) -> TensorRef | None:
        """The weight as a tensor that can be measured, under the name of its codes."""
        if self.decoding is None or self.faults:
            return None
        return replace(
            self.codes, dtype="F32", shape=self.shape, strides=None, decoding=self.decoding
        )

    @property
    def scales(self) -> int:
        """How many scales it has: each usually maps one element to the greatest code."""
        return max((c.ref.numel for c in self.companions if c.kind is Kind.SCALE), default=1)


@dataclass(frozen=True, slots=True)
class Quantization:
    """The quantised weights of a checkpoint, and the codes that nothing scales."""

    weights: tuple[QuantizedWeight, ...] = ()
    #: Matrices of narrow types without any scale, where nothing proves that they need one.
    bare: tuple[TensorRef, ...] = ()
    #: Disagreements with a configuration that are about the checkpoint as a whole.
    faults: tuple[Fault, ...] = ()
    #: Scales beside no weight: of cached keys and values.
    caches: tuple[Companion, ...] = ()

    def companions(self) -> frozenset[str]:
        """Names of the tensors whose values are judged as what codes or caches need."""
        beside = (c for w in self.weights for c in w.companions)
        return frozenset(c.name for c in (*beside, *self.caches) if c.kind is not Kind.ANY)

    def codes(self) -> frozenset[str]:
        """Names of the tensors that hold codes."""
        return frozenset(w.codes.name for w in self.weights)
