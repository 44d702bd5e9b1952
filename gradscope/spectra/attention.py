"""How large the logits of an attention head can become, and how many dimensions it compares in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from gradscope.spectra.spectrum import effective_rank

Array = npt.NDArray[Any]
Values = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Side:
    """The queries or the keys: matrix [heads * size, width], bias [heads * size] or None."""

    matrix: Array
    bias: Array | None = None


@dataclass(frozen=True, slots=True)
class Input:
    """What the norm before an attention hands on: gain * x + offset, where |x|² is the width."""

    gain: Array
    offset: Array | None = None


@dataclass(frozen=True, slots=True)
class Heads:
    """Of each query head, with the key head that it compares to.

    ``norms`` are σ₁(W_qᵀ W_k) / √size and ``ranks`` the effective ranks of that product.
    ``typical`` is the deviation of logits of independent inputs of unit variance, ``bounds`` what
    no logit exceeds, rotated or not; both are None where the input is not known. The ranks of
    queries, keys and values are those of each head's own rows, of as many heads as each has.
    """

    norms: Values
    ranks: Values
    typical: Values | None
    bounds: Values | None
    query_ranks: Values
    key_ranks: Values
    value_ranks: Values | None


def heads(
    query: Side, key: Side, size: int, given: Input | None, value: Array | None = None
) -> Heads:
    """The logits qᵀk / √size of every head of so many rows; key heads may serve several.

    ``value`` [heads * size, width] is what heads hand on; None where it is not known.
    """
    q, k = (_split(side, size, given) for side in (query, key))
    shared = len(q.plain) // len(k.plain)
    products = _singular(q.plain.swapaxes(1, 2) @ np.repeat(k.plain, shared, axis=0))
    norms = products[:, 0] / np.sqrt(size)
    typical = bounds = None
    if given is not None:
        through = _singular(q.through.swapaxes(1, 2) @ np.repeat(k.through, shared, axis=0))
        typical = np.sqrt((through**2).sum(axis=1) / size)
        bounds = q.longest * np.repeat(k.longest, shared) / np.sqrt(size)
    own = [q.plain, k.plain] + ([] if value is None else [_triangles(value, size)])
    ranks = [_ranks(_singular(triangles)) for triangles in own]
    return Heads(
        norms, _ranks(products), typical, bounds,
        ranks[0], ranks[1], ranks[2] if len(ranks) > 2 else None,
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Split:
    """By head the triangles [size, ·] of the matrix as stored and of that with the gain, and the
    greatest length that a query or key can have.
    """

    plain: Values
    through: Values
    longest: Values


def _split(side: Side, size: int, given: Input | None) -> _Split:
    plain = _triangles(side.matrix, size)
    if given is None:
        return _Split(plain, plain, np.full(len(plain), np.inf))
    through = _triangles(side.matrix * given.gain, size)
    bias = 0.0 if side.bias is None else side.bias.astype(np.float64)
    offset = 0.0 if given.offset is None else side.matrix.astype(np.float64) @ given.offset
    constant = (np.zeros(len(side.matrix)) + bias + offset).reshape(-1, size)
    norms = _singular(through)[:, 0] * np.sqrt(side.matrix.shape[1])
    return _Split(plain, through, norms + np.linalg.norm(constant, axis=1))


def _triangles(matrix: Array, size: int) -> Values:
    """Of each head L [size, ·] in W = L Q, where Q has orthonormal rows."""
    by_head = matrix.astype(np.float64).reshape(-1, size, matrix.shape[1])
    triangles = np.asarray(np.linalg.qr(by_head.swapaxes(1, 2), mode="r"))
    return triangles.swapaxes(1, 2)


def _singular(matrices: Values) -> Values:
    return np.asarray(np.linalg.svd(matrices, compute_uv=False))


def _ranks(values: Values) -> Values:
    """0 of zeros."""
    return np.array([effective_rank(sigma) or 0.0 for sigma in values])
