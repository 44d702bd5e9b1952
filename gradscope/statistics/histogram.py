"""Counts of stored codes, kept by the codes that occur: most tensors are far smaller than 2^17."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

_tables = threading.local()


@dataclass(frozen=True, slots=True)
class Histogram:
    """How often each code occurs: codes ascending, each with a count above zero."""

    codes: npt.NDArray[np.intp]
    counts: npt.NDArray[np.int64]

    @classmethod
    def among(cls, table: Array, codes: Array) -> Histogram:
        """What a table has counted, of which only some codes can be there (ascending)."""
        counts = table[codes]
        present = counts > 0
        return cls(codes[present].astype(np.intp), counts[present].astype(np.int64))

    @classmethod
    def of(cls, table: Array) -> Histogram:
        """What a table has counted."""
        return cls.among(table, np.flatnonzero(table))

    def dense(self, size: int) -> npt.NDArray[np.int64]:
        """The counts of all codes."""
        table = np.zeros(size, np.int64)
        table[self.codes] = self.counts
        return table

    def merge(self, other: Histogram) -> Histogram:
        """The counts of both."""
        size = 1 + max(self.codes.max(initial=-1), other.codes.max(initial=-1))
        table = np.zeros(size, np.int64)
        table[self.codes] = self.counts
        table[other.codes] += other.counts
        return Histogram.of(table)

    def ordered(self, rank: npt.NDArray[np.intp]) -> Histogram:
        """By ascending ``rank`` of each code, without the codes whose rank is negative."""
        ranks = rank[self.codes]
        order = np.argsort(ranks, kind="stable")[np.count_nonzero(ranks < 0) :]
        return Histogram(self.codes[order], self.counts[order])


@contextmanager
def cleared_after(size: int, codes: Array) -> Iterator[npt.NDArray[np.uint32]]:
    """A table of zeros of this thread, of which only these codes may be counted in.

    Clearing those again costs what they are, not what the table is.
    """
    kept: dict[int, npt.NDArray[np.uint32]] = _tables.__dict__.setdefault("kept", {})
    table = kept.pop(size, None)
    if table is None:
        table = np.zeros(size, np.uint32)
    yield table
    table[codes] = 0
    kept[size] = table
