"""The kinds of stored types: integers, complex pairs, and binary float formats."""

from __future__ import annotations

from dataclasses import dataclass

from gradscope.checkpoints.tensors import DTYPE_BITS

INTEGERS = frozenset({"U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64", "BOOL"})
COMPLEX = frozenset({"C64", "C128"})

#: The real float type a complex magnitude is computed in.
MAGNITUDE = {"C64": "F32", "C128": "F64"}


@dataclass(frozen=True, slots=True)
class FloatFormat:
    """A binary float format: field widths, bias, and which codes are not numbers.

    ``special`` is "ieee" (the greatest exponent holds Inf and NaN), "fn" (only the all-ones
    magnitude is NaN, no Inf), "fnuz" (only the code of -0 is NaN), or "none".
    Sources: IEEE 754-2019; Micikevicius et al. 2022 (arXiv 2209.05433) for E4M3 and E5M2;
    OCP Microscaling Formats v1.0 for F4, F6 and E8M0; Noune et al. 2022 (2206.02915) for FNUZ.
    """

    exponent_bits: int
    mantissa_bits: int
    bias: int
    special: str = "ieee"
    signed: bool = True

    @property
    def smallest_normal(self) -> float:
        """Least positive value with full precision."""
        return 2.0 ** (1 - self.bias)


FORMATS: dict[str, FloatFormat] = {
    "F64": FloatFormat(11, 52, 1023),
    "F32": FloatFormat(8, 23, 127),
    "BF16": FloatFormat(8, 7, 127),
    "F16": FloatFormat(5, 10, 15),
    "F8_E5M2": FloatFormat(5, 2, 15),
    "F8_E4M3": FloatFormat(4, 3, 7, "fn"),
    "F8_E5M2FNUZ": FloatFormat(5, 2, 16, "fnuz"),
    "F8_E4M3FNUZ": FloatFormat(4, 3, 8, "fnuz"),
    "F8_E8M0": FloatFormat(8, 0, 127, "fn", signed=False),
    "F6_E2M3": FloatFormat(2, 3, 1, "none"),
    "F6_E3M2": FloatFormat(3, 2, 3, "none"),
    "F4": FloatFormat(2, 1, 1, "none"),
}


def is_float(dtype: str) -> bool:
    """Whether a dtype has real floating-point elements."""
    return dtype in FORMATS


def is_narrow(dtype: str) -> bool:
    """Whether a dtype is a float of 8 bits or fewer, which means something only with a scale."""
    return dtype in FORMATS and DTYPE_BITS[dtype] <= 8
