"""Records that wait for their shard: how many, how long, and what becomes of them."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from gradscope.histories.history import Status
from gradscope.recording.columns import drained
from gradscope.recording.records import Array, Record
from gradscope.recording.rows import Rows
from gradscope.recording.shards import folder_for, save
from gradscope.recording.turns import Place
from gradscope.text import plural

#: The first shard has this many records, the next eight times as many, up to the capacity.
FIRST_SHARD = 4
#: Records wait no longer than this to be written, however few they are.
SECONDS = 30.0
#: Bytes that records may take where they wait, when no capacity is given, and how many at most.
_WAITING_BYTES = 1 << 24
_MOST_RECORDS = 1024

#: The arrays of a shard's rows, and its meta.
Described = tuple[Mapping[str, Array], Mapping[str, Any]]


class Spool:
    """The records of a run on their way into its folder.

    Raises UsageError when the folder holds another run and ``resume`` is False. Who does not write
    (another rank) keeps the same time, and throws its records away.
    """

    def __init__(
        self, folder: str | os.PathLike[str], resume: bool, capacity: int | None, optimizers: int,
        writes: bool,
    ) -> None:  # fmt: skip
        self.folder, self._number = folder_for(folder, resume) if writes else (os.fspath(folder), 0)
        self._optimizers, self._writes, self._written = optimizers, writes, 0
        self._records: list[Record] = []
        self._capacity, self._limit = capacity, FIRST_SHARD
        self._most = self._enough = capacity or FIRST_SHARD
        self._since = time.monotonic()
        #: Whether a gradient so far was not finite.
        self.spoiled = False

    def __len__(self) -> int:
        return len(self._records)

    def add(self, record: Record, place: Place) -> None:
        """A capture whose step was seen; of several optimizers those of one round share a record.

        A step that is captured again replaces what it had.
        """
        if self._optimizers > 1:
            record.parts = [part for part in record.parts if part.owner in place.owners]
        if not record.parts:
            return
        record.step, record.skipped = place.step, place.skipped
        record.whole = len(place.owners) >= self._optimizers
        if record.loss is not None:
            record.losses = [(owner, record.loss) for owner in place.owners]
        if self._records and self._records[-1].step == place.step:
            record = _joined(self._records.pop(), record, place.owners)
        self._records.append(record)

    def due(self, step: int | None, held: int) -> int:
        """How many records should be written before one of ``step`` is taken.

        All when it cannot follow them, all but the last ``held`` when they are enough or have
        waited long.
        """
        count = len(self._records)
        if count == 0:
            return 0
        last = self._records[-1].step
        if step is not None and last is not None and last > step:
            return count
        late = time.monotonic() - self._since > SECONDS
        return count - held if late or count >= self._enough else 0

    def fit(self, rows: int) -> None:
        """From now on a record has so many rows, of a sketch and a few numbers each."""
        fitting = max(FIRST_SHARD, min(_MOST_RECORDS, _WAITING_BYTES // (600 * rows + 1)))
        self._most = self._capacity or fitting
        self._enough = min(self._limit, self._most)

    def write(self, count: int, rows: Rows, described: Callable[[Rows], Described]) -> None:
        """Write the first ``count`` records that wait as a shard, where nobody else has one."""
        arrays = drained(self._records[:count], len(rows), self._optimizers)
        recorded = arrays["grad/status"] == Status.RECORDED
        self.spoiled |= not bool(np.isfinite(arrays["grad/l2"][recorded]).all())
        if self._writes:
            self._save(arrays, rows, described)
        self._records, self._since = self._records[count:], time.monotonic()
        self._limit *= 8
        self._enough = min(self._limit, self._most)

    def _save(
        self, arrays: dict[str, Array], rows: Rows, described: Callable[[Rows], Described]
    ) -> None:
        try:
            self._number = save(self.folder, self._number, arrays, *described(rows)) + 1
            self._written += 1
        except Exception as error:
            if not rows.sharded:
                raise
            # The other ranks wait for this one at every record.
            self._writes = False
            self.say_failed(error)

    def clear(self) -> None:
        """Let go of what waits."""
        self._records = []

    def say_failed(self, error: Exception) -> None:
        """Warn that recording has stopped, and of what there is."""
        written = self._written
        kept = f"the {plural(written, 'shard')} written" if written else "nothing"
        warnings.warn(
            f"gradient recording stopped ({type(error).__name__}: {error}); training goes on, and "
            f"{kept} can be read in {self.folder}",
            RuntimeWarning,
            stacklevel=2,
        )


def _joined(first: Record, second: Record, owners: Sequence[int]) -> Record:
    """Two captures of one step: what the second, of some optimizers, has replaces the first's."""
    kept = [part for part in first.parts if part.owner not in owners]
    second.parts = [*kept, *second.parts]
    second.losses = (*first.losses, *second.losses)
    second.scalars = (*first.scalars, *second.scalars)
    second.whole &= not kept
    second.skipped |= first.skipped and bool(kept)
    return second
