"""The compiled loops of dequantisation: codes out of words, values out of codes."""

from __future__ import annotations

from gradscope.compiled import kernel


@kernel()
def unpack_bytes(packed, high_first, skip, codes):  # type: ignore[no-untyped-def]
    """Two codes a byte, of which the first ``skip`` (0 or 1) are left out."""
    first = 4 if high_first else 0
    for i in range(codes.shape[0]):
        at = i + skip
        shift = first if at % 2 == 0 else 4 - first
        codes[i] = (packed[at // 2] >> shift) & 15


@kernel()
def unpack_words(words, bits, dense, first, columns, codes):  # type: ignore[no-untyped-def]
    """Codes from the least significant bit on; each row of words holds one row of ``columns``.

    ``dense``: a code may lie across two words; otherwise the bits that are left of a word are
    padding. ``first`` is the column at which the first row starts.
    """
    per_word = 32 // bits
    mask = (1 << bits) - 1
    row = 0
    column = first
    for i in range(codes.shape[0]):
        if dense:
            at = (column * bits) >> 5
            shift = (column * bits) & 31
            code = words[row, at] >> shift
            if shift + bits > 32:
                code |= words[row, at + 1] << (32 - shift)
        else:
            code = words[row, column // per_word] >> (bits * (column % per_word))
        codes[i] = code & mask
        column += 1
        if column == columns:
            column = 0
            row += 1


@kernel()
def dequantize(  # type: ignore[no-untyped-def]
    codes, table, first, columns, width, groups, scales, zeros, shifts, values
):
    """(table[code] - zero) * scale + shift, where each row has its own line of the three.

    Columns take them in turn, ``width`` at a time, or as ``groups`` (one index a column, if any)
    says. ``first`` is the column at which the first row starts.
    """
    row = 0
    column = first
    done = 0
    irregular = groups.shape[0] > 0
    while done < codes.shape[0]:
        group = groups[column] if irregular else column // width
        end = column + 1 if irregular else min((group + 1) * width, columns)
        count = min(end - column, codes.shape[0] - done)
        scale = scales[row, group]
        zero = zeros[row, group]
        shift = shifts[row, group]
        part = codes[done : done + count]
        out = values[done : done + count]
        for i in range(part.shape[0]):
            out[i] = (table[part[i]] - zero) * scale + shift
        done += count
        column += count
        if column == columns:
            column = 0
            row += 1
