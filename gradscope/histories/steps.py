"""Putting records in the order of their steps: sorted, without duplicates, restarts resolved."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradscope.histories.history import Integers
from gradscope.text import plural

#: A counter that falls back and then climbs for this many records was restarted; one that jumps
#: about was not recorded in order.
_RUN = 8
#: With fewer records of gradients, those that have another value are records too.
_LEAST = 8


def chosen_records(known: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Which steps are records of a run that logs gradients at some steps only.

    Those with a gradient, given as ``known``: between them nothing could be compared. All steps
    where too few have one to say anything.
    """
    return known if known.sum() >= _LEAST else np.ones_like(known)


def carried(
    steps: Integers, values: NDArray[np.floating[Any]], records: Integers
) -> NDArray[np.float64]:
    """At each record the latest value of the steps since the record before; NaN without one.

    What is logged more often than the gradients (loss, rate) belongs to the record that follows.
    ``steps`` and ``records`` increase strictly.
    """
    at = np.searchsorted(records, steps)
    inside = at < len(records)
    out = np.full(len(records), np.nan)
    out[at[inside]] = values[inside]
    return out


def ordered(steps: Integers, *, note_repeats: bool = True) -> tuple[Integers, list[str]]:
    """Which records to keep, in the order of their steps, and notes of what was done.

    Of records with one step the last stays. A restart (from step 400, of a run that had reached
    500) supersedes what the earlier segment recorded from its first step on; otherwise records out
    of order are sorted. Without ``note_repeats`` repeated steps are taken as normal.
    """
    if len(steps) < 2 or bool(np.all(np.diff(steps) > 0)):
        return np.arange(len(steps)), []
    segments = _segments(steps)
    if len(segments) > 1 and all(last - first >= _RUN for first, last in segments):
        return _restarted(steps, segments, note_repeats)
    return _sorted(steps, np.arange(len(steps)), note_repeats)


def _segments(steps: Integers) -> list[tuple[int, int]]:
    """The ascending stretches, as (first, end) records."""
    falls = np.flatnonzero(np.diff(steps) < 0) + 1
    return list(pairwise([0, *falls.tolist(), len(steps)]))


def _restarted(
    steps: Integers, segments: list[tuple[int, int]], note_repeats: bool
) -> tuple[Integers, list[str]]:
    kept, notes = np.ones(len(steps), dtype=bool), []
    for first, _ in segments[1:]:
        stale = kept[:first] & (steps[:first] >= steps[first])
        kept[:first] &= ~stale
        notes.append(
            f"the step counter restarts at {steps[first]}, which supersedes "
            f"{plural(int(stale.sum()), 'earlier record')} from that step on"
        )
    chosen, more = _sorted(steps, np.flatnonzero(kept), note_repeats)
    return chosen, [*notes, *more]


def _sorted(steps: Integers, records: Integers, note_repeats: bool) -> tuple[Integers, list[str]]:
    order = records[np.argsort(steps[records], kind="stable")]
    last = np.append(np.diff(steps[order]) > 0, True)[: len(order)]
    repeated = int((~last).sum()) if note_repeats else 0
    return order[last], list(_said(steps[records], repeated))


def _said(steps: Integers, repeated: int) -> Iterator[str]:
    if bool(np.any(np.diff(steps) < 0)):
        yield "the steps were out of order and have been sorted"
    if repeated:
        yield f"{plural(repeated, 'record')} repeated a step; the last of each step was kept"
