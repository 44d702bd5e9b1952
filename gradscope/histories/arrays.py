"""Histories in files of plain arrays: norms by name, or the gradients themselves.

npz, safetensors and torch files are listed by ``gradscope.checkpoints``, so nothing is executed,
and read one tensor at a time. Gradients are found as ``step/name``, ``name/step`` (``step_12``,
``12``, ``[12]``), as one array ``name -> [T, …]``, and in a torch file as a list or dict of
records, or as a list for each name.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from gradscope.checkpoints.integrity import verified
from gradscope.checkpoints.left_out import unread
from gradscope.checkpoints.open import open_checkpoint
from gradscope.checkpoints.sniff import sniff
from gradscope.checkpoints.statedict import WHOLE
from gradscope.checkpoints.tensors import Checkpoint, Failure, TensorRef
from gradscope.containers.beginning import Beginning
from gradscope.errors import InputError, UsageError
from gradscope.formats import find
from gradscope.histories.history import History, Layer, Status
from gradscope.histories.names import Role, guessed_kind, in_depth, likeliest, role_of
from gradscope.histories.steps import ordered
from gradscope.histories.vectors import Keyed, Slice, measure, values_of
from gradscope.histories.vectors import measured as measured
from gradscope.text import quoted

As = Literal["norms", "vectors"]
Values = NDArray[np.float64]
_Refs = Mapping[str, TensorRef]

_STEPS = ("steps", "step", "iterations", "global_step")
_STEP = re.compile(r"^(?:\[)?(?:(?:global_)?(?:step|iter|iteration|it|t)s?[_=-]?)?(\d+)\]?$", re.I)
#: The fields that arrays of one value a record become, by what their names say they are.
_FIELDS: Mapping[Role, str] = {
    "loss": "loss",
    "rate": "lr",
    "total": "total_l2",
    "scale": "loss_scale",
    "skipped": "skipped",
}
_MARKS = ("/", ":")


def recognises(file: Beginning) -> bool:
    """A checkpoint of tensors alone. Raises InputError for one that is damaged."""
    try:
        return find(sniff(file.path)).kind == "tensors"
    except InputError as error:
        if error.kind == "unsupported" or file.start[:4096].isascii():
            return False
        raise


def read_arrays(path: str, as_: As | None = None) -> History:
    """A history from a file of arrays. Raises InputError, and UsageError when ``as_`` is needed."""
    torch_file = find(sniff(path)).takes == "key"
    checkpoint = verified(open_checkpoint(path, WHOLE if torch_file else None))
    refs = {ref.name: ref for ref in checkpoint.tensors}
    rest = _of_layers(refs)
    if not rest:
        raise InputError(path, "malformed", "holds no array of gradients or norms")
    keyed = (_nested(path, rest) if torch_file else {}) or _keyed(rest, _split)
    single = all(where.numel == 1 for record in keyed.values() for where in record.values())
    if as_ is None:
        as_ = _seen(refs, rest, keyed, single)
    if as_ == "vectors":
        return _of_gradients(checkpoint, refs, keyed or _stacked(path, rest), list(rest))
    if as_ == "norms":
        return _of_norms(checkpoint, refs, _single(keyed) if keyed and single else None)
    raise _ambiguous(path, rest)


def _seen(refs: _Refs, rest: _Refs, keyed: Keyed, single: bool) -> As | None:
    """What the arrays show themselves to be; None when they may be either."""
    norms = _are_norms(refs, rest)
    if not keyed:
        return "norms" if norms else None
    if single:
        return None
    if not norms:
        return "vectors"
    # layer/0, layer/1, … beside steps: names that only look like records, unless as many.
    return None if next(iter(rest.values())).numel == len(keyed) else "norms"


def _of_layers(refs: _Refs) -> dict[str, TensorRef]:
    return {n: r for n, r in refs.items() if n not in _STEPS and role_of(n) is None}


def are_records(files: Sequence[str]) -> bool:
    """Whether every file has a step for its name: ``step_10.npz``, ``10.pt``."""
    return all(_STEP.match(os.path.splitext(os.path.basename(file))[0]) for file in files)


def read_records(path: str, files: Sequence[str]) -> History:
    """A history from a file of gradients for each step. A damaged one costs its step.

    Raises InputError when none can be read.
    """
    table: Keyed = {}
    failures: list[InputError] = []
    for file in files:
        found = _STEP.match(os.path.splitext(os.path.basename(file))[0])
        try:
            checkpoint = verified(open_checkpoint(file))
        except InputError as error:
            failures.append(error)
            continue
        failures.extend(InputError(file, f.kind, f.message) for f in checkpoint.failures)
        if found:
            table[int(found[1])] = {ref.name: Slice.whole(ref) for ref in checkpoint.tensors}
    if not table:
        raise failures[0]
    whole = Checkpoint(
        path=path,
        format=f"{len(table)} files",
        nbytes=sum(os.path.getsize(file) for file in files),
        tensors=(),
        failures=tuple(
            Failure(e.kind, f"{os.path.basename(e.path)}: {e.message}") for e in failures
        ),
    )
    return _of_gradients(whole, {}, table, [])


def _are_norms(refs: _Refs, rest: _Refs) -> bool:
    """One value a step for every name, and steps to match: nothing else looks so."""
    steps = next((refs[name] for name in _STEPS if name in refs), None)
    return steps is not None and all(ref.shape == steps.shape for ref in rest.values())


def _ambiguous(path: str, rest: _Refs) -> UsageError:
    name, ref = next(iter(rest.items()))
    return UsageError(
        f"{path}: {quoted(name)} of shape {list(ref.shape)} may hold one norm a step or gradients; "
        "say which with --as norms or --as vectors"
    )


# --- which tensor is whose ------------------------------------------------------------------------


def _split(key: str) -> tuple[int, str] | None:
    """The step and the name of ``step/name`` or ``name/step``."""
    for mark in _MARKS:
        first, _, rest = key.partition(mark)
        if rest and (found := _STEP.match(first)):
            return int(found[1]), rest
        rest, _, last = key.rpartition(mark)
        if rest and (found := _STEP.match(last)):
            return int(found[1]), rest
    return None


def _keyed(refs: _Refs, split: Callable[[str], tuple[int, str] | None]) -> Keyed:
    """Gradients by step and name; nothing unless every key has both."""
    table: Keyed = {}
    for key, ref in refs.items():
        found = split(key)
        if found is None:
            return {}
        table.setdefault(found[0], {})[found[1]] = Slice.whole(ref)
    return table


def _step_first(key: str) -> tuple[int, str] | None:
    first, _, rest = key.partition(".")
    found = _STEP.match(first)
    return (int(found[1]), rest) if found and rest else None


def _step_last(key: str) -> tuple[int, str] | None:
    rest, _, last = key.rpartition(".")
    found = _STEP.match(last)
    return (int(found[1]), rest) if found and rest else None


def _nested(path: str, refs: _Refs, above: str = "") -> Keyed:
    """Gradients in the lists and dicts of a torch file, whose entries were joined by dots.

    Dots are also in names (``0.weight``), so the containers are asked for: a list of records, a
    dict of them by step, or a list for each name, perhaps all inside one entry.
    """
    key = next(iter(refs))
    first, _, rest = key.partition(".")
    inside = bool(rest) and _is_container(path, above + first)
    if inside and (table := _keyed(refs, _step_first)):
        return table
    if inside and all(k.startswith(first + ".") for k in refs):
        below = {k.removeprefix(first + "."): ref for k, ref in refs.items()}
        if table := _nested(path, below, f"{above}{first}."):
            return table
    table = _keyed(refs, _step_last)
    return table if table and _is_container(path, above + key.rpartition(".")[0]) else {}


def _is_container(path: str, key: str) -> bool:
    try:
        return bool(open_checkpoint(path, key).tensors)
    except (UsageError, InputError):
        return False


def _stacked(path: str, rest: _Refs) -> Keyed:
    """``name -> [T, …]``: step t is slice t of every array."""
    lengths = {ref.shape[0] if ref.shape else 0 for ref in rest.values()}
    if len(lengths) != 1:
        message = (
            f"arrays have {sorted(lengths)} entries along their first dimension, "
            "which must be one record each"
        )
        raise InputError(path, "malformed", message)
    return {t: {n: Slice.record(r, t) for n, r in rest.items()} for t in range(lengths.pop())}


def _single(table: Keyed) -> tuple[NDArray[np.int64], dict[str, Values]]:
    """Norms that have an array each: the steps, and the series of each name."""
    steps = sorted(table)
    names = list(dict.fromkeys(name for step in steps for name in table[step]))
    series = {name: np.full(len(steps), np.nan) for name in names}
    for t, step in enumerate(steps):
        for name, where in table[step].items():
            series[name][t] = values_of(where)[0]
    return np.array(steps, np.int64), series


# --- histories of them ----------------------------------------------------------------------------


def _of_gradients(
    checkpoint: Checkpoint, refs: _Refs, table: Keyed, stacked: Sequence[str]
) -> History:
    records = np.array(sorted(table), np.int64)
    steps, notes = records, []
    counted = np.array_equal(records, np.arange(len(records)))
    if counted and any(name in refs for name in _STEPS):
        steps, _ = _steps(checkpoint.path, refs, len(records))
    chosen, more = ordered(steps)
    if any("counted once" in note for note in checkpoint.notes):
        notes.append("gradients that share memory were counted once: they need .clone() to be kept")
    else:
        notes.extend(checkpoint.notes)
    named = [name for step in records.tolist() for name in table[step]]
    names = in_depth(list(dict.fromkeys(named if table else stacked)))
    return History(
        path=checkpoint.path,
        format=f"{checkpoint.format} of gradients",
        nbytes=checkpoint.nbytes,
        steps=steps[chosen],
        notes=(*notes, *more),
        skipped_parts=tuple((s.subject, s.reason) for s in checkpoint.skipped),
        failures=unread(checkpoint),
        **measure([table[step] for step in records[chosen].tolist()], names),
        **_by_record(refs, len(records), chosen),
    )


def _of_norms(
    checkpoint: Checkpoint,
    refs: _Refs,
    single: tuple[NDArray[np.int64], dict[str, Values]] | None,
) -> History:
    steps, series, notes = _series(checkpoint.path, refs) if single is None else (*single, [])
    names = in_depth(list(series))
    norms = np.stack([series[name] for name in names], axis=1)
    if (low := np.argwhere(norms < 0)).size:
        at, row = low[0].tolist()
        message = f"{names[row]} is {norms[at, row]} in record {at}: norms are not below zero"
        raise InputError(checkpoint.path, "malformed", message)
    chosen, more = ordered(steps)
    absent = np.isnan(norms) if single is not None else np.zeros(norms.shape, bool)
    return History(
        path=checkpoint.path,
        format=f"{checkpoint.format} of norms",
        nbytes=checkpoint.nbytes,
        steps=steps[chosen],
        layers=tuple(Layer(name, guessed_kind(name)) for name in names),
        l2=norms[chosen],
        status=np.where(absent, Status.NOT_RECORDED, Status.RECORDED).astype(np.uint8)[chosen],
        notes=(*checkpoint.notes, *notes, *more, "arrays were taken as L2 norms, one a step"),
        skipped_parts=tuple((s.subject, s.reason) for s in checkpoint.skipped),
        failures=unread(checkpoint),
        **_by_record(refs, len(norms), chosen),
    )


def _series(path: str, refs: _Refs) -> tuple[NDArray[np.int64], dict[str, Values], list[str]]:
    """The steps, and an array of norms for each name."""
    rest = _of_layers(refs)
    counts = {ref.numel for ref in rest.values()}
    wrong = next((r for r in rest.values() if len([n for n in r.shape if n != 1]) > 1), None)
    if len(counts) > 1 or wrong is not None:
        bad = wrong or next(iter(rest.values()))
        message = (
            f"{bad.name} has shape {list(bad.shape)}: norms are one number a step, as "
            "many for every name"
        )
        raise InputError(path, "malformed", message)
    steps, notes = _steps(path, refs, counts.pop())
    return steps, {n: values_of(Slice.whole(r)) for n, r in rest.items()}, notes


def _steps(path: str, refs: _Refs, count: int) -> tuple[NDArray[np.int64], list[str]]:
    name = next((name for name in _STEPS if name in refs), None)
    if name is None:
        return np.arange(count), ["no steps in the file: records are numbered from 0"]
    values = values_of(Slice.whole(refs[name]))
    if len(values) != count:
        message = f"{name} has {len(values)} entries for {count} records"
        raise InputError(path, "malformed", message)
    whole = np.isfinite(values) & (np.abs(values) < 2**62) & (values == np.round(values))
    if not whole.all():
        at = int(np.argmin(whole))
        message = f"{name} must be whole numbers; entry {at} is {values[at]}"
        raise InputError(path, "malformed", message)
    return values.astype(np.int64), []


def _by_record(refs: _Refs, count: int, chosen: NDArray[np.integer[Any]]) -> dict[str, Any]:
    """The arrays of one value a record that are known by their names."""
    found: dict[str, Any] = {}
    for role, target in _FIELDS.items():
        known = [(n, r) for n, r in refs.items() if role_of(n) == role and r.numel == count]
        if (ref := likeliest(known)) is not None:
            values = values_of(Slice.whole(ref))[chosen]
            found[target] = values[:, None] if target == "lr" else values
    if "skipped" in found:
        found["skipped"] = (found["skipped"] > 0).astype(np.uint8)
    return found
