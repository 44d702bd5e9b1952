"""The way of each layer through a series of checkpoints: how far, how fast, which way."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from gradscope.checkpoints.tensors import Checkpoint, TensorRef
from gradscope.drift import kernels
from gradscope.drift.comparing import Pair, compare
from gradscope.drift.describing import module_of
from gradscope.drift.logical import logical
from gradscope.drift.matching import matched
from gradscope.drift.measures import Measures
from gradscope.drift.ordering import distinct
from gradscope.drift.result import LayerPath, Series
from gradscope.statistics.engine import Engine
from gradscope.weights.roles import AUXILIARY, roles
from gradscope.weights.shares import Share, balanced

#: A step is a jump when it is so many times the median of those before, of which there are three.
_JUMP, _BEFORE = 10.0, 3

#: Of each matched tensor: ‖from the first‖², ‖step‖², ‖over two steps‖², and what is not finite.
_Squares = tuple[float, float, float | None, int]


class Way(NamedTuple):
    """One tensor through a series: its place among those followed, and what is known of it."""

    place: int
    name: str
    numel: int
    #: The square of its norm in the first checkpoint.
    norm: float
    steps: tuple[_Squares, ...]


def trajectories(found: Iterable[Way], paths: Sequence[str]) -> Series:
    """Distance, step length and cosine of successive steps of every layer that was trained."""
    labels = tuple(distinct(paths))
    return Series(checkpoints=labels, layers=tuple(_layers(sorted(found), labels)))


def ways(
    checkpoints: Sequence[Checkpoint], engine: Engine[Any, Any], part: Share | None = None
) -> Iterator[Way]:
    """The way of every tensor that was trained and that all checkpoints have in one shape.

    They have the first one's names; one job of several has its ``part`` of them. Memory does not
    grow with the models: each pair of neighbours, of next neighbours, and of each with the first is
    read once. Raises InputError when a file ends meanwhile.
    """
    columns = _common([logical(c).tensors for c in checkpoints])
    places = {name: place for place, name in enumerate(columns)}
    if part is not None:
        jobs = balanced([refs[0].numel for refs in columns.values()], part.of)
        mine = (name for name, job in zip(columns, jobs, strict=True) if job == part.index)
        columns = {name: columns[name] for name in mine}
    norms: dict[str, float] = defaultdict(float)
    found: dict[str, list[_Squares]] = {}
    for place in range(1, len(checkpoints)):
        whole = list(_measured(columns, 0, place, engine))
        steps = list(_measured(columns, place - 1, place, engine)) if place > 1 else whole
        twice = list(_measured(columns, place - 2, place, engine)) if place > 1 else []
        for at, name in enumerate(columns):
            found.setdefault(name, []).append(
                (
                    whole[at].sums[kernels.SQUARES_CHANGE],
                    steps[at].sums[kernels.SQUARES_CHANGE],
                    twice[at].sums[kernels.SQUARES_CHANGE] if twice else None,
                    whole[at].counts[kernels.ODD_NEW],
                )
            )
            norms[name] = max(norms[name], whole[at].sums[kernels.SQUARES_BASE])
    for name, refs in columns.items():
        yield Way(places[name], name, refs[0].numel, norms[name], tuple(found[name]))


def _common(tensors: Sequence[Sequence[TensorRef]]) -> dict[str, list[TensorRef]]:
    """The trained tensors that every checkpoint has, in the first one's order."""
    names = roles(tensors[0])
    columns = {r.name: [r] for r in tensors[0] if names[r.name] not in AUXILIARY and r.numel}
    for later in tensors[1:]:
        partner = {m.base.name: m.new for m in matched(tensors[0], later).pairs}
        columns = {
            name: [*refs, partner[name]]
            for name, refs in columns.items()
            if name in partner and partner[name].shape == refs[0].shape
        }
    return columns


def _measured(
    columns: Mapping[str, Sequence[TensorRef]], one: int, two: int, engine: Engine[Any, Any]
) -> Iterator[Measures]:
    return compare([Pair(refs[one], refs[two]) for refs in columns.values()], engine)


def _layers(found: Iterable[Way], labels: Sequence[str]) -> Iterator[LayerPath]:
    members: dict[str, list[Way]] = defaultdict(list)
    for way in found:
        members[module_of(way.name)].append(way)
    for layer, parts in members.items():
        numel = sum(way.numel for way in parts)
        rows = list(zip(*(way.steps for way in parts), strict=True))
        yield _path(layer, numel, rows, math.sqrt(math.fsum(w.norm for w in parts)), labels)


def _path(
    layer: str,
    numel: int,
    rows: Sequence[Sequence[_Squares]],
    norm: float,
    labels: Sequence[str],
) -> LayerPath:
    far, step, twice = ([math.fsum(s[k] or 0.0 for s in row) for row in rows] for k in (0, 1, 2))
    odd = [sum(s[3] for s in row) > 0 for row in rows]
    unit = norm or 1.0
    steps = [math.sqrt(s) / unit for s in step]
    return LayerPath(
        layer_name=layer,
        numel=numel,
        distance=(0.0, *(math.sqrt(d) / unit for d in far)),
        step_length=tuple(steps),
        cosine=tuple(
            _cosine(a, b, both) for a, b, both in zip(step, step[1:], twice[1:], strict=False)
        ),
        froze_after=_froze(steps, labels),
        jumped_at=_jumped(steps, odd, labels),
    )


def _cosine(one: float, two: float, both: float) -> float | None:
    """Of two successive steps, from their squares and that of their sum."""
    if not one or not two:
        return None
    return max(-1.0, min(1.0, (both - one - two) / (2 * math.sqrt(one) * math.sqrt(two))))


def _froze(steps: Sequence[float], labels: Sequence[str]) -> str | None:
    """The checkpoint after which nothing moves any more, where something did before."""
    moved = [place for place, step in enumerate(steps) if step]
    last = moved[-1] + 1 if moved else 0
    return labels[last] if 0 < last < len(labels) - 1 else None


def _jumped(steps: Sequence[float], odd: Sequence[bool], labels: Sequence[str]) -> str | None:
    """The first checkpoint that lies a jump from the one before, or is not finite."""
    for place, step in enumerate(steps):
        before = [s for s in steps[:place] if s]
        far = len(before) >= _BEFORE and step > _JUMP * statistics.median(before)
        if odd[place] or far:
            return labels[place + 1]
    return None
