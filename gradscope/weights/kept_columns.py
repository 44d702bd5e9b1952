"""Which columns of a tensor to keep, so that a smaller type serves all others.

A few inputs that are much greater than the others (outlier dimensions, as LLM.int8() and SpQR keep
them) decide the scales that everything beside them is rounded with.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from gradscope.casts.formats import Target
from gradscope.casts.measure import Loss, Subject, column_peaks, losses
from gradscope.checkpoints.tiles import PIECE
from gradscope.weights.result import CastResult, KeptColumns, TensorResult
from gradscope.weights.roles import Role

if TYPE_CHECKING:
    from gradscope.statistics import Engine

#: A column stands out whose peak is as many times that of the median column.
_BEYOND = 4.0
#: Of so many columns one may be kept, and as many in all.
_OF, _MOST = 64, 32

Cast = tuple[TensorResult, Subject]


def with_kept_columns(
    cast: Sequence[Cast], targets: Sequence[Target], snr_db: float, engine: Engine[Any, Any]
) -> Iterator[TensorResult]:
    """Those tensors that would do with fewer bits if a few of their columns were kept.

    Reads again what the fewest bits do not serve. Raises InputError when a file changes.
    """
    wanting = [(t, s, wanted) for t, s in cast if (wanted := _better(t, s, targets))]
    peaks = column_peaks([subject for _, subject, _ in wanting], engine)
    groups: dict[tuple[Target, ...], list[Cast]] = defaultdict(list)
    for (tensor, subject, wanted), of_columns in zip(wanting, peaks, strict=True):
        columns = _outlying(of_columns)
        if columns:
            rest = float(np.delete(of_columns, columns).max())
            groups[wanted].append((tensor, replace(subject, peak=rest, kept=columns)))
    for wanted, members in groups.items():
        found = losses([subject for _, subject in members], wanted, engine)
        for (tensor, subject), lost in zip(members, found, strict=True):
            best = _best(tensor, subject, dict(zip(wanted, lost, strict=True)), snr_db)
            if best is not None:
                yield tensor.model_copy(update={"kept_columns": best})


def _better(
    tensor: TensorResult, subject: Subject, targets: Sequence[Target]
) -> tuple[Target, ...]:
    """The types of fewer bits than that of the plan which are scaled, if columns mean inputs."""
    if not (len(tensor.shape) == 2 or tensor.role is Role.EXPERTS) or subject.columns > PIECE:
        return ()
    planned = next((t.bits for t in targets if t.name == tensor.cast_plan), 64)
    return tuple(t for t in targets if t.bits < planned and t.grain != "plain")


def _outlying(peaks: np.ndarray[Any, np.dtype[np.float64]]) -> tuple[int, ...]:
    """The columns that stand out; none where they are many."""
    median = float(np.median(peaks))
    found = np.flatnonzero(peaks > _BEYOND * median) if median > 0 else np.empty(0, np.intp)
    return tuple(map(int, found)) if len(found) <= min(len(peaks) // _OF, _MOST) else ()


def _best(
    tensor: TensorResult, subject: Subject, lost: Mapping[Target, Loss], snr_db: float
) -> KeptColumns | None:
    """What the fewest bits are that serve then; of several the most exact."""
    casts = {c.format: c for c in tensor.casts}
    made = (_kept(casts[t.name], subject, t, loss) for t, loss in lost.items())
    fitting = [
        (t.bits, -k.snr_db, k) for t, k in zip(lost, made, strict=True) if k.snr_db >= snr_db
    ]
    return min(fitting, key=lambda found: found[:2], default=(0, 0, None))[2]


def _kept(cast: CastResult, subject: Subject, t: Target, loss: Loss) -> KeptColumns:
    before = [r for r in (cast.snr_db, cast.bulk_snr_db) if r is not None]
    stored = subject.ref.nbytes // subject.ref.numel * subject.rows * len(subject.kept)
    return KeptColumns(
        format=t.name,
        columns=subject.kept,
        bytes=t.nbytes(subject.rows, subject.columns - len(subject.kept)) + stored,
        snr_db=loss.lowest_db,
        cast_snr_db=min(before, default=np.inf),
    )
