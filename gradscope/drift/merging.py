"""Whether adapters were merged: each weight against W + s B A, computed anew in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from gradscope.checkpoints.tensors import TensorRef
from gradscope.drift.adapter_files import Change, File, Targets
from gradscope.drift.describing import Seen
from gradscope.drift.matching import canonical
from gradscope.drift.result import Merge
from gradscope.drift.second_look import compare_all
from gradscope.drift.steps import step_of
from gradscope.drift.sums import rounding_between
from gradscope.drift.updates import Update, Values, row_values

#: Of weights in codes: how far the share of the product may be off, and how well it must be known.
_SHARE, _UNTOLD = 0.05, 0.3


#: Whether what became of a weight is asked for, or (None) of what is none of the checkpoint's.
Wanted = Callable[[Seen | None], bool]


def merges(
    seen: Sequence[Seen], paths: Sequence[str], wanted: Wanted = lambda _: True
) -> Iterator[Merge | None]:
    """What became of every weight that adapters change, in their order; None if not ``wanted``.

    Several adapters of one weight are merged in turn. Raises InputError for an adapter that cannot
    be read, or that is none.
    """
    where = Targets.of(seen)
    files = [File.of(path) for path in paths]
    of_weight: dict[str, list[Change]] = {}
    for file in files:
        for change in file.changes(where):
            name = change.target.new.name if change.target is not None else change.module
            of_weight.setdefault(name, []).append(change)
    for changes in of_weight.values():
        yield _merge(changes) if wanted(changes[0].target) else None
    for file in files:
        for ref in file.replaced():
            target = where.by_name.get(canonical(_name(ref)))
            yield _replaced(ref, target) if wanted(target) else None
        file.check()


def _merge(changes: Sequence[Change]) -> Merge:
    first = changes[0]
    target, unknown = first.target, next((c.reason for c in changes if c.reason is not None), None)
    plain = Merge(
        module=first.module, name=target.new.name if target is not None else None, scale=None
    )
    updates = [c.update for c in changes if c.update is not None]
    if target is None or unknown is not None:
        return plain.model_copy(update={"reason": unknown})
    base = next((c.base for c in changes if c.base is not None), target.base)
    found = _compared(base, target.new, updates)
    scale = updates[0].scale if len(updates) == 1 else None
    plain = plain.model_copy(update={"scale": scale, **found.described(scale)})
    if target.new.decoding is not None:
        return _in_codes(plain, target.new, found)
    m, why = target.measures, target.explanation
    as_base = m is not None and (m.identical or (why is not None and why.kind == "rounded"))
    return plain.model_copy(
        update={
            "residual_ulps": math.sqrt(found.ulps / target.new.numel),
            "max_ulps": found.most,
            "unchanged": as_base and found.most > 1,
            "reason": next((c.doubt for c in changes if c.doubt is not None), None),
        }
    )


def _in_codes(plain: Merge, new: TensorRef, found: _Distance) -> Merge:
    """Of a weight that was put into codes after the merge: how much of the product it has.

    Rounding is independent of the product, which tells how well the share is known.
    """
    if not found.meant:
        return plain
    error = 5 * math.sqrt(found.left / new.numel / found.meant)
    if error > _UNTOLD:
        return plain.model_copy(update={"reason": "its product is below the noise of the codes"})
    allowed = max(error, _SHARE)
    unchanged = abs(found.both / found.meant) <= allowed
    return plain.model_copy(update={"share_error": allowed, "unchanged": unchanged})


@dataclass(frozen=True, slots=True)
class _Distance:
    """Sums of squares of the change, of what was meant, of their product and of what is left;
    of this also in units in the last place, and the greatest.
    """

    changed: float
    both: float
    meant: float
    left: float
    ulps: float
    most: float

    def described(self, scale: float | None) -> dict[str, float | None]:
        """Of the result what is a ratio of sums."""
        changed = self.changed * self.meant
        share = self.both / self.meant if self.meant else None
        return {
            "share": share,
            "fitted_scale": None if scale is None or share is None else scale * share,
            "cosine": self.both / math.sqrt(changed) if changed else None,
            "residual": math.sqrt(self.left / self.meant) if self.meant else None,
        }


def _compared(base: TensorRef, new: TensorRef, updates: Sequence[Update]) -> _Distance:
    sums = np.zeros(5)
    most = 0.0
    for (first, old), (_, stored) in zip(row_values(base), row_values(new), strict=True):
        wanted = old
        for update in updates:
            wanted = update.merged(first, wanted)
        change, meant, left = stored - old, wanted - old, stored - wanted
        units = left / _unit(first, old, stored, meant, updates, new.dtype)
        pairs = (change, change), (change, meant), (meant, meant), (left, left), (units, units)
        sums += [np.vdot(x, y) for x, y in pairs]
        most = max(most, float(np.abs(units).max()))
    return _Distance(*(float(found) for found in (*sums, most)))


def _unit(
    first: int, old: Values, stored: Values, meant: Values, updates: Sequence[Update], dtype: str
) -> Values:
    """What rounding may leave of each element: a step of the type at the greatest of base, change
    and sum, which cancel; or one of float32 at the terms of the product, which is summed in that.
    """
    rounded = np.maximum(np.abs(stored), np.maximum(np.abs(old), np.abs(meant)))
    unit = step_of(rounded, dtype)
    for update in updates:
        terms = np.asarray(update.terms(first, first + len(old)))
        unit = np.maximum(unit, step_of(terms, "F32"))
    return unit


def _name(ref: TensorRef) -> str:
    return ref.name.replace(".modules_to_save.default.", ".").replace(".modules_to_save.", ".")


def _replaced(ref: TensorRef, target: Seen | None) -> Merge:
    """A module that was trained whole and saved with the adapter: the new weight must be it."""
    plain = Merge(module=ref.name, name=None, scale=None)
    if target is None or target.new.shape != ref.shape:
        return plain.model_copy(update={"reason": "the base has no tensor of that name and shape"})
    rounding = rounding_between(ref.dtype, target.new.dtype)
    m = compare_all(ref, target.new, rounding)
    as_saved = m.identical or (m.roundings is not None and max(m.roundings[:3]) == m.numel)
    same = target.measures is not None and target.measures.identical
    return plain.model_copy(
        update={
            "name": target.new.name,
            "residual": m.relative_drift,
            "residual_ulps": 0.0 if as_saved else math.inf if m.ulps is None else float(m.ulps[0]),
            "unchanged": same and not as_saved,
        }
    )
