"""What is measured of gradients on the CPU: compiled loops over all parameters of a network.

A torch operation costs microseconds whatever it is given, which small networks feel; so the loops
read tensors where they are. ``places`` [2, R] are the addresses of each row's gradient and weights,
0 where there are none. ``begin`` [3, R + 1] says where a row begins: its elements in a flat array,
the words of its buckets, and the places of a chosen part.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray, types  # type: ignore[attr-defined]
from numba.extending import intrinsic

from gradscope.compiled import kernel
from gradscope.histories.sketching import WIDTH, mixed

_mixed = kernel()(mixed)

#: Sums may be taken in any order, which lets the processor add several at once; NaN and infinity
#: keep their meaning. Sums are float64: squares of float32 neither overflow nor vanish.
_SUMS = {"reassoc", "contract"}


@intrinsic
def _pointer(_typing: Any, address: Any, like: Any) -> Any:
    """An address as a pointer to numbers of the type that a number has."""
    kind = types.CPointer(like)

    def generate(context: Any, builder: Any, _signature: Any, given: Any) -> Any:
        return builder.inttoptr(given[0], context.get_value_type(kind))

    return kind(address, like), generate


@kernel()
def _at(address, like, count):  # type: ignore[no-untyped-def]
    """The numbers at an address, [count], of the type that a number has."""
    return carray(_pointer(address, like), (count,))  # type: ignore[call-arg]


@kernel(fastmath=_SUMS)
def _length(values):  # type: ignore[no-untyped-def]
    total = 0.0
    for j in range(len(values)):
        total += np.float64(values[j]) * np.float64(values[j])
    return np.sqrt(total)


@kernel()
def _magnitudes(bits, values, infinity, out):  # type: ignore[no-untyped-def]
    """The greatest magnitude, elements not zero, NaN and infinite ones: out [4].

    ``bits`` are the values' own, which as integers have the order of the magnitudes once the sign
    is taken off; those above ``infinity``, the bits of infinity, are NaN. The greatest of NaN is
    NaN.
    """
    kind = bits.dtype.type  # wider integers would be compared a few at a time
    magnitude = kind(np.iinfo(kind).max)
    zeros, top = 0, kind(0)
    for j in range(len(bits)):
        size = kind(bits[j] & magnitude)
        top = kind(max(top, size))
        zeros += size == 0
    nans = infinite = 0
    if top >= infinity:
        for j in range(len(bits)):
            nans += (bits[j] & magnitude) > infinity
            infinite += (bits[j] & magnitude) == infinity
        out[0] = np.nan if nans else np.inf
    else:
        greatest = np.empty(1, bits.dtype)
        greatest[0] = top
        out[0] = greatest.view(values.dtype)[0]
    out[1], out[2], out[3] = len(bits) - zeros, nans, infinite


@kernel()
def _copy(values, out):  # type: ignore[no-untyped-def]
    for j in range(len(values)):
        out[j] = values[j]


@kernel()
def hashed_to(words, chosen, count, seed):  # type: ignore[no-untyped-def]
    """The bucket of each of ``count`` elements, eight to a word, the first lowest.

    They are those of ``measure.buckets``, of the width that sketches have: a byte, as which k more
    stand for a minus. ``chosen`` are the elements, none for the first.
    """
    words[:] = 0
    for j in range(count):
        h = _mixed(chosen[j] if len(chosen) else j, seed)
        bucket = (h >> 31) * WIDTH + (h & 0x7FFFFFFF) % WIDTH
        words[j >> 3] |= np.uint64(bucket) << np.uint64((j & 7) << 3)


@kernel()
def _byte(word, place):  # type: ignore[no-untyped-def]
    return (word >> np.uint64(place << 3)) & np.uint64(255)


@kernel()
def _sketch(values, words, chosen, norm, table, out):  # type: ignore[no-untyped-def]
    """The count-sketch of a unit row: out [k], zero where the norm is zero or not finite.

    ``words`` has the buckets of the elements that are sketched. ``chosen`` are those elements, none
    for all; their share of the squared norm is taken for that of their number. ``table`` [2 k] is
    room to work.
    """
    if not (norm > 0.0 and np.isfinite(norm)):
        out[:] = 0.0
        return
    width, count = len(out), len(chosen) if len(chosen) else len(values)
    table[:] = 0.0
    if len(chosen):
        for j in range(count):
            table[_byte(words[j >> 3], j & 7)] += values[chosen[j]]
    else:
        for i in range(count >> 3):
            word = words[i]
            for place in range(8):
                table[_byte(word, place)] += values[8 * i + place]
        for j in range(count & ~7, count):
            table[_byte(words[j >> 3], j & 7)] += values[j]
    scale = np.sqrt(len(values) / count) / norm
    for k in range(width):
        out[k] = (table[k] - table[width + k]) * scale


@kernel()
def taken(places, begin, kept, before, infinity, words, chosen, whole, keep, block, slot):  # type: ignore[no-untyped-def]
    """What gradients are before a step: block[slot] [R, 8 + k], in the order of ``flat.CELLS``.

    Only the norms unless ``whole``. With ``keep`` gradients and weights are copied, to ``kept`` and
    ``before``, for ``changed``. The last k, which may be none, are a sketch of the unit gradient.
    Returns whether a gradient is nowhere.
    """
    out, cells, lacking = block[slot], 8, False
    table = np.empty(2 * (out.shape[1] - cells))
    nothing = kept.dtype.type(0)
    for row in range(len(out)):
        first, last = begin[0, row], begin[0, row + 1]
        lacking |= places[0, row] == 0
        values = _at(places[0, row], nothing, last - first if places[0, row] else 0)
        norm = _length(values)
        out[row, :cells] = np.nan
        out[row, 0] = norm
        if whole:
            _magnitudes(_at(places[0, row], infinity, len(values)), values, infinity, out[row, 1:])
            weights = _at(places[1, row], nothing, last - first)
            out[row, 5] = _length(weights)
            if keep:
                _copy(values, kept[first:last])
                _copy(weights, before[first:last])
        if len(table):
            at = words[begin[1, row] : begin[1, row + 1]]
            where = chosen[begin[2, row] : begin[2, row + 1]]
            _sketch(values, at, where, norm, table, out[row, cells:])
    return lacking


@kernel(fastmath=_SUMS)
def changed(places, begin, kept, before, block, slot):  # type: ignore[no-untyped-def]
    """What a step did: the norm of each row's change, and its cosine with minus the gradient.

    The seventh and eighth of what ``taken`` gives.
    """
    out = block[slot]
    nothing = kept.dtype.type(0)
    for row in range(len(out)):
        first, last = begin[0, row], begin[0, row + 1]
        was, along = before[first:last], kept[first:last]
        now = _at(places[1, row], nothing, last - first)
        total = inner = 0.0
        for j in range(len(now)):
            moved = np.float64(was[j] - now[j])
            total += moved * moved
            inner += moved * np.float64(along[j])
        size = np.sqrt(total)
        scale = size * out[row, 0]
        out[row, 6], out[row, 7] = size, inner / scale if scale > 0.0 else np.nan
