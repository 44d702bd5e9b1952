"""Where each element of the parameters goes in their sketches."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import numpy as np

from gradscope.histories.sketching import seed_of
from gradscope.recording import measure
from gradscope.recording.kernels import hashed_to

Array = np.ndarray[Any, Any]


class Buckets:
    """A bucket for each element that is sketched, a byte each, eight to a word of ``words``.

    None when ``width`` is 0. ``begin`` [3, R + 1] is where each row's elements, words and
    ``chosen`` elements begin.
    """

    def __init__(self, names: Sequence[str], sizes: Sequence[int], width: int) -> None:
        rows = list(zip(names, sizes, strict=True))
        self.width = width
        subsets = [_subset(*row) if width else _NONE for row in rows]
        counts = [size if s is None else len(s) for size, s in zip(sizes, subsets, strict=True)]
        wide = [-(-count // 8) for count in counts]
        parted = [0 if s is None else len(s) for s in subsets]
        self.begin = np.array([[0, *accumulate(of)] for of in (sizes, wide, parted)], np.int64)
        self.chosen = np.concatenate([_NONE, *(s for s in subsets if s is not None)])
        self.words = np.empty(int(self.begin[1, -1]), np.uint64)
        pieces = np.split(self.words, self.begin[1, 1:-1])
        for name, piece, subset, count in zip(names, pieces, subsets, counts, strict=True):
            chosen = _NONE if subset is None else subset
            hashed_to(piece, chosen, count, seed_of(name))


_NONE = np.empty(0, np.int64)


def _subset(name: str, size: int) -> Array | None:
    """The elements that stand for all of a large row, None for all of any other."""
    found = measure.subset(name, size)
    return None if found is None else found.numpy()
