"""Records that wait for their shard: how many, how long, and what becomes of them."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from gradscope.recording.pending import Pending
from gradscope.recording.shards import Record, drained, folder_for, save
from gradscope.recording.turns import Place

Array = np.ndarray[Any, Any]

#: The first shard has this many records, the next eight times as many, up to the capacity.
FIRST_SHARD = 4
#: Records wait no longer than this to be written, however few they are.
SECONDS = 30.0
#: Bytes that records may take where they wait, when no capacity is given, and how many at most.
_WAITING_BYTES = 1 << 24
_MOST_RECORDS = 1024


class Spool:
    """The records of a run on their way into its folder.

    Raises UsageError when the folder holds another run and ``resume`` is False. Who does not write
    (another rank) keeps the same time, and throws its records away.
    """

    def __init__(
        self, folder: str | os.PathLike[str], resume: bool, capacity: int | None, writes: bool
    ) -> None:
        self.folder, self._number = folder_for(folder, resume) if writes else (os.fspath(folder), 0)
        self.writes, self.written = writes, 0
        self._records: list[Record] = []
        self._capacity, self._limit = capacity, FIRST_SHARD
        self._most = self._enough = capacity or FIRST_SHARD
        self._since = time.monotonic()

    def add(self, pending: Pending, place: Place, optimizers: int) -> None:
        """A capture whose step was seen; of several optimizers those of one round share a record.

        A step that is captured again replaces what it had.
        """
        parts = [part for part in pending.parts if part.owner in place.owners]
        if not parts:
            return
        losses = {} if pending.loss is None else dict.fromkeys(place.owners, pending.loss)
        whole, skipped = len(place.owners) >= optimizers, place.skipped
        last = self._records[-1] if self._records else None
        if last is not None and last.step == place.step:
            self._records.pop()
            kept = [part for part in last.parts if part.owner not in place.owners]
            parts, losses = kept + parts, last.losses | losses
            whole, skipped = whole and not kept, skipped or (last.skipped and bool(kept))
            pending.scalars = last.scalars | pending.scalars
        self._records.append(
            Record(place.step, pending.rates, parts, pending.scalars, losses, whole, skipped)
        )

    def due(self, step: int | None, held: int) -> int:
        """How many records should be written before one of ``step`` is taken.

        All when it cannot follow them, all but the last ``held`` when they are enough or have
        waited long.
        """
        count = len(self._records)
        if count == 0:
            return 0
        if step is not None and self._records[-1].step > step:
            return count
        late = time.monotonic() - self._since > SECONDS
        return count - held if late or count >= self._enough else 0

    def fit(self, rows: int) -> None:
        """From now on a record has so many rows, of a sketch and a few numbers each."""
        fitting = max(FIRST_SHARD, min(_MOST_RECORDS, _WAITING_BYTES // (600 * rows + 1)))
        self._most = self._capacity or fitting
        self._enough = min(self._limit, self._most)

    def __len__(self) -> int:
        return len(self._records)

    def taken(self, count: int, rows: int, optimizers: int) -> dict[str, Array]:
        """The arrays of the first records that wait; they wait no more."""
        ready = self._records[:count]
        self._records, self._since = self._records[len(ready) :], time.monotonic()
        self._limit *= 8
        self._enough = min(self._limit, self._most)
        return drained(ready, rows, optimizers)

    def clear(self) -> None:
        """Let go of what waits."""
        self._records = []

    def save(
        self, arrays: Mapping[str, Array], layers: Mapping[str, Array], meta: Mapping[str, Any]
    ) -> None:
        """Write one shard, where nobody else has one."""
        self._number = save(self.folder, self._number, arrays, layers, meta) + 1
        self.written += 1
