"""Half-precision gradients near the smallest numbers of their type."""

from __future__ import annotations

import numpy as np

from gradscope.flow.limits import ZERO_SHARE
from gradscope.flow.series import Mask, Series

#: The smallest normal float16, and how many times it an RMS has to be.
_SMALLEST = 6.103515625e-05
_MARGIN = 10.0
#: Share of zero elements from which gradients are lost; above ``ZERO_SHARE`` all are zero.
_ZEROS = 0.5


def underflow(series: Series) -> Mask:
    """Cells of float16 gradients half of which are zero, or whose RMS float16 cannot hold."""
    low: Mask = np.zeros(series.rms.shape, bool)
    if not series.half_gradients:
        return low
    if series.per_element:
        low = series.rms < _MARGIN * _SMALLEST
    zeros = series.zero_fraction
    return low if zeros is None else low | ((zeros > _ZEROS) & (zeros < ZERO_SHARE))
