"""The compiled inner loops of a comparison: two runs of elements side by side, block by block.

As in ``statistics.kernels``: blocks of 4,096 elements stay in the first-level cache while several
small loops pass over them, and the grids never depend on how many workers there are.
"""

from __future__ import annotations

import numpy as np

from gradscope.compiled import kernel

BLOCK = 4096
#: Octaves of |Δ| / |base| that are counted: below 2^-32, …, at or above 2^7; then from zero.
LEAST_OCTAVE, OCTAVES = -32, 41

#: Where the sums of a run stand.
SQUARES_BASE, SQUARES_NEW, PRODUCTS, SQUARES_CHANGE, CHANGES, NOISE = range(6)
#: Where the counts of a run stand: elements whose values differ, whose signs differ, that are not
#: finite in the one and in the other, in only one of them.
CHANGED, FLIPPED, ODD_BASE, ODD_NEW, ODD_ONE = range(5)


# -- stored elements as numbers --------------------------------------------------------------------


@kernel()
def decode_bf16(codes, bits):  # type: ignore[no-untyped-def]
    """Bfloat16 as the bits of float32."""
    for i in range(codes.shape[0]):
        bits[i] = np.uint32(codes[i]) << np.uint32(16)


@kernel()
def decode_f16(codes, bits, values):  # type: ignore[no-untyped-def]
    """Float16 as float32; ``bits`` is ``values`` seen as integers."""
    for i in range(codes.shape[0]):
        magnitude = np.uint32(codes[i] & np.uint16(0x7FFF)) << np.uint32(13)
        special = np.uint32(0x7F800000) if magnitude >= np.uint32(0x0F800000) else np.uint32(0)
        sign = np.uint32(codes[i] & np.uint16(0x8000)) << np.uint32(16)
        bits[i] = magnitude | special | sign
    for i in range(values.shape[0]):
        values[i] *= np.float32(2.0**112)


@kernel()
def decode_table(codes, table, values):  # type: ignore[no-untyped-def]
    """Each code's value, looked up."""
    for i in range(codes.shape[0]):
        values[i] = table[codes[i]]


# -- differences -----------------------------------------------------------------------------------

_SUMS = {"reassoc", "contract"}
_FIELD, _BIAS = np.uint64(52), 1023


@kernel()
def _differing(x, y):  # type: ignore[no-untyped-def]
    count = 0
    for i in range(x.shape[0]):
        count += x[i] != y[i]
    return count


@kernel()
def _odd(x):  # type: ignore[no-untyped-def]
    """How many are not finite."""
    count = 0
    for i in range(x.shape[0]):
        count += (x[i] - x[i]) != 0
    return count


@kernel()
def _without_odd(x, y, base, new, counts):  # type: ignore[no-untyped-def]
    """Copies in which pairs that hold a non-finite element are zero."""
    for i in range(x.shape[0]):
        a = x[i] - x[i] != 0
        b = y[i] - y[i] != 0
        base[i] = x[i]
        new[i] = y[i]
        if a or b:
            same = x[i] == y[i] or (x[i] != x[i] and y[i] != y[i])
            counts[CHANGED] += not same
            counts[ODD_BASE] += a
            counts[ODD_NEW] += b
            counts[ODD_ONE] += a != b
            base[i] = 0
            new[i] = 0


@kernel(fastmath=_SUMS)
def _squares(x):  # type: ignore[no-untyped-def]
    total = 0.0
    for i in range(x.shape[0]):
        value = np.float64(x[i])
        total += value * value
    return total


@kernel(fastmath=_SUMS)
def _products(x, y):  # type: ignore[no-untyped-def]
    """The sum of the products, and that of the squares of ``y``."""
    total = 0.0
    squares = 0.0
    for i in range(x.shape[0]):
        b = np.float64(y[i])
        total += np.float64(x[i]) * b
        squares += b * b
    return total, squares


@kernel(fastmath=_SUMS)
def _change(x, y):  # type: ignore[no-untyped-def]
    total = 0.0
    squares = 0.0
    for i in range(x.shape[0]):
        d = np.float64(y[i]) - np.float64(x[i])
        total += d
        squares += d * d
    return total, squares


@kernel()
def _flips(x, y):  # type: ignore[no-untyped-def]
    count = 0
    for i in range(x.shape[0]):
        count += ((x[i] < 0) & (y[i] > 0)) | ((x[i] > 0) & (y[i] < 0))
    return count


@kernel(fastmath={"nnan", "nsz"}, error_model="numpy")
def _ratios(x, y, changes, ratios):  # type: ignore[no-untyped-def]
    """|Δ| and |Δ| / |base| of each pair, and the greatest |Δ|; finite elements only."""
    most = 0.0
    for i in range(x.shape[0]):
        a = np.float64(x[i])
        d = abs(np.float64(y[i]) - a)
        changes[i] = d
        ratios[i] = d / abs(a) if d > 0 else 0.0
        most = d if d > most else most
    return most


@kernel()
def _from_zero(x, y):  # type: ignore[no-untyped-def]
    count = 0
    for i in range(x.shape[0]):
        count += (x[i] == 0) & (y[i] != 0)
    return count


@kernel()
def _count_exponents(bits, least, table):  # type: ignore[no-untyped-def]
    """Count the binary exponents of float64, ``least`` and below in the first place."""
    most = table.shape[0] - 1
    apart = np.zeros((4, 64), np.int64)  # neighbours are often equal, and would wait in turn
    for i in range(bits.shape[0]):
        place = np.int64(bits[i] >> _FIELD) - (_BIAS + least)
        apart[i & 3, min(max(place, 0), most)] += 1
    for place in range(table.shape[0]):
        table[place] += apart[0, place] + apart[1, place] + apart[2, place] + apart[3, place]


@kernel()
def _keep_largest(changes, x, y, first, values, places, ends):  # type: ignore[no-untyped-def]
    """Insert a block's changes above the least of those kept, in descending order."""
    last = values.shape[0] - 1
    for i in range(changes.shape[0]):
        d = changes[i]
        if d > values[last]:
            at = last
            while at > 0 and d > values[at - 1]:
                values[at] = values[at - 1]
                places[at] = places[at - 1]
                ends[:, at] = ends[:, at - 1]
                at -= 1
            values[at] = d
            places[at] = first + i
            ends[0, at] = x[i]
            ends[1, at] = y[i]


@kernel()
def _rows(x, y, first, length, first_row, squares, changes, changed, same):  # type: ignore[no-untyped-def]
    """Add a block's share of each row's squares, squared changes and changed elements.

    Returns the block's own sums of squares, of changes and of squared changes.
    """
    position = 0
    own = 0.0
    total = 0.0
    moved = 0.0
    while position < x.shape[0]:
        flat = first + position
        row = flat // length
        stop = min(x.shape[0], position + (row + 1) * length - flat)
        a = x[position:stop]
        square = _squares(a)
        own += square
        squares[row - first_row] += square
        if not same:
            b = y[position:stop]
            change, square = _change(a, b)
            total += change
            moved += square
            changes[row - first_row] += square
            changed[row - first_row] += _differing(a, b)
        position = stop
    return own, total, moved


@kernel()
def compare(  # type: ignore[no-untyped-def]
    x, y, first, length, scratch,
    sums, counts, octaves, squares, changes, changed, values, places, ends,
):  # fmt: skip
    """One piece of two tensors as floats of one type.

    ``first`` is the flat index of ``x[0]``, ``length`` the elements of a row, ``scratch`` is
    [2, BLOCK]. Adds to ``sums``, ``counts``, ``octaves`` (of |Δ| / |base|) and, from the row of
    ``x[0]`` on, to ``squares``, ``changes``, ``changed``; keeps the largest changes in ``values``,
    where they are in ``places`` and from what to what they go in ``ends`` [2, …].
    """
    first_row = first // length
    both = np.empty((2, BLOCK), np.float64)
    for block in range((x.shape[0] + BLOCK - 1) // BLOCK):
        start = block * BLOCK
        a = x[start : start + BLOCK]
        b = y[start : start + BLOCK]
        if _odd(a) + _odd(b):
            base = scratch[0, : a.shape[0]]
            new = scratch[1, : a.shape[0]]
            _without_odd(a, b, base, new, counts)
            a = base
            b = new
        differing = _differing(a, b)
        own, total, moved = _rows(
            a, b, first + start, length, first_row, squares, changes, changed, differing == 0
        )
        sums[SQUARES_BASE] += own
        if differing == 0:
            sums[SQUARES_NEW] += own
            sums[PRODUCTS] += own
            continue
        counts[CHANGED] += differing
        counts[FLIPPED] += _flips(a, b)
        product, square = _products(a, b)
        sums[SQUARES_NEW] += square
        sums[PRODUCTS] += product
        sums[CHANGES] += total
        sums[SQUARES_CHANGE] += moved
        n = a.shape[0]
        most = _ratios(a, b, both[0, :n], both[1, :n])
        zero = _from_zero(a, b)
        _count_exponents(both[1, :n].view(np.uint64), LEAST_OCTAVE, octaves[:OCTAVES])
        octaves[0] -= n - differing
        octaves[OCTAVES - 1] -= zero
        octaves[OCTAVES] += zero
        if most > values[values.shape[0] - 1]:
            _keep_largest(both[0, :n], a, b, first + start, values, places, ends)


# -- stored codes ----------------------------------------------------------------------------------


@kernel()
def _apart(x, y, sign, limit, widths):  # type: ignore[no-untyped-def]
    """Distances in units in the last place as floats, and the greatest; -1 where there is none."""
    most = np.int64(0)
    for i in range(x.shape[0]):
        p = np.int64(x[i])
        q = np.int64(y[i])
        negative = ((p ^ q) & sign) != 0
        p &= ~sign
        q &= ~sign
        d = p + q if negative else abs(p - q)
        d = np.int64(0) if (p > limit) | (q > limit) else d
        widths[i] = np.float64(d)
        most = max(most, d)
    return most


@kernel()
def distances(x, y, sign, limit, table, counts):  # type: ignore[no-untyped-def]
    """How far apart two runs of codes of one type are.

    ``counts`` receives how many differ and the greatest distance in units in the last place;
    ``table`` counts the distances of those that differ by the bits that they take. Codes whose
    magnitude is above ``limit`` are not numbers, and at no distance; ``sign`` is that bit alone.
    """
    widths = np.empty(BLOCK, np.float64)
    for block in range((x.shape[0] + BLOCK - 1) // BLOCK):
        a = x[block * BLOCK : (block + 1) * BLOCK]
        b = y[block * BLOCK : (block + 1) * BLOCK]
        differing = _differing(a, b)
        table[0] += a.shape[0] - differing
        if differing:
            counts[0] += differing
            counts[1] = max(counts[1], _apart(a, b, sign, limit, widths))
            # A distance of 0 has the exponent -1023, of 1 the exponent 0.
            _count_exponents(widths[: a.shape[0]].view(np.uint64), -1, table)
            table[0] -= a.shape[0] - differing


# -- rounding --------------------------------------------------------------------------------------

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


@kernel(error_model="numpy")
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


@kernel()
def roundings(x, y, mantissa_bits, least_exponent, greatest, counts):  # type: ignore[no-untyped-def]
    """Which of ``y`` are ``x`` rounded to a float format: to nearest, towards zero, either way.

    ``least_exponent`` is that of the least normal value, ``greatest`` the greatest finite value.
    Exact: quanta are powers of two, and float64 holds every quotient that matters.
    """
    wide = np.empty((3, BLOCK), np.float64)
    for block in range((x.shape[0] + BLOCK - 1) // BLOCK):
        a = x[block * BLOCK : (block + 1) * BLOCK]
        n = a.shape[0]
        for i in range(n):
            wide[0, i] = a[i]
            wide[1, i] = y[block * BLOCK + i]
        bits = wide[0, :n].view(np.uint64)
        _quanta(bits, mantissa_bits, least_exponent, wide[2, :n].view(np.uint64))
        _rounded(wide[0, :n], wide[1, :n], wide[2, :n], greatest, counts)
