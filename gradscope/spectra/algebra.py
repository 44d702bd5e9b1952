"""The heavy algebra on the CPU: squared singular values of matrices, and the greatest one alone.

What a device does instead is in ``torch_algebra``; both are the same two functions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Values = npt.NDArray[np.float64]
#: The rows of a matrix, some at a time; asked again, they are read again or kept.
Chunks = Callable[[], Iterable[Array]]

#: The relative residual at which the greatest singular value is known well enough.
_ENOUGH = 2e-4
_MOST = 300


class Algebra(Protocol):
    """What a device computes."""

    def eigenvalues(self, chunks: Chunks, columns: int) -> Values:
        """The squared singular values of a matrix of at most as many columns as rows, ascending."""
        ...

    def norm(self, chunks: Chunks, columns: int) -> float:
        """The greatest singular value of a matrix, to a relative 1e-4."""
        ...


class Numpy:
    """On the CPU, by the BLAS and LAPACK that NumPy brings."""

    def eigenvalues(self, chunks: Chunks, columns: int) -> Values:
        """From the Gram matrix of the short side, in float64: exact to 1e-15 of the greatest."""
        gram = np.zeros((columns, columns))
        for part in _parts(chunks, columns):
            wide = part.astype(np.float64)
            gram += wide.T @ wide
        return np.asarray(np.maximum(np.linalg.eigvalsh(gram), 0.0))

    def norm(self, chunks: Chunks, columns: int) -> float:
        """By Lanczos' method on the Gram matrix, which is not formed."""

        def product(vector: Values) -> Values:
            narrow = vector.astype(np.float32)
            total = np.zeros(columns)
            for chunk in chunks():
                image = chunk @ narrow
                unit = float(np.abs(image).max()) or 1.0  # in float32, products may be too small
                total += unit * (chunk.T @ (image / image.dtype.type(unit))).astype(np.float64)
            return total

        return leading(product, columns)


#: Elements that are widened at once.
_WIDENED = 1 << 22


def _parts(chunks: Chunks, columns: int) -> Iterator[Array]:
    """The chunks in runs of rows, of which each has at least as many as columns but the last."""
    step = max(columns, _WIDENED // columns)
    for chunk in chunks():
        yield from (chunk[at : at + step] for at in range(0, len(chunk), step))


def leading(product: Callable[[Values], Values], n: int) -> float:
    """The square root of the greatest eigenvalue of a symmetric operator of n dimensions.

    Lanczos' method, every vector orthogonal to all before it, from a fixed start; until the
    residual is 2e-4 of the value, within which an eigenvalue lies.
    """
    vector = np.random.default_rng(0).standard_normal(n)
    basis = np.empty((min(_MOST, n), n))
    diagonal: list[float] = []
    beside: list[float] = []
    top = 0.0
    vector /= np.linalg.norm(vector)
    for step in range(len(basis)):
        basis[step] = vector
        image = product(vector)
        diagonal.append(float(vector @ image))
        known = basis[: step + 1]
        image -= known.T @ (known @ image)
        image -= known.T @ (known @ image)
        rest = float(np.linalg.norm(image))
        top, residual = _ritz(diagonal, beside, rest)
        if residual <= _ENOUGH * top:
            break
        beside.append(rest)
        vector = image / rest
    return float(np.sqrt(max(top, 0.0)))


def _ritz(diagonal: list[float], beside: list[float], rest: float) -> tuple[float, float]:
    """The greatest eigenvalue of the tridiagonal matrix so far, and the norm of its residual."""
    made = np.diag(diagonal) + np.diag(beside, 1) + np.diag(beside, -1)
    values, vectors = np.linalg.eigh(made)
    return float(values[-1]), abs(rest * float(vectors[-1, -1]))
