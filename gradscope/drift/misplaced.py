"""Tensors that hold what the base has under another name: layers removed, repeated, mixed up."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from gradscope.checkpoints.tensors import TensorRef
from gradscope.checkpoints.tiles import read_range
from gradscope.drift.describing import Seen
from gradscope.drift.result import Explanation
from gradscope.drift.second_look import same
from gradscope.text import quoted
from gradscope.weights.roles import TRAINING

#: Elements that tell a tensor from others at a glance.
_GLANCE = 64
#: What may turn out to be another tensor: nothing else was found, or that it is unrelated.
_OPEN = (None, "re-initialised", "low-rank")


def with_misplaced(seen: Sequence[Seen], base: Sequence[TensorRef]) -> list[Seen]:
    """The same, with the place in the base of what is elsewhere there.

    Looked for only where a matrix is unrelated to the base's. Raises InputError.
    """
    if not any(_open(s) and _kind(s) == "re-initialised" for s in seen):
        return list(seen)
    found = elsewhere(seen, base)
    return [found.get(s.new.name, s) for s in seen]


def elsewhere(seen: Iterable[Seen], base: Iterable[TensorRef]) -> dict[str, Seen]:
    """By their names, the tensors that the base has under another one. Raises InputError."""
    changed = [s for s in seen if _open(s)]
    places: dict[object, TensorRef] = {}
    for ref in base if changed else ():
        if ref.numel > 1:
            places.setdefault(_start(ref), ref)
    placed = (_placed(s, place) for s in changed if (place := places.get(_start(s.new))))
    return {s.new.name: s for s in placed if _kind(s) == "misplaced"}


def _kind(seen: Seen) -> str | None:
    return seen.explanation.kind if seen.explanation is not None else None


def _open(seen: Seen) -> bool:
    m = seen.measures
    return m is not None and not m.identical and _kind(seen) in _OPEN and seen.role not in TRAINING


def _start(ref: TensorRef) -> object:
    first = read_range(ref, 0, min(_GLANCE, ref.numel))
    return ref.dtype, ref.shape, first.tobytes()


def _placed(seen: Seen, place: TensorRef) -> Seen:
    if not same(place, seen.new):
        return seen
    text = f"what the base has as {quoted(place.name)}"
    why = Explanation(kind="misplaced", text=text, residual=0.0, facts={"place": place.name})
    return replace(seen, explanation=why)
