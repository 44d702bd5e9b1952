"""Gradients themselves, measured exactly: one layer after another, two records in memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradscope.checkpoints.tensors import TensorRef
from gradscope.checkpoints.tiles import PIECE, read_range
from gradscope.errors import InputError
from gradscope.histories.history import Exact, Layer, Sketches, Status
from gradscope.histories.names import guessed_kind
from gradscope.histories.sketching import WIDTH, seed_of, sketch
from gradscope.statistics.codings import CODED, code_values, is_float
from gradscope.text import quoted

Values = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Slice:
    """Elements ``start`` to ``stop`` of a stored tensor: all of it, or one record of a stack."""

    ref: TensorRef
    start: int
    stop: int
    #: Of one gradient.
    shape: tuple[int, ...]

    @classmethod
    def whole(cls, ref: TensorRef) -> Slice:
        """All of a tensor."""
        return cls(ref, 0, ref.numel, ref.shape)

    @classmethod
    def record(cls, ref: TensorRef, t: int) -> Slice:
        """Entry ``t`` along dimension 0."""
        return cls(ref, t * ref.row_numel, (t + 1) * ref.row_numel, ref.shape[1:])

    @property
    def numel(self) -> int:
        """Number of elements."""
        return self.stop - self.start


#: step -> name -> gradient.
Keyed = dict[int, dict[str, Slice]]


def values_of(where: Slice) -> Values:
    """The elements as float64, flat. Raises InputError if they are complex."""
    if where.ref.dtype in ("C64", "C128"):
        raise InputError(
            where.ref.file,
            "unsupported",
            f"{quoted(where.ref.name)} is complex: only real gradients are read",
        )
    out = np.empty(where.numel)
    for first in range(where.start, where.stop, PIECE):
        last = min(first + PIECE, where.stop)
        out[first - where.start : last - where.start] = _decoded(where.ref, first, last)
    return out


def _decoded(ref: TensorRef, start: int, stop: int) -> NDArray[Any]:
    stored = read_range(ref, start, stop)
    if ref.dtype in CODED and is_float(ref.dtype):
        return np.asarray(code_values(ref.dtype)[stored.astype(np.int64)])
    return stored


def measure(records: Sequence[Mapping[str, Slice]], names: Sequence[str]) -> dict[str, Any]:
    """The fields of a history that gradients give, by record and name."""
    count = len(records)
    tables = {name: np.full((count, len(names)), np.nan) for name in _FACTS}
    status = np.zeros((count, len(names)), np.uint8)
    sketches = np.zeros((count, len(names), WIDTH), np.float32)
    cosine = np.full((count, len(names)), np.nan)
    lag = np.zeros((count, len(names)), np.int64)
    layers = []
    for row, name in enumerate(names):
        before: tuple[int, Values] | None = None
        found = [(t, record[name]) for t, record in enumerate(records) if name in record]
        last = found[-1][1] if found else None
        layers.append(
            Layer(name, guessed_kind(name, last.shape), last.numel) if last else Layer(name)
        )
        for t, where in found:
            status[t, row] = Status.RECORDED
            values = values_of(where)
            facts = measured(values)
            for fact, value in facts.items():
                tables[fact][t, row] = value
            if not 0 < facts["l2"] < np.inf:
                before = None
                continue
            unit = values / facts["l2"]
            sketches[t, row] = sketch(unit, seed=seed_of(name))
            if before is not None and before[1].size == unit.size:
                cosine[t, row] = np.clip(unit @ before[1], -1, 1)
                lag[t, row] = t - before[0]
            before = t, unit
    counts = {n: np.nan_to_num(tables.pop(n), nan=-1).astype(np.int64) for n in ("n_nan", "n_inf")}
    return {
        **tables,
        **counts,
        "layers": tuple(layers),
        "status": status,
        "sketches": Sketches(sketches, np.arange(count)),
        "exact": Exact(cosine, lag),
    }


_FACTS = ("l2", "max_abs", "mean_abs", "mean", "zero_fraction", "n_nan", "n_inf")


def measured(values: Values) -> dict[str, float]:
    """The statistics of one gradient; moments over finite elements, none overflows on the way."""
    finite = values[np.isfinite(values)]
    clean = len(finite) == len(values)
    size = np.abs(finite)
    top = float(size.max(initial=0.0))
    scaled, unit = (finite / top, size / top) if top > 0 else (finite, size)
    infinite = bool(np.isinf(values).any())
    with np.errstate(over="ignore"):
        norm = float(top * np.sqrt(scaled @ scaled))
    return {
        "l2": norm if clean else np.inf if infinite and not np.isnan(values).any() else np.nan,
        "max_abs": top if clean else np.inf if infinite else np.nan,
        "mean_abs": float(unit.mean()) * (top or 1.0) if len(finite) else np.nan,
        "mean": float(scaled.mean()) * (top or 1.0) if len(finite) else np.nan,
        "zero_fraction": float((values == 0).mean()) if len(values) else np.nan,
        "n_nan": float(np.isnan(values).sum()),
        "n_inf": float(np.isinf(values).sum()),
    }
