"""Median and spread of what came before each record: the compiled loop of the spike test."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from gradscope.compiled import kernel
from gradscope.flow.robust import GAUSSIAN, Array


def trailing(values: Array, window: int, least: int) -> tuple[Array, Array]:
    """Median and 1.4826 MAD of up to ``window`` finite values before each record, both [T, L].

    The record itself is left out, so that a spike does not hide in its own reference; NaN where
    fewer than ``least`` precede it. Linear in T x L.
    """
    medians = np.full(values.shape, np.nan)
    spreads = np.full(values.shape, np.nan)
    _trailing(np.ascontiguousarray(values), window, least, GAUSSIAN, medians, spreads)
    return medians, spreads


def leaps(values: Array, window: int, rise: float) -> NDArray[np.bool_]:
    """Where a value lies more than ``rise`` above the median of up to ``window`` before it, [T, L].

    Finite values alone count. The same median as ``trailing`` gives, record by record over all
    layers, because that is how they lie in memory.
    """
    found = np.zeros(values.shape, np.bool_)
    _leaps(np.ascontiguousarray(values), window, rise, found)
    return found


def following(values: Array, where: NDArray[np.bool_], window: int) -> Array:
    """Median of up to ``window`` finite values after the cells that are set; NaN elsewhere."""
    found = np.full(values.shape, np.nan)
    _following(np.ascontiguousarray(values), where, np.empty(window), found)
    return found


@kernel()
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


@kernel()
def _leaps(values, window, rise, found):  # type: ignore[no-untyped-def]
    records, layers = values.shape
    ordered = np.empty((layers, window))
    arrival = np.empty((layers, window))
    counts = np.zeros(layers, np.int64)
    oldest = np.zeros(layers, np.int64)
    for t in range(records):
        for layer in range(layers):
            v = values[t, layer]
            if not np.isfinite(v):
                continue
            before, count = ordered[layer], counts[layer]
            if count and v - before[0] > rise:
                found[t, layer] = v - _middle(before, count) > rise
            at = oldest[layer]
            if count < window:
                _insert(before, count, v)
                counts[layer] = count + 1
            else:
                _exchange(before, arrival[layer, at], v)
            arrival[layer, at] = v
            oldest[layer] = at + 1 if at + 1 < window else 0


@kernel()
def _trailing(values, window, least, factor, medians, spreads):  # type: ignore[no-untyped-def]
    records, layers = values.shape
    ordered = np.empty(window)
    arrival = np.empty(window)
    for layer in range(layers):
        count, oldest = 0, 0
        for t in range(records):
            if count >= least:
                middle = _middle(ordered, count)
                medians[t, layer] = middle
                spreads[t, layer] = factor * _mad(ordered, count, middle)
            v = values[t, layer]
            if not np.isfinite(v):
                continue
            if count == window:
                _remove(ordered, count, arrival[oldest])
                oldest = (oldest + 1) % window
                count -= 1
            arrival[(oldest + count) % window] = v
            _insert(ordered, count, v)
            count += 1


@kernel()
def _middle(ordered, count):  # type: ignore[no-untyped-def]
    half = count // 2
    if count % 2:
        return ordered[half]
    return 0.5 * (ordered[half - 1] + ordered[half])


@kernel()
def _mad(ordered, count, middle):  # type: ignore[no-untyped-def]
    """Median distance to the middle: the sorted values are merged outwards from it."""
    right = np.searchsorted(ordered[:count], middle)
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
def _exchange(ordered, old, new):  # type: ignore[no-untyped-def]
    at = 0
    while ordered[at] != old:
        at += 1
    while at + 1 < len(ordered) and ordered[at + 1] < new:
        ordered[at] = ordered[at + 1]
        at += 1
    while at > 0 and ordered[at - 1] > new:
        ordered[at] = ordered[at - 1]
        at -= 1
    ordered[at] = new


@kernel()
def _remove(ordered, count, value):  # type: ignore[no-untyped-def]
    for at in range(np.searchsorted(ordered[:count], value), count - 1):
        ordered[at] = ordered[at + 1]
