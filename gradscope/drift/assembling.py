"""The result: a row for each tensor, and the checkpoints as a whole."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from gradscope.checkpoints.tensors import Checkpoint, TensorRef
from gradscope.drift.describing import Seen, alone, drift_of, module_of, pools
from gradscope.drift.logical import Schemes
from gradscope.drift.matching import Matched, Matching
from gradscope.drift.measures import Measures
from gradscope.drift.result import DriftResult, TensorDrift
from gradscope.report.severity import Severity
from gradscope.weights.names import block_of
from gradscope.weights.roles import AUXILIARY, Role


class Known(NamedTuple):
    """What the whole is summed up from of one tensor that both have in one shape."""

    name: str
    role: Role
    measures: Measures


def assembled(
    base: Checkpoint,
    new: Checkpoint,
    matching: Matching,
    seen: Sequence[Seen],
    names: Mapping[str, Role],
    schemes: Schemes,
) -> DriftResult:
    """The rows of all tensors, and what they come to."""
    return summed(
        tuple(_rows(base, new, matching, seen, names, schemes)),
        [Known(s.new.name, s.role, s.measures) for s in seen if s.measures is not None],
        (*base.notes, *(n for n in new.notes if n not in base.notes), *matching.notes),
    )


def summed(
    tensors: Sequence[TensorDrift], known: Sequence[Known], notes: Sequence[str]
) -> DriftResult:
    """What rows come to; ``known`` are those that were compared, in the order of their pairs."""
    model = [k for k in known if k.role not in AUXILIARY]
    drifts = [
        (k.measures.numel, drift) for k in model if (drift := k.measures.relative_drift) is not None
    ]
    numel = sum(n for n, _ in drifts)
    return DriftResult(
        tensors=tuple(tensors),
        mean_drift=math.fsum(n * d for n, d in drifts) / numel if numel else None,
        max_drift=max((d for _, d in drifts), default=None),
        severity=max((t.severity for t in tensors), key=lambda s: s.rank, default=Severity.INFO),
        affected_layers=tuple(dict.fromkeys(module_of(t.name) for t in tensors if t.affected)),
        counts=dict(Counter(t.status or "not compared" for t in tensors if not t.beside)),
        by_role=pools((k.role, k.measures) for k in known),
        by_block=pools((b, k.measures) for k in model if (b := block_of(k.name)) is not None),
        notes=tuple(notes),
    )


def entries(base: Checkpoint, matching: Matching) -> list[Matched | TensorRef]:
    """What has a row: pairs and what was removed in the base's order, then what was added."""
    place = {ref.name: n for n, ref in enumerate(base.tensors)}

    def in_base(entry: Matched | TensorRef) -> int:
        name = entry.base.name if isinstance(entry, Matched) else entry.name
        return place.get(name, len(place))

    here: list[Matched | TensorRef] = [*matching.pairs, *matching.removed]
    return [*sorted(here, key=in_base), *matching.added]


def _rows(
    base: Checkpoint,
    new: Checkpoint,
    matching: Matching,
    seen: Sequence[Seen],
    names: Mapping[str, Role],
    schemes: Schemes,
) -> Iterator[TensorDrift]:
    both = {s.base.name: s for s in seen}
    added = set(matching.added)
    for entry in entries(base, matching):
        if isinstance(entry, Matched):
            yield drift_of(both[entry.base.name], new.path)
            continue
        role, scheme = names[entry.name], schemes.get(entry.decoding)
        if entry in added:
            yield alone(entry, role, new.path, "added", scheme)
        else:
            yield alone(entry, role, base.path, "removed", scheme)
