"""The way of each layer through a series of checkpoints: how far, how fast, which way."""

from __future__ import annotations

import math
import os
import re
import statistics
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from gradscope.checkpoints.series import by_number
from gradscope.checkpoints.tensors import Checkpoint, TensorRef
from gradscope.drift import kernels
from gradscope.drift.comparing import Pair, compare
from gradscope.drift.describing import module_of
from gradscope.drift.logical import logical
from gradscope.drift.matching import matched
from gradscope.drift.measures import Measures
from gradscope.drift.result import LayerPath, Series
from gradscope.statistics.engine import Engine
from gradscope.weights.roles import AUXILIARY, roles

#: A step is a jump when it is so many times the median of those before, of which there are three.
_JUMP, _BEFORE = 10.0, 3

#: Of each matched tensor: ‖from the first‖², ‖step‖², ‖over two steps‖², and what is not finite.
_Squares = tuple[float, float, float | None, int]


def in_order(paths: Sequence[str]) -> list[str]:
    """By the numbers in their names where each has one, else as they were given."""
    return by_number(paths) if all(re.search(r"\d", p) for p in paths) else list(paths)


def trajectories(checkpoints: Sequence[Checkpoint], engine: Engine[Any, Any]) -> Series:
    """Distance, step length and cosine of successive steps of every layer that was trained.

    Tensors that all checkpoints have in one shape are followed, by the first one's names. Memory
    does not grow with the models: each pair of neighbours, of next neighbours, and of each with the
    first is read once. Raises InputError when a file ends meanwhile.
    """
    tensors = [logical(c).tensors for c in checkpoints]
    columns = _common(tensors)
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
    labels = tuple(os.path.basename(os.path.abspath(c.path)) for c in checkpoints)
    return Series(checkpoints=labels, layers=tuple(_layers(columns, found, norms, labels)))


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


def _layers(
    columns: Mapping[str, Sequence[TensorRef]],
    found: Mapping[str, Sequence[_Squares]],
    norms: Mapping[str, float],
    labels: Sequence[str],
) -> Iterator[LayerPath]:
    members: dict[str, list[str]] = defaultdict(list)
    for name in columns:
        members[module_of(name)].append(name)
    for layer, names in members.items():
        numel = sum(columns[n][0].numel for n in names)
        rows = list(zip(*(found[n] for n in names), strict=True))
        yield _path(layer, numel, rows, math.sqrt(math.fsum(norms[n] for n in names)), labels)


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
