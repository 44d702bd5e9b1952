"""The rows of the result: one tensor's drift, and several tensors' pooled."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from gradscope.checkpoints.tensors import TensorRef
from gradscope.drift import kernels
from gradscope.drift.measures import Change, Measures
from gradscope.drift.result import (
    ElementChange,
    Explanation,
    Pooled,
    RowChange,
    Rows,
    Status,
    TensorDrift,
    Ulps,
)
from gradscope.report.severity import Severity
from gradscope.text import runs
from gradscope.weights.roles import TRAINING, Role

#: Relative drift from which a change is low, medium, high (Minimal is info).
BANDS = ((1e-1, Severity.HIGH), (1e-2, Severity.MEDIUM), (1e-4, Severity.LOW))
#: Rows that are listed, and ranges of those that changed.
_TOP_ROWS, _RANGES = 10, 16

#: Explanations by which nothing of what the tensor computes was lost or learnt.
_HARMLESS = {
    "cast", "rounded", "permuted", "transposed", "reshaped", "quantised", "tied", "combined"
}  # fmt: skip
_DAMAGE = {"bit-flip", "byte-swapped", "zeroed", "non-finite"}


@dataclass(frozen=True, slots=True)
class Seen:
    """One tensor as it was found in both checkpoints."""

    base: TensorRef
    new: TensorRef
    role: Role
    #: Of tensors of one shape.
    measures: Measures | None = None
    explanation: Explanation | None = None
    #: How codes are laid out, where it was computed from codes.
    base_scheme: str | None = None
    new_scheme: str | None = None

    @property
    def base_type(self) -> str:
        """What the base stores."""
        return self.base_scheme or self.base.dtype

    @property
    def new_type(self) -> str:
        """What the new one stores."""
        return self.new_scheme or self.new.dtype


def severity_of(drift: float | None) -> Severity:
    """The band of a relative drift."""
    return next((s for limit, s in BANDS if drift is not None and drift >= limit), Severity.INFO)


def status(seen: Seen) -> Status | None:
    """What became of a tensor; None where only its header was read."""
    if seen.base.shape != seen.new.shape:
        return "reshaped"
    m, kind = seen.measures, seen.explanation.kind if seen.explanation is not None else None
    if m is None:
        return None if seen.base_type == seen.new_type else "retyped"
    if m.identical:
        return "identical" if seen.base_type == seen.new_type else "retyped"
    if kind == "rounded":
        return "rounding"
    return "replaced" if kind == "re-initialised" else "changed"


def drift_of(seen: Seen, input_: str) -> TensorDrift:
    """The row of a tensor that both have."""
    base, new = seen.base, seen.new
    found = TensorDrift(
        name=new.name,
        input=input_,
        base_name=base.name if base.name != new.name else None,
        status=status(seen),
        role=seen.role,
        beside=_beside(base, seen.role) or _beside(new, seen.role),
        base_dtype=seen.base_type,
        dtype=seen.new_type,
        base_shape=base.shape,
        shape=new.shape,
        numel=new.numel,
        explanation=seen.explanation,
        severity=_severity(seen),
    )
    return (
        found if seen.measures is None else found.model_copy(update=_measured(seen.measures, new))
    )


def alone(
    ref: TensorRef, role: Role, input_: str, kind: Status, scheme: str | None = None
) -> TensorDrift:
    """The row of a tensor that only one has; of codes with their ``scheme``."""
    added, stored = kind == "added", scheme or ref.dtype
    return TensorDrift(
        name=ref.name,
        input=input_,
        status=kind,
        role=role,
        beside=_beside(ref, role),
        base_dtype=None if added else stored,
        dtype=stored if added else None,
        base_shape=None if added else ref.shape,
        shape=ref.shape if added else None,
        numel=ref.numel,
    )


def _beside(ref: TensorRef, role: Role) -> bool:
    return ref.part != "model" or role in TRAINING


def _severity(seen: Seen) -> Severity:
    why = seen.explanation
    kind = why.kind if why is not None else None
    if seen.role in TRAINING:
        return Severity.INFO
    if why is not None and kind in _HARMLESS:
        return severity_of(float(why.facts.get("left", 0.0)))
    if kind in _DAMAGE or kind == "re-initialised":
        return Severity.HIGH
    return severity_of(seen.measures.relative_drift if seen.measures is not None else None)


def _measured(m: Measures, ref: TensorRef) -> dict[str, object]:
    finite = m.numel - max(m.counts[kernels.ODD_BASE], m.counts[kernels.ODD_NEW])
    return {
        "relative_drift": m.relative_drift,
        "cosine": m.cosine,
        "norm_ratio": m.norm_ratio,
        "mean_change": m.sums[kernels.CHANGES] / finite if finite else None,
        "rms_change": m.distance / math.sqrt(finite) if finite else None,
        "max_abs_change": (abs(m.largest[0].new - m.largest[0].base) if m.largest else 0.0)
        if m.numel
        else None,
        "changed_fraction": m.changed_fraction,
        "sign_flip_fraction": m.sign_flip_fraction,
        "ulps": _ulps(m),
        "relative_changes": dict(_relative_changes(m)),
        "largest": tuple(_element(change, ref) for change in m.largest),
        "rows": _rows(m),
    }


def _ulps(m: Measures) -> Ulps | None:
    if m.ulps is None:
        return None
    most, table = m.ulps
    names = ["0", *(str(1 << bits) for bits in range(len(table) - 1))]
    counts = {name: n for name, n in zip(names, table, strict=True) if n}
    return Ulps(max=most, counts=counts)


def _relative_changes(m: Measures) -> Iterator[tuple[str, int]]:
    for place, count in enumerate(m.octaves):
        if count:
            octave = f"2^{place + kernels.LEAST_OCTAVE}"
            yield "from zero" if place == kernels.OCTAVES else octave, count


def _element(change: Change, ref: TensorRef) -> ElementChange:
    parts = 2 if ref.dtype.startswith("C") else 1  # real and imaginary parts lie side by side
    place = np.unravel_index(change.place // parts, ref.shape)
    return ElementChange(index=tuple(map(int, place)), base=change.base, new=change.new)


def _rows(m: Measures) -> Rows | None:
    total = len(m.row_changed)
    if total < 2 or m.identical:
        return None
    changed = np.flatnonzero(m.row_changed)
    with np.errstate(divide="ignore", invalid="ignore"):
        drift = m.row_changes / m.row_norms
    order = np.lexsort((np.arange(total), -np.nan_to_num(drift, posinf=np.inf)))[:_TOP_ROWS]
    width = m.numel / total
    return Rows(
        total=total,
        changed=len(changed),
        which=runs(map(int, changed), len(changed), _RANGES),
        top=tuple(
            RowChange(
                row=int(row),
                relative_drift=float(drift[row]) if np.isfinite(drift[row]) else None,
                changed_fraction=float(m.row_changed[row] / width),
            )
            for row in order
            if m.row_changed[row]
        ),
    )


# -- several tensors -------------------------------------------------------------------------------


def pooled(found: Sequence[Measures]) -> Pooled:
    """The elements of several tensors of one shape each as one."""
    numel = sum(m.numel for m in found)
    a, b, ab, d = (
        math.fsum(m.sums[place] for m in found)
        for place in (
            kernels.SQUARES_BASE,
            kernels.SQUARES_NEW,
            kernels.PRODUCTS,
            kernels.SQUARES_CHANGE,
        )
    )
    return Pooled(
        tensors=len(found),
        identical=sum(m.identical for m in found),
        numel=numel,
        relative_drift=_finite(math.sqrt(d / a)) if a else None,
        cosine=_finite(max(-1.0, min(1.0, ab / math.sqrt(a) / math.sqrt(b)))) if a and b else None,
        changed_fraction=sum(m.changed for m in found) / numel if numel else None,
    )


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def pools(found: Iterable[tuple[str, Measures]]) -> dict[str, Pooled]:
    """The same by name, in order of appearance."""
    groups: dict[str, list[Measures]] = {}
    for name, one in found:
        groups.setdefault(name, []).append(one)
    return {name: pooled(group) for name, group in groups.items()}


def module_of(name: str) -> str:
    """The module that a parameter is of."""
    return name.rpartition(".")[0] or name
