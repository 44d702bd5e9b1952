"""Histories in files of plain arrays: norms by name, or the gradients themselves.

npz, safetensors and torch files are listed by ``gradscope.checkpoints``, so nothing is executed,
and read one tensor at a time. Gradients are found as ``step/name``, ``name/step`` (``step_12``,
``12``, ``[12]``), or as one array ``name -> [T, …]``; everything is then computed exactly.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from gradscope.checkpoints.open import open_checkpoint
from gradscope.checkpoints.sniff import sniff
from gradscope.checkpoints.statedict import WHOLE
from gradscope.checkpoints.tensors import Checkpoint, TensorRef
from gradscope.checkpoints.tiles import read_range
from gradscope.errors import InputError, UsageError
from gradscope.histories.history import Exact, History, Kind, Layer, Sketches, Status
from gradscope.histories.sketching import WIDTH, seed_of, sketch
from gradscope.histories.steps import ordered
from gradscope.statistics.codings import CODED, code_values, is_float

As = Literal["norms", "vectors"]
Values = NDArray[np.float64]

_STEPS = ("steps", "step", "iterations", "global_step")
_STEP = re.compile(r"^(?:\[)?(?:(?:global_)?(?:step|iter|iteration|it|t)s?[_=-]?)?(\d+)\]?$", re.I)
_BY_RECORD = {
    "loss": "loss",
    "lr": "lr",
    "learning_rate": "lr",
    "total_l2": "total_l2",
    "grad_norm": "total_l2",
}


def read_arrays(path: str, as_: As | None = None) -> History:
    """A history from a file of arrays. Raises InputError, and UsageError when ``as_`` is needed."""
    torch_file = sniff(path) in ("zip-torch", "torch-legacy")
    checkpoint = open_checkpoint(path, WHOLE if torch_file else None)
    refs = {ref.name: ref for ref in checkpoint.tensors}
    keyed = _keyed(refs, (*MARKS, ".") if torch_file else MARKS)
    if keyed and as_ != "norms":
        return _of_gradients(
            checkpoint, keyed, list(dict.fromkeys(n for s in keyed.values() for n in s))
        )
    rest = {n: r for n, r in refs.items() if n not in _STEPS and n not in _BY_RECORD}
    if not rest:
        raise InputError(path, "malformed", "holds no array of gradients or norms")
    if as_ == "vectors":
        return _of_gradients(checkpoint, _stacked(path, rest), list(rest))
    if as_ == "norms" or _are_norms(refs, rest):
        return _of_norms(checkpoint, refs, rest)
    raise _ambiguous(path, rest)


def _are_norms(refs: Mapping[str, TensorRef], rest: Mapping[str, TensorRef]) -> bool:
    """One value a step for every name, and steps to match: nothing else looks so."""
    steps = next((refs[name] for name in _STEPS if name in refs), None)
    return steps is not None and all(ref.shape == steps.shape for ref in rest.values())


def _ambiguous(path: str, rest: Mapping[str, TensorRef]) -> UsageError:
    name, ref = next(iter(rest.items()))
    return UsageError(
        f"{path}: {name!r} of shape {list(ref.shape)} may hold one norm a step or gradients; "
        "say which with --as norms or --as vectors"
    )


def _values(ref: TensorRef) -> Values:
    """A tensor's elements as float64, flat."""
    stored = read_range(ref, 0, ref.numel)
    if ref.dtype in CODED and is_float(ref.dtype):
        return code_values(ref.dtype)[stored.astype(np.int64)]
    if stored.dtype.kind == "c":
        raise InputError(ref.file, "unsupported", f"{ref.name} is complex")
    return stored.astype(np.float64)


# --- norms ----------------------------------------------------------------------------------------


def _of_norms(
    checkpoint: Checkpoint, refs: Mapping[str, TensorRef], rest: Mapping[str, TensorRef]
) -> History:
    counts = {ref.numel for ref in rest.values()}
    wrong = next((r for r in rest.values() if len([n for n in r.shape if n != 1]) > 1), None)
    if len(counts) > 1 or wrong is not None:
        bad = wrong or next(iter(rest.values()))
        message = (
            f"{bad.name} has shape {list(bad.shape)}: norms are one number a step, as "
            "many for every name"
        )
        raise InputError(checkpoint.path, "malformed", message)
    norms = np.stack([_values(ref) for ref in rest.values()], axis=1)
    steps, notes = _steps(checkpoint.path, refs, len(norms))
    chosen, more = ordered(steps)
    extra: dict[str, Any] = {}
    for name, target in _BY_RECORD.items():
        if name in refs and refs[name].numel == len(norms):
            values = _values(refs[name])[chosen]
            extra[target] = values[:, None] if target == "lr" else values
    return History(
        path=checkpoint.path,
        format=f"{checkpoint.format} of norms",
        nbytes=checkpoint.nbytes,
        steps=steps[chosen],
        layers=tuple(Layer(name, guessed_kind(name)) for name in rest),
        l2=norms[chosen],
        status=np.full(norms[chosen].shape, Status.RECORDED, np.uint8),
        notes=(*checkpoint.notes, *notes, *more, "arrays were taken as L2 norms, one a step"),
        skipped_parts=tuple((s.subject, s.reason) for s in checkpoint.skipped),
        failures=checkpoint.failures,
        **extra,
    )


def _steps(
    path: str, refs: Mapping[str, TensorRef], count: int
) -> tuple[NDArray[np.int64], list[str]]:
    name = next((name for name in _STEPS if name in refs), None)
    if name is None:
        return np.arange(count), ["no steps in the file: records are numbered from 0"]
    values = _values(refs[name])
    if len(values) != count:
        message = f"{name} has {len(values)} entries for {count} records"
        raise InputError(path, "malformed", message)
    if not np.isfinite(values).all():
        raise InputError(path, "malformed", f"{name} has entries that are no numbers")
    return values.astype(np.int64), []


def guessed_kind(name: str) -> Kind:
    """What a parameter is by its name, for files that do not say."""
    lowered = name.lower()
    if lowered.endswith(("bias", ".beta")) or ".bias_" in lowered:
        return "bias"
    if re.search(r"(norm|\bbn|\.bn|ln_|_ln|layernorm)", lowered):
        return "norm"
    return "embedding" if re.search(r"(embed|wte|wpe)", lowered) else "other"


# --- gradients ------------------------------------------------------------------------------------

_Where = tuple[TensorRef, int, int]
_Keyed = dict[int, dict[str, _Where]]


MARKS = ("/", ":")


def _split(key: str, marks: Sequence[str]) -> tuple[int, str] | None:
    """The step and the name of ``step/name`` or ``name/step``; ``step.name`` of a torch list."""
    for mark in marks:
        first, _, rest = key.partition(mark)
        if rest and (found := _STEP.match(first)):
            return int(found[1]), rest
        rest, _, last = key.rpartition(mark)
        if mark != "." and rest and (found := _STEP.match(last)):
            return int(found[1]), rest
    return None


def _keyed(refs: Mapping[str, TensorRef], marks: Sequence[str]) -> _Keyed:
    """Gradients by step and name; nothing unless every key has both.

    Dots are also in names (``0.weight``), so there steps must be as many as they count up to.
    """
    table: _Keyed = {}
    for key, ref in refs.items():
        found = _split(key, marks)
        if found is None:
            return {}
        table.setdefault(found[0], {})[found[1]] = (ref, 0, ref.numel)
    dotted = not any(mark in key for key in refs for mark in MARKS)
    return {} if dotted and len(table) <= max(table, default=0) else table


def _stacked(path: str, rest: Mapping[str, TensorRef]) -> _Keyed:
    """``name -> [T, …]``: step t is slice t of every array."""
    lengths = {ref.shape[0] if ref.shape else 0 for ref in rest.values()}
    if len(lengths) != 1:
        message = (
            f"arrays have {sorted(lengths)} entries along their first dimension, "
            "which must be one record each"
        )
        raise InputError(path, "malformed", message)
    return {
        t: {n: (r, t * r.row_numel, (t + 1) * r.row_numel) for n, r in rest.items()}
        for t in range(lengths.pop())
    }


def _of_gradients(checkpoint: Checkpoint, table: _Keyed, names: Sequence[str]) -> History:
    """Everything of every gradient, one at a time; two of a layer are in memory for its cosine."""
    steps = np.array(sorted(table), dtype=np.int64)
    found = {name: _Row(name) for name in names}
    for t, step in enumerate(steps.tolist()):
        for name, row in found.items():
            row.add(t, _gradient(table[step].get(name)))
    rows = list(found.values())
    return History(
        path=checkpoint.path,
        format=f"{checkpoint.format} of gradients",
        nbytes=checkpoint.nbytes,
        steps=steps,
        layers=tuple(Layer(r.name, _kind(r), r.numel) for r in rows),
        l2=_table(rows, "l2", len(steps)),
        status=np.array([r.status for r in rows], np.uint8).T.reshape(len(steps), len(rows)),
        max_abs=_table(rows, "max_abs", len(steps)),
        mean_abs=_table(rows, "mean_abs", len(steps)),
        mean=_table(rows, "mean", len(steps)),
        zero_fraction=_table(rows, "zero_fraction", len(steps)),
        n_nan=_table(rows, "n_nan", len(steps), -1).astype(np.int64),
        n_inf=_table(rows, "n_inf", len(steps), -1).astype(np.int64),
        sketches=_sketches(rows, len(steps)),
        exact=_exact(rows, len(steps)),
        notes=checkpoint.notes,
        skipped_parts=tuple((s.subject, s.reason) for s in checkpoint.skipped),
        failures=checkpoint.failures,
    )


def _gradient(where: _Where | None) -> tuple[tuple[int, ...], Values] | None:
    if where is None:
        return None
    ref, start, stop = where
    whole = stop - start == ref.numel
    values = _values(ref) if whole else _slice(ref, start, stop)
    return (ref.shape if whole else ref.shape[1:]), values


def _slice(ref: TensorRef, start: int, stop: int) -> Values:
    stored = read_range(ref, start, stop)
    if ref.dtype in CODED and is_float(ref.dtype):
        return code_values(ref.dtype)[stored.astype(np.int64)]
    return stored.astype(np.float64)


@dataclass(slots=True)
class _Row:
    """One parameter's gradients, measured as they come."""

    name: str
    numel: int | None = None
    dims: int = 0
    status: list[int] = field(default_factory=list)
    facts: dict[int, dict[str, float]] = field(default_factory=dict)
    sketches: dict[int, Values] = field(default_factory=dict)
    cosines: dict[int, tuple[float, int]] = field(default_factory=dict)
    before: tuple[int, Values] | None = None

    def add(self, t: int, found: tuple[tuple[int, ...], Values] | None) -> None:
        """Measure record ``t``."""
        self.status.append(Status.NOT_RECORDED if found is None else Status.RECORDED)
        if found is None:
            return
        shape, values = found
        self.numel, self.dims = values.size, len(shape)
        self.facts[t] = measured(values)
        norm = self.facts[t]["l2"]
        if not 0 < norm < np.inf:
            self.before = None
            return
        unit = values / norm
        self.sketches[t] = sketch(unit, seed=seed_of(self.name))
        if self.before is not None and self.before[1].size == unit.size:
            self.cosines[t] = float(np.clip(unit @ self.before[1], -1, 1)), t - self.before[0]
        self.before = (t, unit)


def measured(values: Values) -> dict[str, float]:
    """The statistics of one gradient; moments over finite elements, L2 safe from overflow."""
    finite = values[np.isfinite(values)]
    clean = len(finite) == len(values)
    top = float(np.abs(finite).max(initial=0.0))
    with np.errstate(over="ignore"):
        norm = top * float(np.sqrt(((finite / top) ** 2).sum())) if top > 0 else 0.0
    infinite = bool(np.isinf(values).any())
    return {
        "l2": norm if clean else np.inf if infinite and not np.isnan(values).any() else np.nan,
        "max_abs": top if clean else np.inf if infinite else np.nan,
        "mean_abs": float(np.abs(finite).mean()) if len(finite) else np.nan,
        "mean": float(finite.mean()) if len(finite) else np.nan,
        "zero_fraction": float((values == 0).mean()) if len(values) else np.nan,
        "n_nan": float(np.isnan(values).sum()),
        "n_inf": float(np.isinf(values).sum()),
    }


def _kind(row: _Row) -> Kind:
    guess = guessed_kind(row.name)
    if guess != "other":
        return guess
    return "conv" if row.dims > 2 else "matrix" if row.dims == 2 else "bias"


def _table(rows: Sequence[_Row], name: str, records: int, absent: float = np.nan) -> Values:
    out = np.full((records, len(rows)), absent)
    for column, row in enumerate(rows):
        for t, facts in row.facts.items():
            out[t, column] = facts[name]
    return out


def _sketches(rows: Sequence[_Row], records: int) -> Sketches:
    values = np.zeros((records, len(rows), WIDTH), np.float32)
    for column, row in enumerate(rows):
        for t, found in row.sketches.items():
            values[t, column] = found
    return Sketches(values, np.arange(records))


def _exact(rows: Sequence[_Row], records: int) -> Exact:
    cosine, lag = np.full((records, len(rows)), np.nan), np.zeros((records, len(rows)), np.int64)
    for column, row in enumerate(rows):
        for t, (value, distance) in row.cosines.items():
            cosine[t, column], lag[t, column] = value, distance
    return Exact(cosine, lag)
