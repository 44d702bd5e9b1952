"""Median and spread of what came before each record: the compiled loop of the spike test."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from gradscope.compiled import kernel
from gradscope.flow.robust import GAUSSIAN, Array


def trailing(
    values: Array, window: int, least: int, where: NDArray[np.bool_] | None = None
) -> tuple[Array, Array]:
    """Median and 1.4826 MAD of up to ``window`` finite values before each record, both [T, L].

    The record itself is left out, so that a spike does not hide in its own reference; NaN where
    fewer than ``least`` precede it, and outside of ``where``. Linear in T x L.
    """
    found = np.full((2, *values.shape), np.nan)
    wanted = np.ones(values.shape, np.bool_) if where is None else where
    values, wanted = np.ascontiguousarray(values), np.ascontiguousarray(wanted)
    _trailing(values, wanted, least, GAUSSIAN, np.empty(window), found)
    return found[0], found[1]


def leaps(values: Array, window: int, rise: float) -> NDArray[np.bool_]:
    """Where a value lies more than ``rise`` above the median of up to ``window`` before it, [T, L].

    Finite values alone count. It is looked for where blocks of so many records rise by as much
    over the least of themselves and of the block before, which few do.
    """
    found = np.zeros(values.shape, np.bool_)
    bounds = np.empty((3, values.shape[1]))
    holes = np.zeros(values.shape[1], np.bool_)
    _leaps(np.ascontiguousarray(values), rise, np.empty(window), bounds, holes, found)
    return found


def following(values: Array, where: NDArray[np.bool_], window: int) -> Array:
    """Median of up to ``window`` finite values after the cells that are set; NaN elsewhere."""
    found = np.full(values.shape, np.nan)
    values, where = np.ascontiguousarray(values), np.ascontiguousarray(where)
    _following(values, where, np.empty(window), found)
    return found


@kernel(alone=True)
def _following(values, where, ordered, found):  # type: ignore[no-untyped-def]
    records, layers = values.shape
    for t in range(records):
        for layer in range(layers):
            if not where[t, layer]:
                continue
            count, at = 0, t + 1
            while at < records and count < len(ordered):
                if np.isfinite(values[at, layer]):
                    _insert(ordered, count, values[at, layer])
                    count += 1
                at += 1
            if count:
                found[t, layer] = _middle(ordered, count)


@kernel(alone=True)
def _leaps(values, rise, ordered, bounds, holes, found):  # type: ignore[no-untyped-def]
    """``ordered`` [window], ``bounds`` [3, L] and ``holes`` [L], which is False, are worked in."""
    records, layers = values.shape
    window = ordered.shape[0]
    before, low, high = bounds[0], bounds[1], bounds[2]
    for layer in range(layers):
        before[layer] = np.inf
    for block in range((records + window - 1) // window):
        first = block * window
        end = min(first + window, records)
        for layer in range(layers):
            low[layer], high[layer] = np.inf, -np.inf
        for t in range(first, end):
            for layer in range(layers):
                v = values[t, layer]
                holes[layer] |= not np.isfinite(v)
                low[layer] = min(low[layer], v)
                high[layer] = max(high[layer], v)
        for layer in range(layers):
            if holes[layer] or high[layer] - min(low[layer], before[layer]) > rise:
                for t in range(first, end):
                    found[t, layer] = _leaps_at(values[:, layer], t, rise, ordered)
        for layer in range(layers):
            before[layer] = low[layer]


@kernel()
def _leaps_at(values, t, rise, ordered):  # type: ignore[no-untyped-def]
    if not np.isfinite(values[t]):
        return False
    count = _gather(values, t, ordered)
    return count > 0 and values[t] - _middle(ordered, count) > rise


@kernel()
def _gather(values, end, ordered):  # type: ignore[no-untyped-def]
    """The last finite values before a record, sorted: as many as there is room for, or are."""
    count, at = 0, end - 1
    while at >= 0 and count < len(ordered):
        if np.isfinite(values[at]):
            _insert(ordered, count, values[at])
            count += 1
        at -= 1
    return count


@kernel(alone=True)
def _trailing(values, where, least, factor, ordered, found):  # type: ignore[no-untyped-def]
    """Each window is moved on from the last one that was wanted, or made anew."""
    records, layers = values.shape
    window = ordered.shape[0]
    for layer in range(layers):
        column = values[:, layer]
        count, oldest, last = 0, 0, -window - 1
        for t in range(records):
            if not where[t, layer]:
                continue
            if t - last > window:
                count = _gather(column, t, ordered)
                oldest = _oldest(column, t, count)
            else:
                for new in range(last, t):
                    if not np.isfinite(column[new]):
                        continue
                    if count == window:
                        while not np.isfinite(column[oldest]):
                            oldest += 1
                        _remove(ordered, count, column[oldest])
                        oldest += 1
                        count -= 1
                    _insert(ordered, count, column[new])
                    count += 1
            last = t
            if count >= least and count > 0:
                middle = _middle(ordered, count)
                found[0, t, layer] = middle
                found[1, t, layer] = factor * _mad(ordered, count, middle)


@kernel()
def _oldest(values, end, count):  # type: ignore[no-untyped-def]
    """The record of the first of so many finite values before another."""
    at = end
    while count > 0:
        at -= 1
        count -= np.isfinite(values[at])
    return at


@kernel()
def _middle(ordered, count):  # type: ignore[no-untyped-def]
    half = count // 2
    if count % 2:
        return ordered[half]
    return 0.5 * (ordered[half - 1] + ordered[half])


@kernel()
def _mad(ordered, count, middle):  # type: ignore[no-untyped-def]
    """Median distance to the middle: the sorted values are merged outwards from it."""
    right = _place(ordered, count, middle)
    left = right - 1
    previous = distance = 0.0
    for _ in range(count // 2 + 1):
        previous = distance
        if left < 0 or (right < count and ordered[right] - middle < middle - ordered[left]):
            distance = ordered[right] - middle
            right += 1
        else:
            distance = middle - ordered[left]
            left -= 1
    return distance if count % 2 else 0.5 * (previous + distance)


@kernel()
def _insert(ordered, count, value):  # type: ignore[no-untyped-def]
    at = count
    while at > 0 and ordered[at - 1] > value:
        ordered[at] = ordered[at - 1]
        at -= 1
    ordered[at] = value


@kernel()
def _remove(ordered, count, value):  # type: ignore[no-untyped-def]
    for at in range(_place(ordered, count, value), count - 1):
        ordered[at] = ordered[at + 1]


@kernel()
def _place(ordered, count, value):  # type: ignore[no-untyped-def]
    """Where a value comes first among so many."""
    low, high = 0, count
    while low < high:
        half = (low + high) // 2
        if ordered[half] < value:
            low = half + 1
        else:
            high = half
    return low
