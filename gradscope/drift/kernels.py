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

#: How far exponents lie above the end of float32 and float64, and all bits but the sign.
FIELD32 = np.array([23, 0x7FFF_FFFF], np.int32)
FIELD64 = np.array([52, 0x7FFF_FFFF_FFFF_FFFF], np.int64)
#: Where the sums of a run stand.
SQUARES_BASE, SQUARES_NEW, PRODUCTS, SQUARES_CHANGE, CHANGES = range(5)
#: Where the counts of a run stand: elements whose values differ, whose signs differ, that are not
#: finite in the one and in the other, in only one of them.
CHANGED, FLIPPED, ODD_BASE, ODD_NEW, ODD_ONE = range(5)


# -- differences -----------------------------------------------------------------------------------

_SUMS = {"reassoc", "contract"}


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


@kernel(fastmath={"nnan", "nsz"})
def _sizes(x, y, sizes):  # type: ignore[no-untyped-def]
    """|y - x| of each pair in their own type, and the greatest; finite elements only."""
    most = x[0] - x[0]
    for i in range(x.shape[0]):
        d = abs(y[i] - x[i])
        sizes[i] = d
        most = d if d > most else most
    return most


@kernel()
def _octaves(sizes, base, field, places):  # type: ignore[no-untyped-def]
    """The octave of size / |base|, given as the integers that their bits are, as a place.

    The difference of the bits of two positive floats, shifted to their exponents, is the exponent
    of the quotient, rounded down.
    """
    shift, magnitude = field[0], field[1]
    kind = sizes.dtype.type
    least, most = kind(LEAST_OCTAVE), kind(OCTAVES - 1)
    for i in range(sizes.shape[0]):
        own = kind(base[i] & magnitude)
        octave = kind(kind(kind(sizes[i] - own) >> shift) - least)
        octave = most if own == 0 else octave
        octave = kind(0) if sizes[i] == 0 else octave
        places[i] = np.uint8(min(max(octave, kind(0)), most))


@kernel()
def count(places, apart, table):  # type: ignore[no-untyped-def]
    """Add how often each place occurs to ``table``.

    ``apart`` [4, 64] is zero before and after: neighbours are often equal, and would wait in turn.
    """
    n = places.shape[0]
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
                for side in range(2):
                    ends[side, at] = ends[side, at - 1]
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


@kernel(alone=True)
def compare(  # type: ignore[no-untyped-def]
    x, y, base_bits, first, length, field, scratch, scratch_bits,
    places_of, apart, sums, counts, octaves, squares, changes, changed, values, places, ends,
):  # fmt: skip
    """One piece of two tensors as floats of one type.

    ``base_bits`` are those of ``x`` as signed integers, ``first`` is the flat index of ``x[0]``,
    ``length`` the elements of a row, ``scratch`` is [3, BLOCK] of their type and its view as such
    integers, ``field`` FIELD32 or FIELD64; ``places_of`` [BLOCK] and ``apart`` are those of
    ``count``. Adds to ``sums``, ``counts``, ``octaves`` (of |Δ| / |base|) and, from the row of
    ``x[0]`` on, to ``squares``, ``changes``, ``changed``; keeps the largest changes in ``values``,
    where they are in ``places`` and from what to what they go in ``ends`` [2, …].
    """
    first_row = first // length
    for block in range((x.shape[0] + BLOCK - 1) // BLOCK):
        start = block * BLOCK
        a = x[start : start + BLOCK]
        b = y[start : start + BLOCK]
        bits = base_bits[start : start + BLOCK]
        n = a.shape[0]
        differing, odd = _unlike(a, b)
        if odd:
            _without_odd(a, b, scratch[0, :n], scratch[1, :n], counts)
            a = scratch[0, :n]
            bits = scratch_bits[0, :n]
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
        most = _sizes(a, b, scratch[2, :n])
        _octaves(scratch_bits[2, :n], bits, field, places_of)
        count(places_of[:n], apart, octaves[:OCTAVES])
        octaves[0] -= n - differing
        octaves[OCTAVES - 1] -= from_zero
        octaves[OCTAVES] += from_zero
        if most * 1.0000002 >= values[values.shape[0] - 1]:  # rounded in float32
            _keep_largest(a, b, first + start, values, places, ends)
