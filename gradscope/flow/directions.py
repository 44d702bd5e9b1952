"""Directions of gradients, from exact cosines or from count-sketches of k numbers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gradscope.flow.records.layers import Basis
from gradscope.flow.robust import Array
from gradscope.flow.series import Series
from gradscope.histories.history import Integers, Sketches

_BLOCK = 1 << 22


@dataclass(frozen=True, eq=False)
class Cosines:
    """Cosines of successive gradients: ``cosine[i]`` is of records ``before[i]``, ``after[i]``.

    float64 [P, L], NaN where either gradient is zero or absent; all pairs are ``lag`` steps apart.
    ``error`` is the standard error of each, 0 when ``basis`` is "exact".
    """

    cosine: Array
    before: Integers
    after: Integers
    lag: int
    basis: Basis
    error: Array


def cosines(series: Series) -> Cosines | None:
    """Cosines to the record before, at the commonest lag. None when the history has no directions.

    Exact ones where the file has them; otherwise maximum-likelihood estimates from sketches.
    """
    if series.exact is not None and np.isfinite(series.exact.cosine).any():
        return _exact(series)
    if series.sketches is not None and len(series.sketches.index) > 1:
        return _sketched(series, series.sketches)
    return None


def _modal(gaps: NDArray[np.int64]) -> int:
    values, counts = np.unique(gaps, return_counts=True)
    return int(values[np.argmax(counts)])


def _exact(series: Series) -> Cosines:
    """``lag`` of the file counts records; pairs are kept at the commonest distance in steps."""
    assert series.exact is not None
    lags = np.where(np.isfinite(series.exact.cosine), series.exact.lag, 0)
    modal = _modal(lags[lags > 0]) if (lags > 0).any() else 1
    after = np.arange(modal, len(series.steps))
    before = after - modal
    gaps = series.steps[after] - series.steps[before]
    lag = _modal(gaps) if len(gaps) else 1
    kept = gaps == lag
    after, before = after[kept], before[kept]
    cosine = np.where(lags[after] == modal, series.exact.cosine[after].astype(np.float64), np.nan)
    return Cosines(cosine, before, after, lag, "exact", np.zeros_like(cosine))


def _sketched(series: Series, sketches: Sketches) -> Cosines:
    steps = series.steps[sketches.index]
    gaps = np.diff(steps)
    lag = _modal(gaps)
    pairs = np.flatnonzero(gaps == lag)
    rows = max(1, _BLOCK // max(1, sketches.values[0].size))
    found = np.concatenate(
        [_of_pairs(sketches, pairs[i : i + rows]) for i in range(0, len(pairs), rows)]
    )
    error = (1 - found**2) / np.sqrt(sketches.width * (1 + found**2))
    before, after = sketches.index[pairs], sketches.index[pairs + 1]
    return Cosines(found, before, after, lag, "sketch", error)


def _of_pairs(sketches: Sketches, pairs: NDArray[np.int64]) -> Array:
    a = sketches.values[pairs].astype(np.float64)
    b = sketches.values[pairs + 1].astype(np.float64)
    inner = np.einsum("plk,plk->pl", a, b)
    return estimate(inner, np.einsum("plk,plk->pl", a, a), np.einsum("plk,plk->pl", b, b))


def estimate(inner: Array, first: Array, second: Array) -> Array:
    """Cosine of two unit vectors from the inner product and squared norms of their sketches.

    Maximum likelihood with the norms known (Li, Hastie & Church 2006): the root in [-1, 1] of
    a^3 - a^2 d + a (m1 + m2 - 1) - d. Standard error (1 - a^2) / sqrt(k (1 + a^2)). NaN where a
    sketch is all zero.
    """
    low, high = np.full(inner.shape, -1.0), np.full(inner.shape, 1.0)
    excess = first + second - 1
    for _ in range(48):
        middle = 0.5 * (low + high)
        rising = ((middle - inner) * middle + excess) * middle - inner < 0
        low, high = np.where(rising, middle, low), np.where(rising, high, middle)
    root: Array = np.where((first > 0) & (second > 0), 0.5 * (low + high), np.nan)
    return root


@dataclass(frozen=True, eq=False)
class Window:
    """Up to ``records`` sketches that end at one record: their sums say how gradients agree."""

    values: NDArray[np.float32]

    def total(self) -> tuple[Array, NDArray[np.int64]]:
        """Sum of the sketches [L, k], and how many of each layer are not all zero [L]."""
        some = self.values.any(axis=2)
        return self.values.sum(axis=0, dtype=np.float64), some.sum(axis=0)


def pairwise_cosine(window: Window) -> Array:
    """Mean cosine of all pairs of a window's unit gradients, [L]; NaN with fewer than two.

    (|sum|^2 - m) / (m (m - 1)), at least -1/(m - 1). The squared sketch norms, whose mean is one,
    stand for m, which takes their noise out.
    """
    total, count = window.total()
    own = np.einsum("slk,slk->l", window.values, window.values, dtype=np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        mean: Array = (np.einsum("lk,lk->l", total, total) - own) / (count * (count - 1))
    return np.where(count > 1, np.clip(mean, -1, 1), np.nan)


def turned(now: Window, before: Window) -> Array:
    """Cosine of two windows' mean directions, [L]."""
    a, b = now.total()[0], before.total()[0]
    scale = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        cosine: Array = np.einsum("lk,lk->l", a, b) / scale
    return cosine
