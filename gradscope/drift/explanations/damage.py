"""Changes that nobody wanted: flipped bits, swapped bytes, zeros, values that are not finite."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from gradscope.checkpoints.tensors import DTYPE_BITS
from gradscope.drift import kernels
from gradscope.drift.explanations.subject import Subject
from gradscope.drift.result import Explanation
from gradscope.drift.second_look import codes_at, first_difference, same
from gradscope.statistics.dtypes import FORMATS
from gradscope.text import plural


def one_bit(s: Subject) -> Explanation | None:
    """A single bit of a single element."""
    if s.measures.changed != 1 or s.measures.ulps is None:
        return None
    place = first_difference(s.base, s.new)
    flipped = codes_at(s.base, place) ^ codes_at(s.new, place)
    if flipped.bit_count() != 1:
        return None
    index = [int(i) for i in np.unravel_index(place, s.base.shape)]
    bit = flipped.bit_length() - 1
    text = f"one bit differs: bit {bit} of element {index}{_meaning(s.base.dtype, bit)}"
    return Explanation(kind="bit-flip", text=text, residual=0.0, facts={"bit": bit})


def _meaning(dtype: str, bit: int) -> str:
    form = FORMATS[dtype]
    if bit == DTYPE_BITS[dtype] - 1 and form.signed:
        return " (the sign)"
    return " (exponent)" if bit >= form.mantissa_bits else " (mantissa)"


def non_finite(s: Subject) -> Explanation | None:
    """Elements that became NaN or infinite, other than by a cast."""
    count = s.measures.counts[kernels.ODD_NEW] - s.measures.counts[kernels.ODD_BASE]
    if count <= 0 or s.measures.roundings is not None:
        return None
    text = f"{plural(count, 'element')} became NaN or infinite"
    return Explanation(kind="non-finite", text=text, facts={"elements": count})


def byte_swapped(s: Subject) -> Explanation | None:
    """Elements in the other byte order."""
    wide = DTYPE_BITS[s.base.dtype] >= 16 and s.base.decoding is s.new.decoding is None
    if not wide or s.base.dtype != s.new.dtype or (s.measures.changed_fraction or 0) < 0.5:
        return None
    if not same(s.base, replace(s.new, big_endian=not s.new.big_endian)):
        return None
    return Explanation(
        kind="byte-swapped", text="the bytes of every element are swapped", residual=0.0
    )


def zeroed(s: Subject) -> Explanation | None:
    """All became zero."""
    if s.measures.finite and s.measures.base_norm and not s.measures.new_norm:
        return Explanation(kind="zeroed", text="every element became zero", residual=0.0)
    return None


def from_zero(s: Subject) -> Explanation | None:
    """All were zero."""
    if s.measures.finite and s.measures.new_norm and not s.measures.base_norm:
        return Explanation(kind="from-zero", text="every element was zero")
    return None
