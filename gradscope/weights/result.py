"""The ``result`` of ``gradscope weights`` (contract.md §4), and what its rules read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from typing import ClassVar, Literal

from gradscope.checkpoints.tensors import Checkpoint, TensorRef
from gradscope.report.model import Number, Record, Report
from gradscope.statistics.records import Numerics, Outliers, Statistics, TensorProfile, Units
from gradscope.weights.roles import Role

Status = Literal["excellent", "good", "fair", "poor", "critical"]


class Health(Record):
    """A score from 0 to 100 that findings alone lower, and its band."""

    score: float
    status: Status


class ElementResult(Record):
    """One element: its multi-index, its value, its robust score where it has one."""

    index: tuple[int, ...]
    value: Number
    score: Number | None = None


class OutlierResult(Record):
    """Elements above several robust scores, and the farthest ones."""

    counts: Mapping[str, int]
    peak_ratio: float | None
    scale: float
    top: tuple[ElementResult, ...]


class TensorResult(Record):
    """One tensor. ``statistics`` and what rests on them are None when only headers were read."""

    name: str
    #: The checkpoint it belongs to, as it was given; ``file`` is the shard.
    input: str
    file: str
    dtype: str
    shape: tuple[int, ...]
    numel: int
    role: Role
    statistics: Statistics | None = None
    units: Units | None = None
    outliers: OutlierResult | None = None
    numerics: Numerics | None = None
    nonfinite: tuple[ElementResult, ...] = ()
    histogram: tuple[int, ...] = ()
    content_hash: str | None = None
    spectrum: None = None
    health: Health | None = None

    @property
    def subject(self) -> str:
        """What findings about it name."""
        return self.name

    @property
    def row_numel(self) -> int:
        """Elements of one row."""
        return self.numel // self.shape[0] if self.shape and self.shape[0] else 0


class Overall(Record):
    """All model tensors' elements as one, and by role."""

    tensors: int
    parameters: int
    statistics: Statistics | None
    by_role: Mapping[str, RolePool]


class RolePool(Record):
    """The elements of all tensors of one role as one."""

    tensors: int
    statistics: Statistics


class WeightsResult(Record):
    """The result of one run over one or more checkpoints."""

    tensors: tuple[TensorResult, ...]
    overall: Overall
    health: Health | None
    notes: tuple[str, ...] = ()


WeightsReport = Report[WeightsResult]


class Need(StrEnum):
    """The kinds of facts that a rule about a checkpoint can need."""

    HEADERS = "headers"
    STATISTICS = "statistics"


@dataclass(frozen=True)
class Examined:
    """One checkpoint as its rules see it: the container and every tensor's measurements."""

    command: ClassVar[str] = "weights"
    Needs: ClassVar[type[StrEnum]] = Need

    checkpoint: Checkpoint
    tensors: tuple[TensorResult, ...]
    measured: frozenset[Need]

    @cached_property
    def by_name(self) -> Mapping[str, TensorResult]:
        """The tensors by name."""
        return {t.name: t for t in self.tensors}

    def document(self, name: str) -> Mapping[str, object]:
        """One of ``documents.DOCUMENTS`` beside the checkpoint, empty where there is none."""
        found = self.checkpoint.metadata.get(name)
        return found if isinstance(found, Mapping) else {}


def header_result(ref: TensorRef, role: Role, input_: str) -> TensorResult:
    """A tensor of which only the header was read."""
    return TensorResult(
        name=ref.name,
        input=input_,
        file=ref.file,
        dtype=ref.dtype,
        shape=ref.shape,
        numel=ref.numel,
        role=role,
    )


def tensor_result(measured: TensorProfile, role: Role, input_: str) -> TensorResult:
    """A tensor's profile as the report of a checkpoint shows it."""
    ref = measured.ref
    return TensorResult(
        name=ref.name,
        input=input_,
        file=ref.file,
        dtype=ref.dtype,
        shape=ref.shape,
        numel=ref.numel,
        role=role,
        statistics=measured.statistics,
        units=measured.units,
        outliers=_outliers(measured.outliers),
        numerics=measured.numerics,
        nonfinite=tuple(ElementResult(index=e.index, value=e.value) for e in measured.nonfinite),
        histogram=measured.sparkline,
        content_hash=measured.content_hash,
    )


def _outliers(found: Outliers | None) -> OutlierResult | None:
    if found is None:
        return None
    top = tuple(ElementResult(index=e.index, value=e.value, score=e.score) for e in found.top)
    return OutlierResult(
        counts=found.counts, peak_ratio=found.peak_ratio, scale=found.scale, top=top
    )
