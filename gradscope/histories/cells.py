"""The cells of tables: numbers, nothing, or Weights & Biases' histograms; and columns of them."""

from __future__ import annotations

import math
from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

#: What writers put where there is no value.
_EMPTY = frozenset(("", "null", "none", "na", "n/a"))


@dataclass(slots=True)
class Quantity:
    """One thing that was logged, such as a layer's norm or the loss: values and their records."""

    records: array[int] = field(default_factory=lambda: array("q"))
    values: array[float] = field(default_factory=lambda: array("d"))

    def add(self, record: int, value: float) -> None:
        """Append a value."""
        self.records.append(record)
        self.values.append(value)

    @property
    def at(self) -> NDArray[np.int64]:
        """Its records, as an array."""
        return np.frombuffer(self.records, np.int64) if self.records else np.empty(0, np.int64)

    @property
    def numbers(self) -> NDArray[np.float64]:
        """Its values, as an array."""
        return np.frombuffer(self.values) if self.values else np.empty(0)


def is_empty(value: object) -> bool:
    """Whether nothing was written."""
    return value is None or (isinstance(value, str) and value.strip().lower() in _EMPTY)


def is_cell(value: object) -> bool:
    """Whether something can be a number of a table: one, or nothing."""
    try:
        float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return is_empty(value) or binned(value) is not None
    return not isinstance(value, bool)


def binned(value: object) -> tuple[float, int] | None:
    """The L2 norm and the number of elements of W&B's histogram of a gradient."""
    if not isinstance(value, Mapping):
        return None
    try:
        counts = [float(count) for count in value["values"]]
        edges = _edges(value, len(counts))
        squares = (
            n * ((low + high) / 2) ** 2
            for n, (low, high) in zip(counts, pairwise(edges), strict=True)
        )
        return math.sqrt(sum(squares)), int(sum(counts))
    except (KeyError, TypeError, ValueError, OverflowError):
        return None


def _edges(value: Mapping[str, Any], count: int) -> list[float]:
    packed = value.get("packedBins")
    if not packed:
        return [float(edge) for edge in value["bins"]]
    return [float(packed["min"]) + i * float(packed["size"]) for i in range(count + 1)]
