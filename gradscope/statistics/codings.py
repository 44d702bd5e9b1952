"""What stored codes mean: the value of every code of the types of 16 bits and fewer."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from gradscope.checkpoints.tensors import DTYPE_BITS
from gradscope.statistics.dtypes import COMPLEX as COMPLEX
from gradscope.statistics.dtypes import FORMATS as FORMATS
from gradscope.statistics.dtypes import INTEGERS as INTEGERS
from gradscope.statistics.dtypes import MAGNITUDE as MAGNITUDE
from gradscope.statistics.dtypes import FloatFormat
from gradscope.statistics.dtypes import is_float as is_float

Values = npt.NDArray[np.float64]

#: Types whose 2^bits codes are few enough to count one by one.
CODED = frozenset(d for d in (*FORMATS, *INTEGERS) if DTYPE_BITS[d] <= 16)


@cache
def code_values(dtype: str) -> Values:
    """The float64 value of each code of a type of at most 16 bits, in code order."""
    bits = DTYPE_BITS[dtype]
    codes = np.arange(1 << bits, dtype=np.uint32)
    if dtype == "BOOL":
        values: npt.NDArray[Any] = (codes != 0).astype(np.float64)
    elif dtype in INTEGERS:
        values = codes.astype(f"u{bits // 8}").view(f"{dtype[0].lower()}{bits // 8}")
    else:
        values = _decode(codes, FORMATS[dtype], bits)
    values = values.astype(np.float64)
    values.setflags(write=False)
    return values


@cache
def greatest_finite(dtype: str) -> float:
    """The greatest finite value of a float type."""
    if dtype in ("F32", "F64"):
        return float(np.finfo(np.float32 if dtype == "F32" else np.float64).max)
    values = code_values(dtype)
    return float(values[np.isfinite(values)].max())


def decoded(dtype: str, stored: npt.NDArray[Any]) -> Values:
    """The float64 value of each stored element; of complex ones the magnitude."""
    if dtype in COMPLEX:
        stored = magnitude(stored)
    if dtype in CODED:
        return np.asarray(code_values(dtype)[stored])
    with np.errstate(invalid="ignore"):  # signalling NaNs
        return np.asarray(stored, np.float64)


def magnitude(stored: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The magnitudes of complex elements, in the type of their parts."""
    with np.errstate(over="ignore", invalid="ignore"):  # beyond the type's range, signalling NaNs
        whole = np.hypot(stored.real.astype(np.float64), stored.imag.astype(np.float64))
        return whole.astype(stored.real.dtype)


def _decode(codes: npt.NDArray[np.uint32], form: FloatFormat, bits: int) -> Values:
    mantissa = codes & ((1 << form.mantissa_bits) - 1)
    exponent = ((codes >> form.mantissa_bits) & ((1 << form.exponent_bits) - 1)).astype(np.int64)
    fraction = mantissa / (1 << form.mantissa_bits)
    if not form.signed:  # E8M0 is a power of two alone: no zero, no subnormals
        values = np.ldexp(1.0, exponent - form.bias)
    else:
        normal = np.ldexp(1 + fraction, exponent - form.bias)
        values = np.where(exponent == 0, np.ldexp(fraction, 1 - form.bias), normal)
        values = np.where(codes >> (bits - 1) == 1, -values, values)
    return _with_specials(values, codes, exponent, mantissa, form, bits)


def _with_specials(
    values: Values,
    codes: npt.NDArray[np.uint32],
    exponent: npt.NDArray[np.int64],
    mantissa: npt.NDArray[Any],
    form: FloatFormat,
    bits: int,
) -> Values:
    top = exponent == (1 << form.exponent_bits) - 1
    if form.special == "ieee":
        values = np.where(top, np.where(mantissa == 0, np.copysign(np.inf, values), np.nan), values)
    elif form.special == "fn":
        values = np.where(top & (mantissa == (1 << form.mantissa_bits) - 1), np.nan, values)
    elif form.special == "fnuz":
        values = np.where(codes == 1 << (bits - 1), np.nan, values)
    return values
