"""What is measured of gradients on the CPU: compiled loops over all parameters of a network.

A torch operation costs microseconds whatever it is given, which small networks feel.
``begin[r]`` to ``begin[r + 1]`` are the elements of row r in a flat array.
"""

from __future__ import annotations

import numpy as np

from gradscope.compiled import kernel

#: Sums may be taken in any order, which lets the processor add several at once; NaN and infinity
#: keep their meaning. Sums are float64: squares of float32 neither overflow nor vanish.
_SUMS = {"reassoc", "contract"}


@kernel(fastmath=_SUMS)
def statistics(values, bits, magnitude, infinity, begin, out):  # type: ignore[no-untyped-def]
    """Norm, greatest magnitude, elements not zero, NaN and infinite ones of each row: out [R, 5+].

    ``bits`` are the values' own, which as integers have the order of the magnitudes once the sign
    is masked by ``magnitude``; those above ``infinity`` are NaN. A row with NaN has a norm and a
    greatest magnitude of NaN.
    """
    greatest = np.empty(1, bits.dtype)
    for row in range(len(begin) - 1):
        part, code = values[begin[row] : begin[row + 1]], bits[begin[row] : begin[row + 1]]
        total, zeros, top = 0.0, 0, magnitude & 0
        for j in range(len(part)):
            total += np.float64(part[j]) * np.float64(part[j])
        for j in range(len(code)):
            size = code[j] & magnitude
            top = max(top, size)
            zeros += size == 0
        nans = infinite = 0
        peak = 0.0
        if top >= infinity:
            for j in range(len(code)):
                nans += (code[j] & magnitude) > infinity
                infinite += (code[j] & magnitude) == infinity
            peak = np.nan if nans else np.inf
            total = peak
        else:
            greatest[0] = top
            peak = np.float64(greatest.view(values.dtype)[0])
        out[row, 0] = np.sqrt(total)
        out[row, 1] = peak
        out[row, 2] = len(part) - zeros
        out[row, 3] = nans
        out[row, 4] = infinite


@kernel(fastmath=_SUMS)
def lengths(values, begin, out):  # type: ignore[no-untyped-def]
    """The norm of each row alone: out [R]."""
    for row in range(len(begin) - 1):
        part = values[begin[row] : begin[row + 1]]
        total = 0.0
        for j in range(len(part)):
            total += np.float64(part[j]) * np.float64(part[j])
        out[row] = np.sqrt(total)


@kernel(fastmath=_SUMS)
def steps(change, gradients, begin, norms, out):  # type: ignore[no-untyped-def]
    """Norm of each row's change, and its cosine with the gradient of that norm: out [R, 2]."""
    for row in range(len(begin) - 1):
        moved = change[begin[row] : begin[row + 1]]
        along = gradients[begin[row] : begin[row + 1]]
        total = inner = 0.0
        for j in range(len(moved)):
            total += np.float64(moved[j]) * np.float64(moved[j])
            inner += np.float64(moved[j]) * np.float64(along[j])
        out[row, 0] = np.sqrt(total)
        scale = out[row, 0] * norms[row]
        out[row, 1] = inner / scale if scale > 0.0 else np.nan


@kernel()
def sketches(values, begin, buckets, bucket_begin, chosen, chosen_begin, norms, out):  # type: ignore[no-untyped-def]
    """Count-sketches of the unit rows: out [R, k], zero where a norm is zero or not finite.

    ``buckets`` has a byte for each element that is sketched: the bucket, and k more for a minus.
    ``chosen`` are the elements of the rows that are sketched by a part (chosen_begin[r + 1] >
    chosen_begin[r]), whose share of the squared norm is taken for that of their number.
    """
    width = out.shape[1]
    table = np.empty((2, 256))
    for row in range(len(begin) - 1):
        if not (norms[row] > 0.0 and np.isfinite(norms[row])):
            out[row] = 0.0
            continue
        table[:] = 0.0
        part = values[begin[row] : begin[row + 1]]
        at = buckets[bucket_begin[row] : bucket_begin[row + 1]]
        where = chosen[chosen_begin[row] : chosen_begin[row + 1]]
        if len(where):
            for j in range(len(at)):
                table[0, at[j]] += part[where[j]]
        else:
            # Two tables: an addition need not wait for the one before it.
            even, odd = table[0], table[1]
            for j in range(len(at) // 2):
                even[at[2 * j]] += part[2 * j]
                odd[at[2 * j + 1]] += part[2 * j + 1]
            if len(at) % 2:
                even[at[len(at) - 1]] += part[len(at) - 1]
        share = np.sqrt(len(part) / len(at))
        for k in range(width):
            plus, minus = table[0, k] + table[1, k], table[0, width + k] + table[1, width + k]
            out[row, k] = (plus - minus) / norms[row] * share
