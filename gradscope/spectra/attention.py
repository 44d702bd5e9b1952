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
    no logit exceeds, rotated or not; both are None where the input is not known.
    """

    norms: Values
    ranks: Values
    typical: Values | None
    bounds: Values | None


def heads(query: Side, key: Side, size: int, given: Input | None) -> Heads:
    """The logits qᵀk / √size of every head of so many rows; key heads may serve several."""
    q, k = (_split(side, size, given) for side in (query, key))
    shared = len(q.matrix) // len(k.matrix)
    k = _Split(*(np.repeat(part, shared, axis=0) for part in (k.plain, k.matrix, k.constant)))
    products = np.stack([_singular(a, b) for a, b in zip(q.plain, k.plain, strict=True)])
    ranks = [effective_rank(s) or 0.0 for s in products]
    norms = products[:, 0] / np.sqrt(size)
    if given is None:
        return Heads(norms, np.array(ranks), None, None)
    through = np.stack([_singular(a, b) for a, b in zip(q.matrix, k.matrix, strict=True)])
    typical = np.sqrt((through**2).sum(axis=1) / size)
    return Heads(norms, np.array(ranks), typical, q.longest() * k.longest() / np.sqrt(size))


@dataclass(frozen=True, slots=True)
class _Split:
    """By head: the matrix as stored, with the gain, and what is added to its product."""

    plain: Values
    matrix: Values
    constant: Values

    def longest(self) -> Values:
        """The greatest length that a query or key can have."""
        width = self.matrix.shape[2]
        norms = np.linalg.norm(self.matrix, 2, axis=(1, 2))
        return np.asarray(norms * np.sqrt(width) + np.linalg.norm(self.constant, axis=1))


def _split(side: Side, size: int, given: Input | None) -> _Split:
    plain = side.matrix.astype(np.float64)
    bias = 0.0 if side.bias is None else side.bias.astype(np.float64)
    constant = np.zeros(len(plain)) + bias
    matrix = plain
    if given is not None:
        matrix = plain * given.gain
        constant = constant + (0.0 if given.offset is None else plain @ given.offset)
    by_head = (-1, size, plain.shape[1])
    return _Split(plain.reshape(by_head), matrix.reshape(by_head), constant.reshape(-1, size))


def _singular(q: Values, k: Values) -> Values:
    """Of qᵀ k, by the triangles of both: a decomposition of head times head."""
    left, right = (np.asarray(np.linalg.qr(side.T, mode="r")) for side in (q, k))
    return np.asarray(np.linalg.svd(left @ right.T, compute_uv=False))
