"""The result: a row for each tensor, and the checkpoints as a whole."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from gradscope.checkpoints.tensors import Checkpoint
from gradscope.drift.describing import Seen, alone, drift_of, module_of, pools
from gradscope.drift.matching import Matching
from gradscope.drift.result import DriftResult, TensorDrift
from gradscope.report.severity import Severity
from gradscope.weights.names import block_of
from gradscope.weights.roles import AUXILIARY, TRAINING, Role


def assembled(
    base: Checkpoint,
    new: Checkpoint,
    matching: Matching,
    seen: Sequence[Seen],
    names: Mapping[str, Role],
) -> DriftResult:
    """The rows of all tensors, and what they come to."""
    tensors = tuple(_rows(base, new, matching, seen, names))
    model = [s for s in seen if s.role not in AUXILIARY and s.measures is not None]
    drifts = [
        (s.measures.numel, s.measures.relative_drift)
        for s in model
        if s.measures is not None and s.measures.relative_drift is not None
    ]
    numel = sum(n for n, _ in drifts)
    greatest = max((d for _, d in drifts), default=None)
    return DriftResult(
        tensors=tensors,
        mean_drift=math.fsum(n * d for n, d in drifts) / numel if numel else None,
        max_drift=greatest,
        severity=max((t.severity for t in tensors), key=lambda s: s.rank, default=Severity.INFO),
        affected_layers=tuple(dict.fromkeys(module_of(t.name) for t in tensors if t.affected)),
        counts=dict(Counter(t.status or "not compared" for t in tensors if t.role not in TRAINING)),
        by_role=pools((s.role, s) for s in seen if s.measures is not None),
        by_block=pools((b, s) for s in model if (b := block_of(s.new.name)) is not None),
        notes=(*base.notes, *(n for n in new.notes if n not in base.notes), *matching.notes),
    )


def _rows(
    base: Checkpoint,
    new: Checkpoint,
    matching: Matching,
    seen: Sequence[Seen],
    names: Mapping[str, Role],
) -> Iterator[TensorDrift]:
    """Tensors in the base's order, then what was added."""
    both = {s.base.name: s for s in seen}
    removed = {ref.name: ref for ref in matching.removed}
    order = {ref.name: place for place, ref in enumerate(base.tensors)}
    for name in sorted((*both, *removed), key=lambda n: order.get(n, len(order))):
        if name in both:
            yield drift_of(both[name], new.path)
        else:
            ref = removed[name]
            yield alone(ref, names[name], base.path, "removed")
    for ref in matching.added:
        yield alone(ref, names[ref.name], new.path, "added")
