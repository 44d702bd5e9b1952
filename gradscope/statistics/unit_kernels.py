"""The compiled inner loops for units that are not rows: their sums of squares and hashes.

They run over a piece that is in the cache, after the kernels that every tensor needs, so that those
stay what they are. A unit has the hash that it would have as a row, however it lies.
"""

from __future__ import annotations

import numpy as np

from gradscope.compiled import kernel
from gradscope.statistics.kernels import (
    _MIX,
    BFLOAT16,
    BLOCK,
    FLOAT16,
    _decode_bf16,
    _decode_f16,
    _decode_table,
    _hash,
    _rebias_f16,
    _salt,
    _sum_squares,
)


@kernel()
def _zero_nonfinite(x, out):  # type: ignore[no-untyped-def]
    for i in range(x.shape[0]):
        out[i] = x[i] if abs(x[i]) < np.inf else 0


@kernel()
def _square_line(x, squares):  # type: ignore[no-untyped-def]
    for i in range(x.shape[0]):
        value = np.float64(x[i])
        squares[i] += value * value


@kernel()
def _hash_line(codes, key, salt, hashes):  # type: ignore[no-untyped-def]
    """``_hash`` of one element a unit, at one place in each."""
    wide = codes.itemsize == 8
    for i in range(codes.shape[0]):
        code = np.uint64(codes[i])
        if wide:
            code ^= code >> np.uint64(32)
        product = (code + np.uint64(1)) * key
        hashes[i] += (product ^ (product >> np.uint64(32))) * (_MIX * salt)


@kernel()
def _units_of_block(x, codes, first, form, first_unit, squares, hashes, keys):  # type: ignore[no-untyped-def]
    """Add a block's share of each unit's sum of squares and content hash.

    ``first`` is the block's flat index in the tensor, ``form`` its (depth, width, inner),
    ``first_unit`` the one that ``squares[0]`` stands for.
    """
    depth, width, inner = form[0], form[1], form[2]
    position = 0
    while position < x.shape[0]:
        line = (first + position) // inner
        i = first + position - line * inner
        row = line // width
        group = row // depth
        unit = group * width + line - row * width - first_unit
        place = (row - group * depth) * inner + i
        phase = place % BLOCK
        salt = _salt(place // BLOCK)
        if inner == 1:
            stop = min(x.shape[0], position + width - (line - row * width))
            units = slice(unit, unit + stop - position)
            _square_line(x[position:stop], squares[units])
            _hash_line(codes[position:stop], keys[phase], salt, hashes[units])
        else:
            stop = min(x.shape[0], position + min(inner - i, BLOCK - phase))
            part = codes[position:stop]
            squares[unit] += _sum_squares(x[position:stop])
            hashes[unit] += _hash(part, keys[phase : phase + part.shape[0]]) * salt
        position = stop


@kernel(alone=True)
def units_of_codes(  # type: ignore[no-untyped-def]
    codes, first, decoding, values, scratch, scratch_bits,
    form, first_unit, squares, hashes, keys,
):  # fmt: skip
    """One piece of 8- or 16-bit floats; see ``kernels.scan_codes`` and ``_units_of_block``."""
    for start in range(0, codes.shape[0], BLOCK):
        part = codes[start : start + BLOCK]
        x = scratch[0, : part.shape[0]]
        bits = scratch_bits[0, : part.shape[0]]
        if decoding == BFLOAT16:
            _decode_bf16(part, bits)
        elif decoding == FLOAT16:
            _decode_f16(part, bits)
            _rebias_f16(x)
        else:
            _decode_table(part, values, x)
        _zero_nonfinite(x, x)
        _units_of_block(x, part, first + start, form, first_unit, squares, hashes, keys)


@kernel(alone=True)
def units_of_floats(x, bits, first, scratch, form, first_unit, squares, hashes, keys):  # type: ignore[no-untyped-def]
    """One piece of float32 or float64; ``bits`` is ``x`` seen as unsigned integers."""
    for start in range(0, x.shape[0], BLOCK):
        part = x[start : start + BLOCK]
        finite = scratch[0, : part.shape[0]]
        _zero_nonfinite(part, finite)
        codes = bits[start : start + BLOCK]
        _units_of_block(finite, codes, first + start, form, first_unit, squares, hashes, keys)
