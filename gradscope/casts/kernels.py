"""The compiled loops of casting: elements rounded to a grid, and what that costs, row by row.

A block of scaled elements is rounded at once: the step between neighbours of an element on the grid
is a power of two, which follows from its exponent bits, and both the division by it and the
multiplication are exact, so that one ``rint`` is the rounding to nearest, ties to even.
"""

from __future__ import annotations

import math

import numpy as np

from gradscope.compiled import kernel

_BLOCK = 4096


@kernel()
def rounded(y, bits, scratch, mantissa_bits, least_exponent, out):  # type: ignore[no-untyped-def]
    """Round float64 ``y`` (``bits`` is its int64 view) to the grid; ``scratch`` int64 [2, n]."""
    steps = scratch[0, : y.shape[0]]
    inverses = scratch[1, : y.shape[0]]
    least = least_exponent + 1023
    for i in range(y.shape[0]):
        exponent = max((bits[i] >> 52) & 0x7FF, least) - mantissa_bits
        steps[i] = exponent << 52
        inverses[i] = (2046 - exponent) << 52
    step = steps.view(np.float64)
    inverse = inverses.view(np.float64)
    for i in range(y.shape[0]):
        out[i] = np.rint(y[i] * inverse[i]) * step[i]


@kernel()
def _peak(x):  # type: ignore[no-untyped-def]
    peak = x[0] * 0
    for i in range(x.shape[0]):
        peak = max(peak, abs(x[i]))
    return peak


@kernel()
def _block_scale(peak, greatest, powers, own):  # type: ignore[no-untyped-def]
    """What the elements of a block are divided by; 0 where nothing of it is left."""
    if peak == 0:
        return 0.0
    if powers:  # OCP: the exponent of the peak, less that of the greatest value
        return math.ldexp(1.0, max(math.frexp(peak)[1] - math.frexp(greatest)[1], -127))
    ratio = np.float64(np.float32(np.float32(peak / greatest) / np.float32(own)))
    step = math.ldexp(1.0, max(math.frexp(ratio)[1] - 1, -6) - 3)
    return min(np.rint(ratio / step) * step, 448.0) * own


@kernel(fastmath={"reassoc", "contract"})
def _losses(x, q, scales, greatest, saturates, limit, row):  # type: ignore[no-untyped-def]
    """Add to ``row``: overflows, underflows, squared error and signal, the same of what is within
    ``limit``; last, the greatest error.
    """
    over = 0
    under = 0
    error = 0.0
    signal = 0.0
    bulk_error = 0.0
    bulk_signal = 0.0
    worst = row[6]
    for i in range(x.shape[0]):
        value = np.float64(x[i])
        code = q[i]
        beyond = abs(code) > greatest
        if beyond and saturates:
            code = math.copysign(greatest, code)
        lost = beyond and not saturates
        over += lost
        under += (code == 0) & (value != 0)
        d = 0.0 if lost else code * np.float64(scales[i]) - value
        within = abs(value) <= limit
        error += d * d
        signal += value * value
        bulk_error += d * d if within else 0.0
        bulk_signal += value * value if within else 0.0
        worst = max(worst, abs(d))
    row[0] += over
    row[1] += under
    row[2] += error
    row[3] += signal
    row[4] += bulk_error
    row[5] += bulk_signal
    row[6] = worst


@kernel()
def cast_rows(  # type: ignore[no-untyped-def]
    x,
    row_scales,
    block,
    own,
    powers,
    mantissa_bits,
    least_exponent,
    greatest,
    saturates,
    limit,
    out,
):
    """What casting costs each row of ``x`` [rows, columns], finite float32 or float64.

    ``row_scales`` divides each row, in x's own precision; with ``block`` each run of so many
    elements has a scale of its own instead, rounded to E4M3 times ``own`` (NVFP4) or to ``powers``
    of two (MX). Dividing by a scale rounds in x's precision, as it does where weights are cast.
    ``out`` is [rows, 7], as ``_losses`` fills it.
    """
    y = np.empty(_BLOCK, np.float64)
    bits = y.view(np.int64)
    q = np.empty(_BLOCK, np.float64)
    scales = np.empty(_BLOCK, x.dtype)
    scratch = np.empty((2, _BLOCK), np.int64)
    for r in range(x.shape[0]):
        for first in range(0, x.shape[1], _BLOCK):
            part = x[r, first : first + _BLOCK]
            n = part.shape[0]
            if block:
                for start in range(0, n, block):
                    members = part[start : start + block]
                    shared = scales[start : start + members.shape[0]]
                    shared[:] = _block_scale(np.float64(_peak(members)), greatest, powers, own)
                    for i in range(members.shape[0]):
                        y[start + i] = members[i] / shared[i] if shared[i] != 0 else 0
            else:
                scales[:n] = row_scales[r]
                for i in range(n):
                    y[i] = part[i] / scales[i]
            rounded(y[:n], bits[:n], scratch, mantissa_bits, least_exponent, q)
            _losses(part, q[:n], scales[:n], greatest, saturates, limit, out[r])
