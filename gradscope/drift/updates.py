"""What an adapter makes of a weight, some rows at a time, in float64: W + s B A, DoRA, tokens."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from gradscope.checkpoints.tensors import TensorRef
from gradscope.checkpoints.tiles import PIECE
from gradscope.weights.products import values

Values = npt.NDArray[np.float64]


class Update(Protocol):
    """What becomes of rows of a weight [rows, columns]."""

    @property
    def scale(self) -> float | None:
        """What its product is multiplied by; None where it has none."""
        ...

    def merged(self, first: int, weight: Values) -> Values:
        """What rows from ``first`` on become."""
        ...

    def terms(self, first: int, last: int) -> Values | float:
        """What was summed and rounded on the way, elementwise: s |B| |A|."""
        ...


@dataclass(frozen=True, slots=True)
class Product:
    """W + s B A, with B [rows, rank] and A [rank, columns]."""

    left: Values
    right: Values
    scale: float

    @property
    def shape(self) -> tuple[int, int]:
        """Of the weight."""
        return len(self.left), self.right.shape[1]

    @property
    def turned(self) -> Product:
        """Of a weight that is stored the other way round."""
        return Product(self.right.T, self.left.T, self.scale)

    def merged(self, first: int, weight: Values) -> Values:
        """With rows of the product."""
        left = self.left[first : first + len(weight)]
        return np.asarray(weight + self.scale * (left @ self.right))

    def terms(self, first: int, last: int) -> Values:
        """Of each element of the product, the sum of magnitudes."""
        return np.asarray(abs(self.scale) * (abs(self.left[first:last]) @ abs(self.right)))


@dataclass(frozen=True, slots=True)
class Dora:
    """m (W + s B A) / ‖W + s B A‖, by outputs (Liu et al. 2024, arXiv 2402.09353)."""

    product: Product
    #: m / ‖·‖ of every row [rows, 1], or of every column [1, columns].
    factors: Values

    @classmethod
    def of(cls, product: Product, magnitudes: Values, weight: TensorRef, rows: bool) -> Dora:
        """``rows`` says whether outputs are the rows of the weight as it is stored."""
        squares = np.zeros(product.shape[0 if rows else 1])
        for first, part in row_values(weight):
            whole = product.merged(first, part) ** 2
            if rows:
                squares[first : first + len(part)] = whole.sum(axis=1)
            else:
                squares += whole.sum(axis=0)
        factors = magnitudes / np.sqrt(squares)
        return cls(product, factors[:, None] if rows else factors[None])

    @property
    def scale(self) -> float:
        """Of the product."""
        return self.product.scale

    def _factors(self, first: int, last: int) -> Values:
        return self.factors if len(self.factors) == 1 else self.factors[first:last]

    def merged(self, first: int, weight: Values) -> Values:
        """With rows of the product, of the magnitudes that were learnt."""
        factors = self._factors(first, first + len(weight))
        return np.asarray(factors * self.product.merged(first, weight))

    def terms(self, first: int, last: int) -> Values:
        """Those of the product."""
        return np.asarray(abs(self._factors(first, last)) * self.product.terms(first, last))


@dataclass(frozen=True, slots=True)
class Stack:
    """W + s B A of every expert of a stack: B [experts, rows, rank], A [experts, rank, columns]."""

    left: Values
    right: Values
    scale: float

    @classmethod
    def of(cls, a: Values, b: Values, shape: tuple[int, ...], alpha: float, root: bool) -> Stack:
        """From PEFT's A [experts · rank, in] and B [out, rank · experts], of a weight stored as
        [experts, out, in] or [experts, in, out]; ``root`` for rsLoRA's scale.
        """
        experts, rank = shape[0], len(a) // shape[0]
        left = b.reshape(len(b), rank, experts).transpose(2, 0, 1)
        right = a.reshape(experts, rank, -1)
        if (left.shape[1], right.shape[2]) != shape[1:]:
            left, right = right.swapaxes(1, 2), left.swapaxes(1, 2)
        return cls(left, right, alpha / (math.sqrt(rank) if root else rank))

    def merged(self, first: int, weight: Values) -> Values:
        """With the products of some experts."""
        part = slice(first, first + len(weight))
        product = self.left[part] @ self.right[part]
        return np.asarray(weight + self.scale * product.reshape(weight.shape))

    def terms(self, first: int, last: int) -> Values:
        """Of each element of the products, the sum of magnitudes."""
        whole_ = abs(self.left[first:last]) @ abs(self.right[first:last])
        return np.asarray(abs(self.scale) * whole_.reshape(last - first, -1))


@dataclass(frozen=True, slots=True)
class Tokens:
    """Rows of a table that were trained themselves."""

    rows: Mapping[int, Values]
    scale: None = None

    def merged(self, first: int, weight: Values) -> Values:
        """With those rows in place of what was there."""
        found = weight.copy()
        for row, trained in self.rows.items():
            if first <= row < first + len(weight):
                found[row - first] = trained
        return found

    def terms(self, first: int, last: int) -> float:  # noqa: ARG002
        """Nothing is summed."""
        return 0.0


def row_values(ref: TensorRef) -> Iterator[tuple[int, Values]]:
    """Runs of rows of a weight as a matrix, with the first of each; of a vector, elements."""
    rows = ref.shape[0]
    width = ref.numel // rows
    step = max(1, PIECE // width)
    for first in range(0, rows, step):
        last = min(first + step, rows)
        yield first, values(ref, first * width, last * width).reshape(-1, width)


def whole(ref: TensorRef) -> Values:
    """All of a factor [shape[0], rest]."""
    return np.concatenate([part for _, part in row_values(ref)])
