"""The compiled inner loops: what is counted and summed of a run of elements, block by block.

One read serves every statistic. A tensor is cut on fixed grids, counted from its first element:
blocks of 4,096 elements stay in the first-level cache while several small loops pass over them,
pieces of 256 blocks own one set of moments. The grids never depend on how many workers there are
or how the file is read, so neither does any number.

The loops run over whole small arrays (``range(x.shape[0])``): LLVM vectorises those, and not the
same loop over an index window of a large array.
"""

from __future__ import annotations

import numpy as np

from gradscope.compiled import kernel

BLOCK = 4096

_KEYS = np.random.Generator(np.random.PCG64(0x9E3779B9)).integers(
    0, 2**64, size=BLOCK, dtype=np.uint64, endpoint=False
) | np.uint64(1)
#: Odd 64-bit multipliers, written twice so that any 4,096 consecutive ones are a slice.
HASH_KEYS = np.concatenate([_KEYS, _KEYS])

_MIX = np.uint64(0xFF51AFD7ED558CCD)
_SALT = np.uint64(0x9E3779B97F4A7C15)


@kernel(alone=True)
def count_codes(codes, table):  # type: ignore[no-untyped-def]
    """Add the codes of a run to ``table``, one counter a code."""
    for i in range(codes.shape[0]):
        table[codes[i]] += np.uint32(1)


@kernel()
def _count_top(bits, shift, table):  # type: ignore[no-untyped-def]
    """Count the leading bits of a run: sign, exponent and the first eight of the mantissa."""
    for i in range(bits.shape[0]):
        table[bits[i] >> shift] += np.uint32(1)


#: What ordering the bit patterns of a float type takes: its sign bit, all ones, and where -Inf and
#: +Inf come in that order. All ones are there because NumPy would widen ``~sign`` to 64 bits.
ORDER32 = np.array([0x80000000, 0xFFFFFFFF, 0x007FFFFF, 0xFF800000], np.uint32)
ORDER64 = np.array(
    [0x8000000000000000, 0xFFFFFFFFFFFFFFFF, 0x000FFFFFFFFFFFFF, 0xFFF0000000000000], np.uint64
)


@kernel()
def _extremes(bits, order):  # type: ignore[no-untyped-def]
    """Least and greatest float of a block as unsigned integers that ascend with the values.

    Negative floats have all their bits flipped, others the sign bit alone; NaNs lie at the ends.
    """
    sign, ones = order[0], order[1]
    low = ones
    high = ones ^ ones
    for i in range(bits.shape[0]):
        ordered = bits[i] ^ (ones if bits[i] >= sign else sign)
        low = min(low, ordered)
        high = max(high, ordered)
    return low, high


@kernel()
def _extremes_bf16(codes):  # type: ignore[no-untyped-def]
    """``_extremes`` of the floats whose upper halves these are: half as wide, and twice as fast."""
    low = np.uint16(0xFFFF)
    high = np.uint16(0)
    for i in range(codes.shape[0]):
        code = codes[i]
        ordered = np.uint16(
            code ^ (np.uint16(0xFFFF) if code >= np.uint16(0x8000) else np.uint16(0x8000))
        )
        low = min(low, ordered)
        high = max(high, ordered)
    return _widened(low), _widened(high)


@kernel()
def _widened(half):  # type: ignore[no-untyped-def]
    """An ordered float by its upper half; the lower was zeros, which are flipped if negative."""
    rest = np.uint32(0xFFFF) if half < np.uint16(0x8000) else np.uint32(0)
    return np.uint32(np.uint32(half) << np.uint32(16)) | rest


@kernel(fastmath={"reassoc", "contract"})
def _sum(x):  # type: ignore[no-untyped-def]
    total = 0.0
    for i in range(x.shape[0]):
        total += np.float64(x[i])
    return total


@kernel(fastmath={"reassoc", "contract"})
def _sum_squares(x):  # type: ignore[no-untyped-def]
    total = 0.0
    for i in range(x.shape[0]):
        value = np.float64(x[i])
        total += value * value
    return total


@kernel(fastmath={"reassoc", "contract"})
def _central(x, mean):  # type: ignore[no-untyped-def]
    """Second to fourth central sums of a block about its own mean."""
    m2 = 0.0
    m3 = 0.0
    m4 = 0.0
    for i in range(x.shape[0]):
        d = np.float64(x[i]) - mean
        square = d * d
        m2 += square
        m3 += square * d
        m4 += square * square
    return m2, m3, m4


@kernel()
def _count_zero(x):  # type: ignore[no-untyped-def]
    zeros = 0
    for i in range(x.shape[0]):
        zeros += x[i] == 0
    return zeros


@kernel()
def _union(bits):  # type: ignore[no-untyped-def]
    union = bits[0]
    for i in range(bits.shape[0]):
        union |= bits[i]
    return union


@kernel()
def _hash(codes, keys):  # type: ignore[no-untyped-def]
    """Sum of mixed products: order matters through the keys, the cut of the sum does not.

    A float64 of few significant bits is all in its upper half, which products only shift out.
    """
    wide = codes.itemsize == 8
    total = np.uint64(0)
    for i in range(codes.shape[0]):
        code = np.uint64(codes[i])
        if wide:
            code ^= code >> np.uint64(32)
        product = (code + np.uint64(1)) * keys[i]
        total += product ^ (product >> np.uint64(32))
    return total * _MIX


@kernel()
def _salt(period):  # type: ignore[no-untyped-def]
    z = (np.uint64(period) + np.uint64(1)) * _SALT
    return (z ^ (z >> np.uint64(29))) | np.uint64(1)


@kernel()
def _rows_of_block(x, codes, first, row_numel, first_row, squares, hashes, keys):  # type: ignore[no-untyped-def]
    """Add a block's share of each row's sum of squares and content hash.

    ``first`` is the block's flat index in the tensor, ``first_row`` the row that ``squares[0]``
    stands for. Segments end at the row's end and at every 4,096th element of the row, where the
    keys start again under another salt.
    """
    position = 0
    while position < x.shape[0]:
        flat = first + position
        row = flat // row_numel
        column = flat - row * row_numel
        phase = column % BLOCK
        stop = min(x.shape[0], position + min(row_numel - column, BLOCK - phase))
        part = codes[position:stop]
        squares[row - first_row] += _sum_squares(x[position:stop])
        hashes[row - first_row] += _hash(part, keys[phase : phase + part.shape[0]]) * _salt(
            column // BLOCK
        )
        position = stop


@kernel()
def _merge(into, n, mean, m2, m3, m4):  # type: ignore[no-untyped-def]
    """Pébay's pairwise update (SAND2008-6212) of ``into`` = [n, mean, M2, M3, M4]."""
    na = into[0]
    if n == 0:
        return
    if na == 0:
        into[0] = n
        into[1] = mean
        into[2] = m2
        into[3] = m3
        into[4] = m4
        return
    total = na + n
    d = mean - into[1]
    dn = d / total
    into[4] += (
        m4
        + d * dn * dn * dn * na * n * (na * na - na * n + n * n)
        + 6.0 * dn * dn * (na * na * m2 + n * n * into[2])
        + 4.0 * dn * (na * m3 - n * into[3])
    )
    into[3] += m3 + d * dn * dn * na * n * (na - n) + 3.0 * dn * (na * m2 - n * into[2])
    into[2] += m2 + d * dn * na * n
    into[1] += dn * n
    into[0] = total


@kernel()
def _split_nonfinite(x, finite, zeroed, counts):  # type: ignore[no-untyped-def]
    """Close up a block's finite values in ``finite``, zero the others, count NaN, +Inf, -Inf."""
    kept = 0
    for i in range(x.shape[0]):
        value = x[i]
        if np.isfinite(value):
            finite[kept] = value
            zeroed[i] = value
            kept += 1
        else:
            zeroed[i] = 0
            counts[0] += np.isnan(value)
            counts[1] += value > 0
            counts[2] += value < 0
    return kept


@kernel()
def _decode_bf16(codes, out):  # type: ignore[no-untyped-def]
    for i in range(codes.shape[0]):
        out[i] = np.uint32(np.uint32(codes[i]) << np.uint32(16))


@kernel()
def _decode_table(codes, values, out):  # type: ignore[no-untyped-def]
    for i in range(codes.shape[0]):
        out[i] = values[codes[i]]


@kernel()
def _decode_f16(codes, out):  # type: ignore[no-untyped-def]
    """The exponent re-biased by one exact product, which also makes subnormals right."""
    for i in range(codes.shape[0]):
        magnitude = np.uint32(codes[i] & np.uint16(0x7FFF)) << np.uint32(13)
        special = np.uint32(0x7F800000) if magnitude >= np.uint32(0x0F800000) else np.uint32(0)
        sign = np.uint32(codes[i] & np.uint16(0x8000)) << np.uint32(16)
        out[i] = magnitude | special | sign


@kernel(fastmath={"contract"})
def _rebias_f16(x):  # type: ignore[no-untyped-def]
    for i in range(x.shape[0]):
        x[i] *= np.float32(2.0**112)


BFLOAT16, FLOAT16, BY_TABLE = 0, 1, 2


@kernel(alone=True)
def scan_codes(  # type: ignore[no-untyped-def]
    codes, first, decoding, values, scratch, scratch_bits,
    table, counts, row_numel, squares, hashes, lows, highs, dirty, keys,
):  # fmt: skip
    """One piece of 8- or 16-bit floats: histogram, row sums and hashes, block extremes.

    ``first``, the flat index of ``codes[0]``, is a multiple of BLOCK. ``scratch`` [2, BLOCK] of
    float32 and ``scratch_bits``, its bits, are room to work. ``counts`` are [NaN, +Inf, -Inf],
    ``lows`` and ``highs`` receive each block's least and greatest finite value as ``_extremes``
    orders them, ``dirty`` whether it holds a non-finite one.
    """
    first_row = first // row_numel
    count_codes(codes, table)
    for block in range(lows.shape[0]):
        part = codes[block * BLOCK : (block + 1) * BLOCK]
        x = scratch[0, : part.shape[0]]
        bits = scratch_bits[0, : part.shape[0]]
        if decoding == BFLOAT16:
            _decode_bf16(part, bits)
            low, high = _extremes_bf16(part)
        else:
            if decoding == FLOAT16:
                _decode_f16(part, bits)
                _rebias_f16(x)
            else:
                _decode_table(part, values, x)
            low, high = _extremes(bits, ORDER32)
        if high >= ORDER32[3] or low <= ORDER32[2]:
            kept = _split_nonfinite(x, scratch[1], x, counts)
            dirty[block] = True
            low, high = _extremes(scratch_bits[1, :kept], ORDER32)
        lows[block] = low
        highs[block] = high
        _rows_of_block(x, part, first + block * BLOCK, row_numel, first_row, squares, hashes, keys)


@kernel(alone=True)
def scan_floats(  # type: ignore[no-untyped-def]
    x, bits, first, shift, order, scratch, scratch_bits,
    table, moments, counts, union, row_numel, squares, hashes, lows, highs, dirty, keys,
):  # fmt: skip
    """One piece of float32 or float64: as ``scan_codes``, with moments and a top-bits histogram.

    ``bits`` is ``x`` seen as unsigned integers, ``scratch`` [2, BLOCK] of x's type and its view.
    ``table`` counts ``bits >> shift`` over finite values, ``moments`` is [n, mean, M2, M3, M4],
    ``counts`` [zero, NaN, +Inf, -Inf]; ``union[0]`` is or-ed with every finite bit pattern.
    """
    first_row = first // row_numel
    for block in range(lows.shape[0]):
        start = block * BLOCK
        finite = x[start : start + BLOCK]
        finite_bits = bits[start : start + BLOCK]
        zeroed = finite
        low, high = _extremes(finite_bits, order)
        if high >= order[3] or low <= order[2]:
            zeroed = scratch[1, : finite.shape[0]]
            kept = _split_nonfinite(finite, scratch[0], zeroed, counts[1:])
            finite = scratch[0, :kept]
            finite_bits = scratch_bits[0, :kept]
            dirty[block] = True
            low, high = _extremes(finite_bits, order)
        lows[block] = low
        highs[block] = high
        if finite.shape[0]:
            _count_top(finite_bits, shift, table)
            counts[0] += _count_zero(finite)
            union[0] |= _union(finite_bits)
            mean = _sum(finite) / finite.shape[0]
            m2, m3, m4 = _central(finite, mean)
            _merge(moments, np.float64(finite.shape[0]), mean, m2, m3, m4)
        _rows_of_block(
            zeroed,
            bits[start : start + BLOCK],
            first + start,
            row_numel,
            first_row,
            squares,
            hashes,
            keys,
        )
