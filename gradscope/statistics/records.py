"""What is measured of one tensor, as plain records. Importing them costs no numerical library."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from gradscope.checkpoints.tensors import TensorRef


@dataclass(frozen=True, slots=True)
class Statistics:
    """The statistics of contract.md §4 of one tensor or of several pooled; None is undefined."""

    count: int = 0
    nan_count: int = 0
    posinf_count: int = 0
    neginf_count: int = 0
    zero_count: int = 0
    zero_fraction: float | None = None
    subnormal_count: int = 0
    min: float | int | None = None
    max: float | int | None = None
    abs_max: float | int | None = None
    mean: float | None = None
    std: float | None = None
    rms: float | None = None
    l2_norm: float | None = None
    skewness: float | None = None
    kurtosis: float | None = None
    trimmed_kurtosis: float | None = None
    trimmed_skewness: float | None = None
    median: float | None = None
    mad: float | None = None
    entropy_bits: float | None = None
    negentropy_bits: float | None = None
    quantiles: Mapping[str, float] | None = None

    @property
    def finite_count(self) -> int:
        """Elements that are neither NaN nor infinite."""
        return self.count - self.nan_count - self.posinf_count - self.neginf_count


@dataclass(frozen=True, slots=True)
class Element:
    """One element: its multi-index, its value, and its robust score where it has one."""

    index: tuple[int, ...]
    value: float
    score: float | None = None


@dataclass(frozen=True, slots=True)
class Outliers:
    """Elements far from the median, in units of ``scale``, a robust standard deviation."""

    counts: Mapping[str, int]
    peak_ratio: float | None
    scale: float
    top: tuple[Element, ...]


@dataclass(frozen=True, slots=True)
class UnitPart:
    """Units of a tensor that are judged by themselves: a fused projection, a gate, an expert.

    Units are counted within the part. ``norm`` is that of all its elements; ``content_hash`` is
    equal for parts of a tensor, and for tensors of the part's shape, whose elements are equal.
    """

    name: str
    rows: int
    dead_rows: int
    dead: tuple[int, ...]
    duplicate_rows: int
    reference: float
    norm: float
    content_hash: str | None
    #: How many attention heads it has, where that is known, and which of them are dead whole.
    heads: int | None = None
    dead_heads: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Units:
    """The output units, filters or tokens: the slices along ``axis``, as a rule dimension 0.

    Where matrices are stacked, the units of all of them one after another.
    """

    rows: int
    dead_rows: int
    dead: tuple[int, ...]
    duplicate_rows: int
    duplicates: tuple[tuple[int, int], ...]
    norm_min: float
    norm_median: float
    norm_max: float
    #: The norm that dead ones are told by: they have less than a thousandth.
    reference: float
    axis: int = 0
    parts: tuple[UnitPart, ...] | None = None
    #: As of a part, where there are none.
    heads: int | None = None
    dead_heads: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class TableRows:
    """Ids of the rows of a table that look untrained, ascending; no id is in two of them."""

    near_zero: tuple[int, ...] = ()
    repeated: tuple[int, ...] = ()
    #: Near-equal rows of ordinary norm: training moved them together, it never saw them apart.
    together: tuple[int, ...] = ()
    #: Their median distance from their centre, over that of the other rows; None without any.
    spread: float | None = None

    @property
    def all(self) -> tuple[int, ...]:
        """All of them, ascending."""
        return tuple(sorted((*self.near_zero, *self.repeated, *self.together)))


@dataclass(frozen=True, slots=True)
class CodeUse:
    """Which codes of a codebook are not in use, ascending, and what told so."""

    codes: int
    unused: tuple[int, ...]
    told: str


@dataclass(frozen=True, slots=True)
class Numerics:
    """How the values sit in their type."""

    #: Doublings left between the greatest magnitude and the type's greatest finite value.
    headroom_bits: float | None
    #: Share of elements at the type's greatest finite magnitude (8- and 16-bit floats).
    saturated_fraction: float | None
    #: The narrower type all elements fit without loss.
    payload: str | None
    #: Distinct stored values (8- and 16-bit types).
    distinct: int | None


@dataclass(frozen=True, slots=True)
class TensorProfile:
    """Everything measured of one tensor; there is no data behind it."""

    ref: TensorRef
    statistics: Statistics
    units: Units | None = None
    outliers: Outliers | None = None
    numerics: Numerics | None = None
    nonfinite: tuple[Element, ...] = ()
    #: Why its infinities are meant, where their pattern tells: see ``statistics.infinity``.
    infinity: str | None = None
    sparkline: tuple[int, ...] = ()
    content_hash: str | None = None
