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
class Input:
    """What a norm hands on: gain * x + offset, where |x|² is at most the width of the norm."""

    gain: Array
    offset: Array | None = None


@dataclass(frozen=True, slots=True)
class Side:
    """The queries or the keys: matrix [heads * size, width], bias [heads * size] or None.

    ``given`` is the norm before, None where it is not known; ``normed`` that of the queries
    themselves: of each head, gain [size] or [heads, size], or of all together, [heads * size].
    """

    matrix: Array
    bias: Array | None = None
    given: Input | None = None
    normed: Input | None = None


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
    query: Side, key: Side, size: int, value: Array | None = None, scale: float | None = None
) -> Heads:
    """The logits scale · qᵀk of every head of so many rows; key heads may serve several.

    ``value`` [heads * size, width] is what heads hand on; None where it is not known. ``scale`` is
    1 / √size unless told.
    """
    scale = 1 / np.sqrt(size) if scale is None else scale
    q, k = (_split(side, size) for side in (query, key))
    shared = len(q.plain) // len(k.plain)
    products = _singular(q.plain.swapaxes(1, 2) @ np.repeat(k.plain, shared, axis=0))
    norms = products[:, 0] / np.sqrt(size)
    typical = bounds = None
    if q.through is not None and k.through is not None:
        through = q.through.swapaxes(1, 2) @ np.repeat(k.through, shared, axis=0)
        typical = scale * np.sqrt((through**2).sum(axis=(1, 2)))
        bounds = scale * q.longest * np.repeat(k.longest, shared)
    own = [q.plain, k.plain] + ([] if value is None else [_triangles(value, size)])
    ranks = [_ranks(_singular(triangles)) for triangles in own]
    return Heads(
        norms, _ranks(products), typical, bounds,
        ranks[0], ranks[1], ranks[2] if len(ranks) > 2 else None,
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Split:
    """By head the triangles [size, ·] of the matrix as stored and of what acts on inputs of unit
    variance, None where these are not known, and the greatest length of a query or key.
    """

    plain: Values
    through: Values | None
    longest: Values


def _split(side: Side, size: int) -> _Split:
    plain = _triangles(side.matrix, size)
    if side.normed is not None:
        return _normed(plain, side.normed, size)
    if side.given is None:
        return _Split(plain, None, np.full(len(plain), np.inf))
    gain, offset = side.given.gain, side.given.offset
    through = _triangles(side.matrix * gain, size)
    bias = 0.0 if side.bias is None else side.bias.astype(np.float64)
    added = 0.0 if offset is None else side.matrix.astype(np.float64) @ offset
    constant = (np.zeros(len(side.matrix)) + bias + added).reshape(-1, size)
    norms = _singular(through)[:, 0] * np.sqrt(side.matrix.shape[1])
    return _Split(plain, through, norms + np.linalg.norm(constant, axis=1))


def _normed(plain: Values, norm: Input, size: int) -> _Split:
    """Of queries that are normed, whatever they are made of."""
    heads = len(plain)
    gain, offset = (_by_head(x, heads, size) for x in (norm.gain, norm.offset))
    together = norm.gain.ndim == 1 and norm.gain.size > size  # one head may have all the length
    longest = np.sqrt(heads * size if together else size) * np.abs(gain).max(axis=1)
    return _Split(plain, gain[:, :, None] * np.eye(size), longest + np.linalg.norm(offset, axis=1))


def _by_head(values: Array | None, heads: int, size: int) -> Values:
    """[heads, size] of what all heads share, or each has its own of."""
    if values is None:
        return np.zeros((heads, size))
    return np.broadcast_to(values.astype(np.float64).reshape(-1, size), (heads, size))


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
