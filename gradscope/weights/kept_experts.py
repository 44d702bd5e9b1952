"""Which experts of a stack to keep, so that a smaller type serves all others.

Each expert has scales of its own, as deployments give them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from gradscope.casts.formats import Target
from gradscope.casts.measure import Loss, Subject, column_peaks, losses
from gradscope.weights.result import KeptExperts, TensorResult
from gradscope.weights.roles import Role

if TYPE_CHECKING:
    from gradscope.statistics import Engine

#: Of so many experts one may be kept.
_OF = 4

Cast = tuple[TensorResult, Subject]


def with_kept_experts(
    cast: Sequence[Cast], targets: Sequence[Target], snr_db: float, engine: Engine[Any, Any]
) -> Iterator[TensorResult]:
    """Those stacks that would do with fewer bits if a few of their experts were kept.

    Reads again what the fewest bits do not serve. Raises InputError when a file changes.
    """
    for tensor, subject in cast:
        planned = next((t.bits for t in targets if t.name == tensor.cast_plan), 64)
        smaller = [t for t in targets if t.bits < planned]
        if smaller and tensor.role is Role.EXPERTS and len(tensor.shape) == 3:
            experts = _experts(subject, tensor.shape[0], engine)
            found = list(losses(experts, smaller, engine))
            best = _best(subject, smaller, found, snr_db)
            if best is not None:
                yield tensor.model_copy(update={"kept_experts": best})


def _experts(subject: Subject, count: int, engine: Engine[Any, Any]) -> list[Subject]:
    each = subject.rows // count
    parts = [replace(subject, rows=each, first=n * each, kept=()) for n in range(count)]
    peaks = (float(found.max()) for found in column_peaks(parts, engine))
    return [replace(part, peak=peak) for part, peak in zip(parts, peaks, strict=True)]


def _best(
    subject: Subject, targets: Sequence[Target], found: Sequence[Sequence[Loss]], snr_db: float
) -> KeptExperts | None:
    """What the fewest bits are that serve then; of several the most exact."""
    made = [(t, _kept(subject, t, [lost[at] for lost in found], snr_db))
            for at, t in enumerate(targets)]  # fmt: skip
    fitting = [(t.bits, -kept.snr_db, kept) for t, kept in made if kept is not None]
    return min(fitting, key=lambda one: one[:2], default=(0, 0, None))[2]


def _kept(subject: Subject, t: Target, lost: Sequence[Loss], snr_db: float) -> KeptExperts | None:
    """None where none need be kept, or many."""
    ratios = {n: -math.inf if one.overflow else one.lowest_db for n, one in enumerate(lost)}
    kept = tuple(n for n, ratio in ratios.items() if ratio < snr_db)
    if not 0 < len(kept) <= len(lost) // _OF:
        return None
    rows = subject.rows // len(lost)
    stored = subject.ref.nbytes // len(lost)
    return KeptExperts(
        format=t.name,
        experts=kept,
        bytes=(len(lost) - len(kept)) * t.nbytes(rows, subject.columns) + len(kept) * stored,
        snr_db=min(ratio for n, ratio in ratios.items() if n not in kept),
        cast_snr_db=min(ratios.values()),
    )
