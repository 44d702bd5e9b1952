"""The same elements elsewhere: in another order of dimensions, of rows or columns, in other shapes.

Rows that moved may have been rounded, put into codes or trained as well: each is then told by the
one of the base that it resembles most.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from gradscope.checkpoints.tensors import TensorRef
from gradscope.drift.explanations.rounding import HOW
from gradscope.drift.explanations.subject import Subject
from gradscope.drift.permutations import (
    Permutation,
    moved,
    permuted_alike,
    permuted_exactly,
    permuted_vector,
)
from gradscope.drift.result import Explanation
from gradscope.drift.second_look import compare_all, same, transpositions
from gradscope.report.model import Fact
from gradscope.statistics.dtypes import FORMATS

#: A cosine above which a tensor lies where it lay, whatever else became of it.
_IN_PLACE = 0.9
_AXES = ("rows", "columns")


def transposed(s: Subject) -> Explanation | None:
    """The dimensions change places."""
    if not s.rearranged or not s.floats:
        return None
    axes = next(transpositions(s.base, s.new), None)
    if axes is None:
        return None
    return Explanation(kind="transposed", text=f"transposed: axes {_words(axes)}", residual=0.0)


def _words(axes: tuple[int, ...]) -> str:
    return ", ".join(map(str, axes))


def permuted(s: Subject) -> Explanation | None:
    """Rows, or columns, in another order, bit by bit."""
    if not s.rearranged or not s.floats or s.base.dtype != s.new.dtype:
        return None
    for axis, what in enumerate(_AXES[: max(len(s.base.shape), 1)]):
        order = permuted_exactly(s.base, s.new, axis)
        if order is not None:
            what = what if len(s.base.shape) > 1 else "elements"
            text = _described(order, what)
            return Explanation(kind="permuted", text=text, residual=0.0, facts={"axis": axis})
    return None


def permuted_and_more(s: Subject) -> Explanation | None:
    """The same with whatever else became of them: rounding, codes, training."""
    cosine = s.measures.cosine
    if not s.floats or not s.measures.finite or cosine is None or cosine >= _IN_PLACE:
        return None
    if (order := permuted_vector(s.base, s.new)) is not None:
        return _with_the_rest(s, order, 0, _described(order, "elements"))
    for axis, what in enumerate(_AXES[: len(s.base.shape)]):
        order = permuted_alike(s.base, s.new, axis)
        if order is not None:
            return _with_the_rest(s, order, axis, _described(order, what))
    return None


def _with_the_rest(s: Subject, order: Permutation, axis: int, text: str) -> Explanation:
    rest = moved(s.base, s.new, order, axis)
    facts: dict[str, Fact] = {"axis": axis}
    how = next((how for place, how in HOW if rest.roundings[place] == s.measures.numel), None)
    if how is not None or not rest.residual:
        coarse = min((s.base.dtype, s.new.dtype), key=lambda d: FORMATS[d].mantissa_bits)
        text = f"{text}, and rounded to {coarse} {how}" if rest.residual else text
        return Explanation(kind="permuted", text=text, residual=0.0, facts=facts)
    if s.quantized is not None:
        ratio = -20 * math.log10(rest.residual)
        facts |= {"scheme": s.quantized.scheme, "snr_db": ratio, "nmse": rest.residual**2}
        facts |= {"bits": s.quantized.bits} if s.quantized.bits is not None else {}
        text = f"{text}; quantised ({s.quantized.scheme}): {ratio:.1f} dB signal to noise"
        return Explanation(kind="quantised", text=text, residual=rest.residual, facts=facts)
    text = f"{text}, and moved by {rest.residual:.2g} of their norm"
    facts["left"] = rest.residual
    return Explanation(kind="permuted", text=text, residual=rest.residual, facts=facts)


def _described(order: Permutation, what: str) -> str:
    """A permutation in words: whole blocks (heads), halves of heads interleaved, or any."""
    n = len(order)
    for size in (d for d in range(n // 2, 1, -1) if n % d == 0):
        blocks = order.reshape(-1, size)
        if (blocks == blocks[:, :1] + np.arange(size)).all() and not (blocks[:, 0] % size).any():
            return f"the {what} are permuted in blocks of {size} (heads)"
    for size in (d for d in range(4, n + 1, 2) if n % d == 0):
        local = order.reshape(-1, size) - np.arange(0, n, size)[:, None]
        halves = np.arange(size).reshape(2, -1).T.reshape(-1)
        for wanted in (halves, np.argsort(halves)):
            if (local == wanted).all():
                return (
                    f"the {what} are permuted in heads of {size}: the halves of rotary positions "
                    "are interleaved" + (" no longer" if wanted is not halves else "")
                )
    moved = int((order != np.arange(n)).sum())
    return f"{'all' if moved == n else f'{moved:,} of'} {n:,} {what} are permuted"


# -- other shapes ----------------------------------------------------------------------------------


def reshaped(base: TensorRef, new: TensorRef) -> Explanation | None:
    """What a tensor of another shape holds of the base's elements. Raises InputError."""
    for find in (_other_shape, _other_axes, _more_rows):
        if (found := next(find(base, new), None)) is not None:
            return found
    return None


def _other_shape(base: TensorRef, new: TensorRef) -> Iterator[Explanation]:
    plain = new.strides is None and new.decoding is None
    if base.numel == new.numel and plain and same(base, replace(new, shape=base.shape)):
        yield Explanation(kind="reshaped", text="the same elements in another shape", residual=0.0)


def _other_axes(base: TensorRef, new: TensorRef) -> Iterator[Explanation]:
    if sorted(base.shape) == sorted(new.shape):
        for axes in transpositions(base, new):
            text = f"transposed: axes {_words(axes)}"
            yield Explanation(kind="transposed", text=text, residual=0.0)


def _more_rows(base: TensorRef, new: TensorRef) -> Iterator[Explanation]:
    """A table that grew or shrank: what became of the rows of both."""
    shapes = base.shape, new.shape
    if len(shapes[0]) < 1 or len(shapes[0]) != len(shapes[1]) or shapes[0][1:] != shapes[1][1:]:
        return
    kept = min(base.shape[0], new.shape[0])
    if not kept or base.decoding is not None or new.decoding is not None:
        return
    shape = (kept, *base.shape[1:])
    m = compare_all(replace(base, shape=shape), replace(new, shape=shape))
    more = abs(base.shape[0] - new.shape[0])
    how = "added" if new.shape[0] > base.shape[0] else "cut off"
    what = "rows" if len(shape) > 1 else "elements"
    drift = m.relative_drift
    now = "are the same" if m.identical else f"drifted by {drift:.2g}" if drift else "differ"
    text = f"{more:,} {what} {how}; the first {kept:,} {now}"
    yield Explanation(kind="rows", text=text, residual=drift, facts={"rows": more})
