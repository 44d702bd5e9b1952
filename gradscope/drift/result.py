"""The ``result`` of ``gradscope drift`` (contract.md §4), and what its rules read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, ClassVar, Literal

from gradscope.report.model import Fact, Number, Record, Report
from gradscope.report.severity import Severity
from gradscope.weights.roles import Role

if TYPE_CHECKING:
    from gradscope.drift.expectations import Expectations

#: ``rounding`` is explained by a cast alone, ``retyped`` holds the same values in another type,
#: ``replaced`` has nothing to do with the base. None where only headers were read.
Status = Literal[
    "identical", "rounding", "changed", "added", "removed", "reshaped", "retyped", "replaced"
]

#: Why a tensor changed.
Kind = Literal[
    "cast", "rounded", "quantised", "scaled", "low-rank", "permuted", "transposed", "reshaped",
    "re-initialised", "byte-swapped", "bit-flip", "zeroed", "from-zero", "pruned", "rows",
    "non-finite", "tied", "combined", "shifted", "misplaced",
]  # fmt: skip


#: What the whole of the new checkpoint can be expected to be.
Expected = Literal["identical", "merge", "quantised", "converted"]


class Explanation(Record):
    """Why a tensor changed, and what that leaves unexplained."""

    kind: Kind
    text: str
    #: ‖new − what the explanation predicts‖ / ‖new‖; 0 where it holds to the bit.
    residual: float | None = None
    #: ``left`` among them is what more than rounding leaves of it.
    facts: Mapping[str, Fact] = {}


class ElementChange(Record):
    """One element: its multi-index, and from what to what."""

    index: tuple[int, ...]
    base: Number
    new: Number


class Ulps(Record):
    """Distances between codes of one type, in units in the last place.

    ``counts`` has how many lie at 0 (-0 for 0 too), at 1, 2-3, 4-7, … by the first of each.
    """

    max: int
    counts: Mapping[str, int]


class RowChange(Record):
    """One row: ‖Δ‖ / ‖base‖ of it, None from zero."""

    row: int
    relative_drift: float | None
    changed_fraction: float


class Rows(Record):
    """Which slices along dimension 0 moved."""

    total: int
    changed: int
    #: Those that changed, as ranges: ``0-3, 7``.
    which: str
    #: The farthest ones.
    top: tuple[RowChange, ...]


class TensorDrift(Record):
    """One tensor of either checkpoint; what is undefined is None."""

    name: str
    #: The checkpoint that findings about it name: the new one, or the base of what was removed.
    input: str
    #: Its name in the base where that is another.
    base_name: str | None = None
    status: Status | None
    role: Role
    #: Whether training keeps it beside the model: an optimizer's state, an average.
    beside: bool = False
    base_dtype: str | None
    dtype: str | None
    base_shape: tuple[int, ...] | None
    shape: tuple[int, ...] | None
    numel: int
    relative_drift: float | None = None
    cosine: float | None = None
    norm_ratio: float | None = None
    mean_change: float | None = None
    rms_change: float | None = None
    max_abs_change: Number | None = None
    changed_fraction: float | None = None
    sign_flip_fraction: float | None = None
    ulps: Ulps | None = None
    #: Changed elements by |Δ| / |base|: ``2^-8`` counts those from 2^-8 to below 2^-7.
    relative_changes: Mapping[str, int] = {}
    largest: tuple[ElementChange, ...] = ()
    rows: Rows | None = None
    explanation: Explanation | None = None
    severity: Severity = Severity.INFO

    @property
    def subject(self) -> str:
        """What findings about it name."""
        return self.name

    @property
    def affected(self) -> bool:
        """Whether it differs by more than how it is stored."""
        return self.status not in (None, "identical", "rounding", "retyped")


class Merge(Record):
    """What became of a module that an adapter changes, against W + s B A (or DoRA's)."""

    module: str
    #: The weight that it changes; None where the checkpoint has none.
    name: str | None
    #: What the configuration asks for, and the factor that fits best.
    scale: float | None
    fitted_scale: float | None = None
    #: Cosine of the change and the product.
    cosine: float | None = None
    #: Root mean square and greatest of new − expected, in units in the last place of the greatest
    #: of base, change and new: what was rounded.
    residual_ulps: Number | None = None
    max_ulps: Number | None = None
    #: ‖new − expected‖ / ‖s B A‖.
    residual: float | None = None
    #: ⟨change, s B A⟩ / ‖s B A‖²; and of weights in codes, whose rounding hides all else, how far
    #: it may be from 1.
    share: float | None = None
    share_error: float | None = None
    unchanged: bool = False
    #: Why it could not be compared.
    reason: str | None = None


class LayerPath(Record):
    """One layer through a series of checkpoints, in shares of its norm in the first one."""

    layer_name: str
    numel: int
    #: ‖W − first‖ at each checkpoint, ‖W − the one before‖ from the second on, and the cosine of
    #: each step and the next (None where either is zero).
    distance: tuple[Number, ...]
    step_length: tuple[Number, ...]
    cosine: tuple[float | None, ...]
    #: The checkpoint after which it does not move any more, though it did.
    froze_after: str | None = None
    #: The first one that lies ten usual steps from the one before, or is not finite.
    jumped_at: str | None = None


class Series(Record):
    """The trajectory of every trained layer."""

    checkpoints: tuple[str, ...]
    layers: tuple[LayerPath, ...]


class Pooled(Record):
    """The elements of several tensors as one."""

    tensors: int
    identical: int
    numel: int
    relative_drift: float | None
    cosine: float | None
    changed_fraction: float | None


class DriftResult(Record):
    """What changed between two checkpoints."""

    tensors: tuple[TensorDrift, ...]
    #: Over the model's matched tensors: weighted by elements, and the greatest.
    mean_drift: float | None
    max_drift: float | None
    severity: Severity
    #: Modules any of whose tensors differ by more than how they are stored, in file order.
    affected_layers: tuple[str, ...]
    #: The model's tensors by status; what training keeps beside it is left out.
    counts: Mapping[str, int]
    by_role: Mapping[str, Pooled] = {}
    by_block: Mapping[str, Pooled] = {}
    merges: tuple[Merge, ...] = ()
    #: Where more than two checkpoints were given; all else is of the first and the last.
    series: Series | None = None
    notes: tuple[str, ...] = ()


DriftReport = Report[DriftResult]


class Need(StrEnum):
    """The kinds of facts that a rule about two checkpoints can need."""

    HEADERS = "headers"
    VALUES = "values"


@dataclass(frozen=True)
class Drifted:
    """Two checkpoints as the rules see them."""

    command: ClassVar[str] = "drift"
    Needs: ClassVar[type[StrEnum]] = Need

    #: Paths, as they were given.
    base: str
    new: str
    result: DriftResult
    measured: frozenset[Need]
    expected: Expectations
