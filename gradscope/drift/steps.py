"""The distance of a float type's values."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from gradscope.statistics.dtypes import FORMATS

Values = npt.NDArray[np.float64]


def step_of(x: Values, dtype: str) -> Values:
    """The distance of a type's values around each element."""
    form = FORMATS[dtype]
    exponent = np.maximum(np.frexp(x)[1] - 1, 1 - form.bias)
    return np.asarray(np.ldexp(1.0, exponent - form.mantissa_bits))
