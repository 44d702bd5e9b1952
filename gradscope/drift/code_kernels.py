"""The compiled loops over stored codes: what they stand for, how far apart they are, what rounds to
what. As in ``kernels``, block by block.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from gradscope.compiled import kernel
from gradscope.drift.kernels import BLOCK, count

# -- stored elements as numbers --------------------------------------------------------------------


@kernel(alone=True)
def decode_bf16(codes, bits):  # type: ignore[no-untyped-def]
    """Bfloat16 as the bits of float32."""
    for i in range(codes.shape[0]):
        bits[i] = np.uint32(codes[i]) << np.uint32(16)


@kernel(alone=True)
def decode_f16(codes, bits, values):  # type: ignore[no-untyped-def]
    """Float16 as float32; ``bits`` is ``values`` seen as integers."""
    for i in range(codes.shape[0]):
        magnitude = np.uint32(codes[i] & np.uint16(0x7FFF)) << np.uint32(13)
        special = np.uint32(0x7F800000) if magnitude >= np.uint32(0x0F800000) else np.uint32(0)
        sign = np.uint32(codes[i] & np.uint16(0x8000)) << np.uint32(16)
        bits[i] = magnitude | special | sign
    for i in range(values.shape[0]):
        values[i] *= np.float32(2.0**112)


@kernel(alone=True)
def decode_table(codes, table, values):  # type: ignore[no-untyped-def]
    """Each code's value, looked up."""
    for i in range(codes.shape[0]):
        values[i] = table[codes[i]]


# -- distances -------------------------------------------------------------------------------------


def _distances_in(kind: Any) -> Any:
    """The loop in integers of a type that holds the sum of any two magnitudes."""
    most_said = kind(min(np.iinfo(kind).max, np.iinfo(np.int64).max))

    @kernel()
    def apart(x, y, sign, limit, widths):  # type: ignore[no-untyped-def]
        """Distances as floats, and the greatest; 0 where there is none."""
        most = kind(0)
        for i in range(x.shape[0]):
            p = kind(x[i])
            q = kind(y[i])
            turned = kind((p ^ q) & sign) != 0
            p = kind(p & ~sign)
            q = kind(q & ~sign)
            d = kind(p + q) if turned else kind(max(p, q) - min(p, q))
            d = kind(0) if (p > limit) | (q > limit) else d
            widths[i] = d
            most = max(most, d)
        return np.int64(min(most, most_said))

    @kernel(alone=True)
    def distances(x, y, sign, limit, widths, bits, form, places, parts, table, counts):  # type: ignore[no-untyped-def]
        """How far apart two runs of codes of one type are.

        ``counts`` receives how many differ and the greatest distance in units in the last place;
        ``table`` counts the distances by the bits that they take. Codes whose magnitude is above
        ``limit`` are not numbers, and at no distance; ``sign`` is that bit alone. ``widths`` is
        [BLOCK] of floats that hold any distance, ``bits`` its view as integers, ``form`` where
        their exponents begin, and their bias; ``places`` [BLOCK] and ``parts`` are those of
        ``count``.
        """
        for block in range((x.shape[0] + BLOCK - 1) // BLOCK):
            a = x[block * BLOCK : (block + 1) * BLOCK]
            b = y[block * BLOCK : (block + 1) * BLOCK]
            n = a.shape[0]
            differing = 0
            for i in range(n):
                differing += a[i] != b[i]
            if differing == 0:
                table[0] += n
                continue
            counts[0] += differing
            counts[1] = max(counts[1], apart(a, b, sign, limit, widths))
            for i in range(n):  # a distance of 0 has the exponent field 0, of 1 that of the bias
                places[i] = np.uint8(max((bits[i] >> form[0]) - form[1] + 1, 0))
            count(places[:n], parts, table)

    return distances


#: By the bytes of a code. Distances of 16 bits fit into float32, and those of 32 into float64.
INTEGERS = {1: np.int32, 2: np.int32, 4: np.uint32, 8: np.uint64}
DISTANCES = {size: _distances_in(kind) for size, kind in INTEGERS.items()}
WIDTHS = {1: np.float32, 2: np.float32, 4: np.float64, 8: np.float64}
#: Where the exponents of these floats begin, and their bias.
FORM32 = np.array([23, 127], np.int32)
FORM64 = np.array([52, 1023], np.int64)


# -- rounding --------------------------------------------------------------------------------------

_FIELD, _BIAS = np.uint64(52), 1023

#: Where the counts of a rounding stand: results that are the nearest value, the next one towards
#: zero, either neighbour, that are beyond the format's range (infinite, NaN or its greatest).
NEAREST, TOWARDS_ZERO, NEIGHBOUR, BEYOND = range(4)

#: Added and taken away again, it rounds smaller magnitudes to the nearest even integer.
_MAGIC = 1.5 * 2.0**52


@kernel()
def _quanta(bits, mantissa_bits, least_exponent, quanta):  # type: ignore[no-untyped-def]
    """The distance of a format's values around each float64, as the bits of a float64."""
    for i in range(bits.shape[0]):
        exponent = np.int64((bits[i] >> _FIELD) & np.uint64(0x7FF)) - _BIAS
        exponent = max(exponent, least_exponent)
        quanta[i] = np.uint64(exponent - mantissa_bits + _BIAS) << _FIELD


@kernel()
def _rounded(x, y, quanta, greatest, counts):  # type: ignore[no-untyped-def]
    nearest = 0
    inner = 0
    neighbour = 0
    beyond = 0
    for i in range(x.shape[0]):
        a = x[i]
        b = y[i]
        steps = a / quanta[i]
        whole = (steps + _MAGIC) - _MAGIC
        near = whole * quanta[i]
        low = near - np.copysign(quanta[i], a) if abs(whole) > abs(steps) else near
        out = (abs(near) > greatest) & ((b - b != 0) | (abs(b) == greatest))
        odd = (a - a != 0) & ((a == b) | ((a != a) & (b != b)))
        said = out | odd
        nearest += said | (b == near)
        inner += said | (b == low)
        value = ((b / quanta[i] + _MAGIC) - _MAGIC) * quanta[i] == b
        neighbour += said | (value & (abs(b - a) < quanta[i]))
        beyond += out
    counts[NEAREST] += nearest
    counts[TOWARDS_ZERO] += inner
    counts[NEIGHBOUR] += neighbour
    counts[BEYOND] += beyond


@kernel(alone=True)
def roundings(x, y, mantissa_bits, least_exponent, greatest, wide, bits, counts):  # type: ignore[no-untyped-def]
    """Which of ``y`` are ``x`` rounded to a float format: to nearest, towards zero, either way.

    ``least_exponent`` is that of the least normal value, ``greatest`` the greatest finite value.
    ``wide`` [3, BLOCK] and its ``bits`` are room to work. Exact: quanta are powers of two, and
    float64 holds every quotient that matters.
    """
    for block in range((x.shape[0] + BLOCK - 1) // BLOCK):
        a = x[block * BLOCK : (block + 1) * BLOCK]
        n = a.shape[0]
        for i in range(n):
            wide[0, i] = a[i]
            wide[1, i] = y[block * BLOCK + i]
        _quanta(bits[0, :n], mantissa_bits, least_exponent, bits[2, :n])
        _rounded(wide[0, :n], wide[1, :n], wide[2, :n], greatest, counts)
