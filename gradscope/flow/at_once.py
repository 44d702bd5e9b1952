"""Whether a loss jumped though the weights had not: what they are asked is another thing then.

A rate that is too high moves the weights before the loss can rise. Labels that were shuffled, a new
shard or stage, other preprocessing raise it under weights that are what they were.
"""

from __future__ import annotations

import numpy as np

from gradscope.flow.robust import Array, nanmedian
from gradscope.flow.series import Series

#: Records after a jump whose median is its height, and before it that it has to stand above.
_JUST_AFTER = 8
#: Records before it that tell what is usual, at least and at most.
_LEAST, _USUAL = 4, 32
#: How many times what is usual the last step, or the last way of the weights, may be.
_TIMES = 3.0
#: A way of this many nats a record is none.
_STILL = 0.01


def at_once(series: Series, loss: Array, record: int, low: float) -> bool:
    """Whether a loss rose from ``low`` half of its way at one record, and no weight moved before.

    False where neither steps nor norms of weights tell.
    """
    just_before = loss[max(0, record - _JUST_AFTER) : record]
    if not np.isfinite(just_before).any():
        return False
    usual, height = np.nanmax(just_before), nanmedian(loss[record : record + _JUST_AFTER]) - low
    if not loss[record] >= max(usual + height / 2, _TIMES * usual):
        return False
    signs = [_usual_step(series, record), _usual_way(series, record)]
    return False not in signs and True in signs


def _usual_step(series: Series, record: int) -> bool | None:
    """Whether the last step before a record is as large as those before; None if unknown."""
    if series.median_update is None:
        return None
    known = series.median_update[:record]
    known = known[np.isfinite(known)]
    if len(known) <= _LEAST:
        return None
    return bool(known[-1] <= _TIMES * nanmedian(known[-1 - _USUAL : -1]))


def _usual_way(series: Series, record: int) -> bool | None:
    """Whether no weight's norm changed more until a record than it does; None if unknown."""
    norms = series.history.param_l2
    if norms is None:
        return None
    part = np.asarray(norms[max(0, record - _USUAL) : record + 1], dtype=np.float64)
    steps = series.steps[max(0, record - _USUAL) : record + 1]
    known = np.flatnonzero(np.isfinite(part).any(axis=1))
    if len(known) <= _LEAST or known[-1] != len(part) - 1:
        return None
    with np.errstate(divide="ignore", invalid="ignore"):
        way = np.abs(np.diff(np.log(part[known]), axis=0))
    a_step = np.nanmax(np.where(np.isfinite(way), way, 0.0), axis=1) / np.diff(steps[known])
    last = int(np.diff(steps[known])[-1])
    return bool(a_step[-1] * last <= max(_STILL, _TIMES * float(a_step[:-1].max()) * last))
