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

#: Where the exponents of float32 and float64 begin, and their bias.
FIELD32 = np.uint32(23), 127
FIELD64 = np.uint64(52), 1023
#: Where the sums of a run stand.
SQUARES_BASE, SQUARES_NEW, PRODUCTS, SQUARES_CHANGE, CHANGES = range(5)
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
_BIAS = 1023


@kernel()
def _unlike(x, y):  # type: ignore[no-untyped-def]
    """How many differ, and how many pairs hold an element that is not finite."""
    differing = 0
    odd = 0
    for i in range(x.shape[0]):
        differing += x[i] != y[i]
        odd += ((x[i] - x[i]) != 0) | ((y[i] - y[i]) != 0)
    return differing, odd


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
    """Sums of x², y², xy, y - x and (y - x)²."""
    own = 0.0
    new = 0.0
    both = 0.0
    change = 0.0
    moved = 0.0
    for i in range(x.shape[0]):
        a = np.float64(x[i])
        b = np.float64(y[i])
        d = b - a
        own += a * a
        new += b * b
        both += a * b
        change += d
        moved += d * d
    return own, new, both, change, moved


@kernel(fastmath=_SUMS)
def _row_part(x, y):  # type: ignore[no-untyped-def]
    """Sums of x² and (y - x)², and how many differ."""
    own = 0.0
    moved = 0.0
    differing = 0
    for i in range(x.shape[0]):
        a = np.float64(x[i])
        d = np.float64(y[i]) - a
        own += a * a
        moved += d * d
        differing += x[i] != y[i]
    return own, moved, differing


@kernel()
def _signs(x, y):  # type: ignore[no-untyped-def]
    """How many changed their sign, and how many were zero and are not."""
    flips = 0
    from_zero = 0
    for i in range(x.shape[0]):
        flips += ((x[i] < 0) & (y[i] > 0)) | ((x[i] > 0) & (y[i] < 0))
        from_zero += (x[i] == 0) & (y[i] != 0)
    return flips, from_zero


@kernel(fastmath={"nnan", "nsz"}, error_model="numpy")
def _ratios(x, y, ratios):  # type: ignore[no-untyped-def]
    """|Δ| / |base| of each pair in their own type, and the greatest |Δ|; finite elements only."""
    most = x[0] - x[0]
    for i in range(x.shape[0]):
        d = abs(y[i] - x[i])
        ratios[i] = d / abs(x[i]) if d > 0 else x[0] - x[0]
        most = d if d > most else most
    return most


@kernel()
def _count_exponents(bits, shift, least, places, apart, table):  # type: ignore[no-untyped-def]
    """Count the exponent fields of floats, ``least`` and below in the first place of ``table``.

    ``apart`` [4, 64] is zero before and after: neighbours are often equal, and would wait in turn.
    """
    most = np.int64(table.shape[0] - 1)
    n = bits.shape[0]
    for i in range(n):
        places[i] = np.uint8(min(max(np.int64(bits[i] >> shift) - least, 0), most))
    for i in range(0, n - n % 4, 4):
        apart[0, places[i]] += 1
        apart[1, places[i + 1]] += 1
        apart[2, places[i + 2]] += 1
        apart[3, places[i + 3]] += 1
    for i in range(n - n % 4, n):
        apart[0, places[i]] += 1
    for place in range(table.shape[0]):
        table[place] += apart[0, place] + apart[1, place] + apart[2, place] + apart[3, place]
    apart[:] = 0


@kernel()
def _keep_largest(x, y, first, values, places, ends):  # type: ignore[no-untyped-def]
    """Insert a block's changes above the least of those kept, in descending order."""
    last = values.shape[0] - 1
    for i in range(x.shape[0]):
        d = abs(np.float64(y[i]) - np.float64(x[i]))
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
def _rows(x, y, first, length, first_row, squares, changes, changed):  # type: ignore[no-untyped-def]
    """Add a block's share of each row's squares, squared changes and changed elements."""
    position = 0
    while position < x.shape[0]:
        flat = first + position
        row = flat // length
        stop = min(x.shape[0], position + (row + 1) * length - flat)
        own, moved, differing = _row_part(x[position:stop], y[position:stop])
        squares[row - first_row] += own
        changes[row - first_row] += moved
        changed[row - first_row] += differing
        position = stop


@kernel()
def _same_rows(x, first, length, first_row, squares):  # type: ignore[no-untyped-def]
    """The same of a block in which nothing differs; returns its sum of squares."""
    position = 0
    total = 0.0
    while position < x.shape[0]:
        flat = first + position
        row = flat // length
        stop = min(x.shape[0], position + (row + 1) * length - flat)
        own = _squares(x[position:stop])
        squares[row - first_row] += own
        total += own
        position = stop
    return total


@kernel()
def compare(  # type: ignore[no-untyped-def]
    x, y, first, length, field, scratch, scratch_bits,
    sums, counts, octaves, squares, changes, changed, values, places, ends,
):  # fmt: skip
    """One piece of two tensors as floats of one type.

    ``first`` is the flat index of ``x[0]``, ``length`` the elements of a row, ``scratch`` is
    [3, BLOCK] of their type and its view as integers, ``field`` the shift and the bias of the
    exponent. Adds to ``sums``, ``counts``, ``octaves`` (of |Δ| / |base|) and, from the row of
    ``x[0]`` on, to ``squares``, ``changes``, ``changed``; keeps the largest changes in ``values``,
    where they are in ``places`` and from what to what they go in ``ends`` [2, …].
    """
    first_row = first // length
    bins = np.empty(BLOCK, np.uint8)
    apart = np.zeros((4, 64), np.uint32)
    for block in range((x.shape[0] + BLOCK - 1) // BLOCK):
        start = block * BLOCK
        a = x[start : start + BLOCK]
        b = y[start : start + BLOCK]
        n = a.shape[0]
        differing, odd = _unlike(a, b)
        if odd:
            _without_odd(a, b, scratch[0, :n], scratch[1, :n], counts)
            a = scratch[0, :n]
            b = scratch[1, :n]
            differing, odd = _unlike(a, b)
        if differing == 0:
            own = _same_rows(a, first + start, length, first_row, squares)
            sums[SQUARES_BASE] += own
            sums[SQUARES_NEW] += own
            sums[PRODUCTS] += own
            continue
        own, new, both, change, moved = _products(a, b)
        sums[SQUARES_BASE] += own
        sums[SQUARES_NEW] += new
        sums[PRODUCTS] += both
        sums[CHANGES] += change
        sums[SQUARES_CHANGE] += moved
        row = (first + start) // length
        if (first + start + n - 1) // length == row:
            squares[row - first_row] += own
            changes[row - first_row] += moved
            changed[row - first_row] += differing
        else:
            _rows(a, b, first + start, length, first_row, squares, changes, changed)
        flips, from_zero = _signs(a, b)
        counts[CHANGED] += differing
        counts[FLIPPED] += flips
        most = _ratios(a, b, scratch[2, :n])
        _count_exponents(
            scratch_bits[2, :n], field[0], field[1] + LEAST_OCTAVE, bins, apart, octaves[:OCTAVES]
        )
        octaves[0] -= n - differing
        octaves[OCTAVES - 1] -= from_zero
        octaves[OCTAVES] += from_zero
        if most * 1.0000002 >= values[values.shape[0] - 1]:  # rounded in float32
            _keep_largest(a, b, first + start, values, places, ends)


# -- stored codes ----------------------------------------------------------------------------------


@kernel()
def _apart32(x, y, sign, limit, widths):  # type: ignore[no-untyped-def]
    """Distances in units in the last place as floats, and the greatest; 0 where there is none."""
    most = np.uint32(0)
    for i in range(x.shape[0]):
        p = np.uint32(x[i])
        q = np.uint32(y[i])
        turned = ((p ^ q) & sign) != 0
        p &= ~sign
        q &= ~sign
        d = p + q if turned else max(p, q) - min(p, q)
        d = np.uint32(0) if (p > limit) | (q > limit) else d
        widths[i] = np.float64(d)
        most = max(most, d)
    return np.int64(most)


@kernel()
def _apart64(x, y, sign, limit, widths):  # type: ignore[no-untyped-def]
    most = np.uint64(0)
    for i in range(x.shape[0]):
        p = np.uint64(x[i])
        q = np.uint64(y[i])
        turned = ((p ^ q) & sign) != 0
        p &= ~sign
        q &= ~sign
        d = p + q if turned else max(p, q) - min(p, q)
        d = np.uint64(0) if (p > limit) | (q > limit) else d
        widths[i] = np.float64(d)
        most = max(most, d)
    return np.int64(min(most, np.uint64(0x7FFFFFFFFFFFFFFF)))


@kernel()
def distances(x, y, sign, limit, table, counts):  # type: ignore[no-untyped-def]
    """How far apart two runs of codes of one type are.

    ``counts`` receives how many differ and the greatest distance in units in the last place;
    ``table`` counts the distances by the bits that they take. Codes whose magnitude is above
    ``limit`` are not numbers, and at no distance; ``sign`` is that bit alone. Both are of 32 bits,
    or of 64 for codes of 64.
    """
    widths = np.empty(BLOCK, np.float64)
    bits = widths.view(np.uint64)
    bins = np.empty(BLOCK, np.uint8)
    apart = np.zeros((4, 64), np.uint32)
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
        if a.itemsize == 8:
            counts[1] = max(counts[1], _apart64(a, b, sign, limit, widths))
        else:
            counts[1] = max(counts[1], _apart32(a, b, sign, limit, widths))
        # A distance of 0 has the exponent field 0, of 1 that of the bias.
        _count_exponents(bits[:n], np.uint64(52), _BIAS - 1, bins, apart, table)


# -- rounding --------------------------------------------------------------------------------------

_FIELD = np.uint64(52)

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
