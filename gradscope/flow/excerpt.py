"""A part of a history."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradscope.histories.history import Exact, History, Sketches


def between(history: History, first: int | None, last: int | None) -> History:
    """The records of steps ``first`` to ``last``, both included."""
    steps = history.steps
    kept = np.ones(len(steps), bool)
    if first is not None:
        kept &= steps >= first
    if last is not None:
        kept &= steps <= last
    return history if kept.all() else _of_records(history, np.flatnonzero(kept))


_BY_RECORD = (
    "steps",
    "l2",
    "status",
    "max_abs",
    "mean_abs",
    "mean",
    "zero_fraction",
    "n_nan",
    "n_inf",
    "param_l2",
    "update_l2",
    "update_cosine",
    "loss",
    "optimizer_loss",
    "total_l2",
    "clip_coefficient",
    "loss_scale",
    "skipped",
    "lr",
    "micro_mean_square",
    "micro_count",
    "edge_flow",
)


def _of_records(history: History, records: NDArray[np.int64]) -> History:
    changed: dict[str, Any] = {
        name: array[records] for name in _BY_RECORD if (array := getattr(history, name)) is not None
    }
    if history.sketches is not None:
        place = {int(old): new for new, old in enumerate(records)}
        kept = [i for i, t in enumerate(history.sketches.index) if int(t) in place]
        index = np.array([place[int(history.sketches.index[i])] for i in kept], dtype=np.int64)
        changed["sketches"] = Sketches(history.sketches.values[kept], index)
    if history.exact is not None:
        changed["exact"] = Exact(history.exact.cosine[records], history.exact.lag[records])
    return replace(history, **changed)
