"""What was recorded of the run as a whole: loss, total gradient norm, learning rate."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradscope.flow.records.layers import Curves
from gradscope.flow.series import Series


def curves(series: Series, shown: range) -> Curves | None:
    """The curves at some records; None where there are no records.

    The total norm is the recorded one, or the root of the layers' summed squares.
    """
    if not len(shown):
        return None
    part = slice(shown.start, shown.stop)
    history = series.history
    rates = history.lr
    return Curves(
        steps=tuple(series.steps[part].tolist()),
        loss=_values(history.loss, part),
        total_norm=_values(_total(series), part),
        learning_rate=_values(None if rates is None or not rates.size else rates.max(axis=1), part),
    )


def _total(series: Series) -> NDArray[Any] | None:
    if series.history.total_l2 is not None:
        return series.history.total_l2
    if not series.layers:
        return None
    return np.where(np.isfinite(series.norm).any(axis=1), series.total, np.nan)


def _values(values: NDArray[Any] | None, part: slice) -> tuple[float | None, ...] | None:
    """NaN is how a record without a value is written."""
    if values is None:
        return None
    return tuple(None if np.isnan(v) else float(v) for v in values[part])
