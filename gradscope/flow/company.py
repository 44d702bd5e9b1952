"""What else changed where something rose: the learning rate, the gradient norm, the steps."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradscope.flow.robust import Array, nanmedian
from gradscope.flow.series import Series

#: Records on either side of an onset that are compared.
_AROUND = 8


def company(series: Series, record: int) -> dict[str, float | None]:
    """Learning rate, gradient norm, size and direction of steps where a loss rose."""
    first, step = max(0, record - _AROUND), max(0, record - 1)
    total = series.total
    return {
        "learning_rate_factor": rate_factor(series, record),
        "gradient_factor": max(
            (
                factor
                for end in (record + 2 * _AROUND, None)
                if (factor := _factor(total, slice(first, record), slice(record, end))) is not None
            ),
            default=None,
        ),
        "update_ratio": _largest(series.update_ratio, slice(step, record + _AROUND)),
        "descent": _median(series.history.update_cosine, slice(first, None)),
    }


def rate_factor(series: Series, record: int) -> float | None:
    """By which factor the learning rate was another from a record on; None where unknown.

    The step that raised what is seen at a record was made one record before.
    """
    rates = series.history.lr
    if rates is None or not rates.size:
        return None
    rate = np.asarray(rates, np.float64).max(axis=1)
    first, step = max(0, record - _AROUND), max(0, record - 1)
    return _factor(rate, slice(first, max(step, 1)), slice(step, record + _AROUND))


def _factor(values: Array, before: slice, after: slice) -> float | None:
    """Median after over median before; None where either is unknown or zero."""
    one, two = nanmedian(values[before]), nanmedian(values[after])
    return float(two / one) if one > 0 and math.isfinite(two) else None


def _largest(values: Array | None, part: slice) -> float | None:
    """The greatest of the median layer's values over some records."""
    if values is None:
        return None
    medians = nanmedian(values[part], axis=1)
    known = medians[np.isfinite(medians)]
    return float(known.max()) if len(known) else None


def _median(values: NDArray[np.floating[Any]] | None, part: slice) -> float | None:
    found = math.nan if values is None else float(nanmedian(values[part]))
    return found if math.isfinite(found) else None
