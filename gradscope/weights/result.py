"""The ``result`` of ``gradscope weights`` (contract.md §4), and what its rules read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar, Literal

from gradscope.checkpoints.tensors import Checkpoint, TensorRef
from gradscope.quantization.weights import Quantization, QuantizedWeight
from gradscope.report.model import Number, Record, Report, Skip
from gradscope.statistics.records import (
    CodeUse,
    Numerics,
    Outliers,
    Statistics,
    TableRows,
    TensorProfile,
    Units,
)
from gradscope.weights.adapters import Adapter, adapters
from gradscope.weights.roles import Role

if TYPE_CHECKING:
    from gradscope.weights.experts import Judged

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


class Dequantized(Record):
    """How a quantised weight is stored. Its statistics are those of the values it stands for."""

    scheme: str
    #: Of the codes; the tensor's ``shape`` is that of the values.
    stored_shape: tuple[int, ...]
    #: Elements of its largest grid of scales.
    scales: int
    #: Bits of a code, where they are known.
    bits: int | None = None

    @classmethod
    def of(cls, weight: QuantizedWeight) -> Dequantized:
        """As its codes and their scales say."""
        return cls(
            scheme=weight.scheme,
            stored_shape=weight.codes.shape,
            scales=weight.scales,
            bits=weight.bits,
        )


class AttentionResult(Record):
    """The logits of the heads of one attention whose heads are known: qᵀk / √size, or by what
    else the model multiplies them, before positions are added.

    What rests on a norm, of the input or of queries and keys, is None where none is known.
    """

    input: str
    module: str
    #: Of the queries; that of the keys and of the values may be the same.
    tensor: str
    key_tensor: str
    value_tensor: str | None
    dtype: str
    heads: int
    key_heads: int
    head_size: int
    #: Of each head: σ₁(W_qᵀ W_k) / √size, and the effective rank of that product.
    qk_norms: tuple[float, ...]
    effective_ranks: tuple[float, ...]
    #: Effective ranks of the rows of each head; of keys and values, of as many as there are.
    query_ranks: tuple[float, ...]
    key_ranks: tuple[float, ...]
    value_ranks: tuple[float, ...] | None
    #: The effective rank of a random matrix of the shape of a head.
    random_rank: float
    #: The deviation of logits of independent inputs of unit variance, and what none exceeds.
    logit_rms: tuple[float, ...] | None
    logit_bounds: tuple[float, ...] | None


class CastResult(Record):
    """What casting a tensor to a type costs; None is undefined (a tensor of zeros)."""

    format: str
    #: What shares a scale: nothing has one (plain), a tensor, a row (output unit), a block.
    scale: Literal["plain", "tensor", "row", "block"]
    #: With its scales.
    bytes: int
    #: Finite elements that become infinite or NaN, and elements other than zero that become zero.
    overflow_count: int
    underflow_count: int
    #: ‖cast − x‖ / ‖x‖, the same in decibels, and the greatest difference, of what does not
    #: overflow.
    relative_error: float | None
    snr_db: Number | None
    #: Without the elements beyond the 99.9 % quantile, whose size may hide that others are lost.
    bulk_snr_db: Number | None
    max_abs_error: float


class CastSummary(Record):
    """What casting every tensor that is cast to a type costs and saves."""

    format: str
    tensors: int
    #: Of all tensors of the model, with what is not cast as it is stored.
    bytes: int
    saved_fraction: float
    overflow_count: int
    underflow_count: int
    snr_db: Number | None
    #: The tensor that loses most, by the lower of its ratios; one that overflows, and then has
    #: none, before any other.
    worst_tensor: str | None
    worst_snr_db: Number | None
    #: Tensors below the wanted signal to noise; None where none was wanted.
    below: int | None


class KeptColumns(Record):
    """A smaller format that would serve if a few columns (inputs of all units) stayed as stored."""

    format: str
    columns: tuple[int, ...]
    #: With its scales, and the columns as they are stored.
    bytes: int
    #: The lower signal to noise of all elements and of the bulk, with the columns kept and cast.
    snr_db: float
    cast_snr_db: float


class KeptExperts(Record):
    """A smaller format that would serve if a few experts of a stack stayed as stored.

    ``snr_db`` is that of the worst of the others, ``cast_snr_db`` of the worst of all.
    """

    format: str
    experts: tuple[int, ...]
    #: With its scales, and the experts as they are stored.
    bytes: int
    snr_db: float
    cast_snr_db: float


class CastPlan(Record):
    """The smallest format of each tensor that keeps the wanted signal to noise."""

    snr_db: float
    bytes: int
    saved_fraction: float
    #: By format, how many tensors take it; ``kept`` names those that none serves.
    tensors: Mapping[str, int]
    kept: tuple[str, ...]
    #: Layers and experts that need more than most of their like, with what they take (None: kept).
    exceptions: Mapping[str, str | None]


class Casting(Record):
    """What ``--cast`` found."""

    stored_bytes: int
    formats: tuple[CastSummary, ...]
    plan: CastPlan | None = None


class SpectrumResult(Record):
    """Singular values: of a convolution those of the matrix [out, in · kernel], of stacked experts
    the greatest norm and the least ranks of all of them.

    What rests on all singular values is None where only the greatest was computed, or undefined.
    """

    spectral_norm: float
    #: ‖W‖²_F over the squared spectral norm, and exp of the entropy of the singular values' shares.
    stable_rank: float | None
    effective_rank: float | None = None
    #: Exponent of the eigenvalues' tail as weightwatcher fits it; None where the fit fails.
    alpha: float | None = None
    alpha_tail_count: int | None = None
    alpha_xmin: float | None = None
    alpha_distance: float | None = None
    alpha_p_value: float | None = None
    #: Whether the tail is long enough, and not ruled out by the p-value where there is one.
    alpha_reliable: bool | None = None
    #: Where the singular values of a random matrix of the bulk's scale would end, how many are
    #: beyond, and the distance of Kolmogorov and Smirnov to such a matrix of the same norm.
    mp_edge: float | None = None
    spikes: int | None = None
    mp_distance: float | None = None
    #: Of a convolution as the linear map that it is.
    operator_norm: float | None = None
    #: Of each stacked expert.
    experts: tuple[SpectrumResult, ...] = ()


class TensorResult(Record):
    """One tensor. ``statistics`` and what rests on them are None when only headers were read,
    and of packed codes that could not be turned into values.
    """

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
    #: The pattern by which its infinities are meant: a mask, triangle, ramp or empty state.
    infinity: str | None = None
    histogram: tuple[int, ...] = ()
    content_hash: str | None = None
    spectrum: SpectrumResult | None = None
    #: What ``--cast`` found, in the order asked, and the format of the plan; None keeps it.
    casts: tuple[CastResult, ...] = ()
    cast_plan: str | None = None
    kept_columns: KeptColumns | None = None
    kept_experts: KeptExperts | None = None
    dequantized: Dequantized | None = None
    health: Health | None = None

    @property
    def subject(self) -> str:
        """What findings about it name."""
        return self.name

    @property
    def unit_numel(self) -> int:
        """Elements of one unit."""
        return self.numel // self.units.rows if self.units is not None else 0


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


class AdapterResult(Record):
    """What the adapter of one module amounts to; None where it was not measured."""

    input: str
    module: str
    method: str
    #: What it pays for, and exp(H(σ/Σσ)) of the product B A: what it uses.
    rank: int | None
    effective_rank: float | None = None
    #: What the product is multiplied by, and its Frobenius norm before that.
    scale: float | None
    norm: float | None = None


@dataclass(frozen=True, slots=True)
class IndexResult:
    """A table of indices that does not hold what it must."""

    name: str
    wrong: int
    fractions: int
    #: Elements that repeat another; 0 where a table may repeat itself.
    repeats: int
    #: The first wrong element: where, what it is, and what it should be if that is known.
    first: tuple[int, ...]
    value: float
    wanted: float | None


class WeightsResult(Record):
    """The result of one run over one or more checkpoints."""

    tensors: tuple[TensorResult, ...]
    overall: Overall
    health: Health | None
    notes: tuple[str, ...] = ()
    adapters: tuple[AdapterResult, ...] = ()
    casting: Casting | None = None
    attention: tuple[AttentionResult, ...] = ()


WeightsReport = Report[WeightsResult]


class Need(StrEnum):
    """The kinds of facts that a rule about a checkpoint can need."""

    HEADERS = "headers"
    #: What rules need that look at one tensor at a time, so that a part of them can be judged.
    TENSOR = "statistics of each tensor"
    STATISTICS = "statistics"
    SPECTRA = "whole spectra (--spectral)"


@dataclass(frozen=True, slots=True)
class Masters:
    """What the master weights were found to be."""

    #: How many could be compared: those of the size of a 16-bit tensor of the model.
    compared: int
    #: Names of those that are no tensor of the model once they are rounded.
    astray: tuple[str, ...]


@dataclass(frozen=True)
class Examined:
    """One checkpoint as its rules see it: the container and every tensor's measurements.

    Where several jobs share it, each fact travels in ``parts.Found``; ``joining`` unites them.
    """

    command: ClassVar[str] = "weights"
    Needs: ClassVar[type[StrEnum]] = Need

    checkpoint: Checkpoint
    tensors: tuple[TensorResult, ...]
    measured: frozenset[Need]
    #: By name, the rows of tables that look untrained; tables without any are left out.
    tables: Mapping[str, TableRows] = field(default_factory=dict)
    #: The codebooks of each table of codes.
    codebooks: Mapping[str, tuple[CodeUse, ...]] = field(default_factory=dict)
    #: Names of token ids, where a table needs them and a tokenizer lies beside the checkpoint.
    tokens: Mapping[int, str] = field(default_factory=dict)
    quantization: Quantization = field(default_factory=Quantization)
    #: Of quantised weights, by the name of their codes: the share of codes that are not zero and
    #: have a scale of zero.
    lost: Mapping[str, float] = field(default_factory=dict)
    #: None where there are no master weights.
    masters: Masters | None = None
    adapters: tuple[AdapterResult, ...] = ()
    #: The tables of indices that are wrong.
    indices: tuple[IndexResult, ...] = ()
    #: What its attention can come to, with spectra.
    attention: tuple[AttentionResult, ...] = ()
    #: What was asked for of its tensors and there was no time for.
    left_out: tuple[Skip, ...] = ()

    @cached_property
    def by_name(self) -> Mapping[str, TensorResult]:
        """The tensors by name."""
        return {t.name: t for t in self.tensors}

    @cached_property
    def experts(self) -> Judged:
        """The experts, and which of them are dead or copies."""
        from gradscope.weights.experts import Judged

        return Judged.of(self)

    @cached_property
    def adapted(self) -> tuple[Adapter, ...]:
        """Which of its tensors are the factors of which module's adapter."""
        return adapters(self.tensors)

    def document(self, name: str) -> Mapping[str, object]:
        """One of ``documents.DOCUMENTS`` beside the checkpoint, empty where there is none."""
        found = self.checkpoint.metadata.get(name)
        return found if isinstance(found, Mapping) else {}


def header_result(
    ref: TensorRef, role: Role, input_: str, weight: QuantizedWeight | None = None
) -> TensorResult:
    """A tensor of which only the header was read, and the quantised weight that it is."""
    return TensorResult(
        name=ref.name,
        input=input_,
        file=ref.file,
        dtype=ref.dtype,
        shape=ref.shape if weight is None else weight.shape,
        numel=ref.numel if weight is None else math.prod(weight.shape),
        role=role,
        dequantized=None if weight is None else Dequantized.of(weight),
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
        infinity=measured.infinity,
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
