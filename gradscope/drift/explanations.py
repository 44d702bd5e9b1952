"""Why a tensor changed: the first explanation that holds, with what it leaves over."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from gradscope.checkpoints.tensors import DTYPE_BITS, TensorRef
from gradscope.drift import kernels
from gradscope.drift.low_rank import low_rank
from gradscope.drift.result import Explanation
from gradscope.drift.second_look import (
    Permutation,
    codes_at,
    compare_all,
    compare_start,
    first_difference,
    permuted,
    same,
    scale_residual,
    transpositions,
)
from gradscope.drift.sums import Measures, Rounding, rounding_between
from gradscope.quantization.weights import QuantizedWeight
from gradscope.report.model import Fact
from gradscope.statistics.dtypes import FORMATS
from gradscope.text import plural, runs

#: Independent tensors of n elements have a cosine of N(0, 1/n).
_DEVIATIONS = 5.0
#: Elements from which a cosine near zero says anything.
_LEAST = 256
#: Elements of which chance may put all on a coarser grid.
_FEW = 4
#: Sums of squares that are equal but for the order of summing.
_EQUAL = 1e-9


@dataclass(frozen=True, slots=True)
class Subject:
    """Two tensors of one shape, what was measured of them, and whether either is quantised."""

    base: TensorRef
    new: TensorRef
    measures: Measures
    quantized: QuantizedWeight | None = None
    #: Whether training moves it, and it so has a past that can be lost.
    trained: bool = True

    @property
    def floats(self) -> bool:
        """Whether both have real floating-point elements."""
        return self.base.dtype in FORMATS and self.new.dtype in FORMATS

    @property
    def coarser(self) -> float:
        """Half the relative distance of the values of the type of fewer mantissa bits."""
        bits = min(FORMATS[r.dtype].mantissa_bits for r in (self.base, self.new))
        return 2.0 ** -(bits + 1)

    @property
    def rearranged(self) -> bool:
        """Whether it may hold the base's elements in other places."""
        m = self.measures
        a, b = m.sums[kernels.SQUARES_BASE], m.sums[kernels.SQUARES_NEW]
        cosine = m.cosine
        return cosine is not None and cosine < 0.999 and abs(a - b) <= _EQUAL * a


def explained(subject: Subject) -> Explanation | None:
    """The first explanation that holds, None where none does. Raises InputError."""
    if subject.measures.identical:
        return _retyped(subject)
    for find in _FINDERS:
        if (found := find(subject)) is not None:
            return found
    return None


def _retyped(s: Subject) -> Explanation | None:
    if s.base.dtype == s.new.dtype:
        return None
    text = f"{s.base.dtype} stored as {s.new.dtype}, every value kept"
    return Explanation(kind="cast", text=text, residual=0.0)


# -- damage ----------------------------------------------------------------------------------------


def _one_bit(s: Subject) -> Explanation | None:
    if s.measures.changed != 1 or s.measures.ulps is None:
        return None
    place = first_difference(s.base, s.new)
    flipped = codes_at(s.base, place) ^ codes_at(s.new, place)
    if flipped.bit_count() != 1:
        return None
    index = [int(i) for i in np.unravel_index(place, s.base.shape)]
    bit = flipped.bit_length() - 1
    text = f"one bit differs: bit {bit} of element {index}{_meaning(s.base.dtype, bit)}"
    return Explanation(kind="bit-flip", text=text, residual=0.0, facts={"bit": bit})


def _meaning(dtype: str, bit: int) -> str:
    form = FORMATS[dtype]
    if bit == DTYPE_BITS[dtype] - 1 and form.signed:
        return " (the sign)"
    return " (exponent)" if bit >= form.mantissa_bits else " (mantissa)"


def _non_finite(s: Subject) -> Explanation | None:
    count = s.measures.counts[kernels.ODD_NEW] - s.measures.counts[kernels.ODD_BASE]
    if count <= 0 or s.measures.roundings is not None:
        return None
    text = f"{plural(count, 'element')} became NaN or infinite"
    return Explanation(kind="non-finite", text=text, facts={"elements": count})


def _byte_swapped(s: Subject) -> Explanation | None:
    wide = DTYPE_BITS[s.base.dtype] >= 16 and s.base.decoding is s.new.decoding is None
    if not wide or s.base.dtype != s.new.dtype or (s.measures.changed_fraction or 0) < 0.5:
        return None
    if not same(s.base, replace(s.new, big_endian=not s.new.big_endian)):
        return None
    return Explanation(
        kind="byte-swapped", text="the bytes of every element are swapped", residual=0.0
    )


def _zeroed(s: Subject) -> Explanation | None:
    if s.measures.finite and s.measures.base_norm and not s.measures.new_norm:
        return Explanation(kind="zeroed", text="every element became zero", residual=0.0)
    return None


def _from_zero(s: Subject) -> Explanation | None:
    if s.measures.finite and s.measures.new_norm and not s.measures.base_norm:
        return Explanation(kind="from-zero", text="every element was zero")
    return None


# -- the same values in fewer bits -----------------------------------------------------------------

_HOW = (
    (kernels.NEAREST, "to nearest"),
    (kernels.TOWARDS_ZERO, "towards zero"),
    (kernels.NEIGHBOUR, "to either neighbour (stochastically)"),
)


def _cast(s: Subject) -> Explanation | None:
    rounding = rounding_between(s.base.dtype, s.new.dtype)
    return None if rounding is None else _rounded(s.measures, rounding)


def _rounded(m: Measures, rounding: Rounding) -> Explanation | None:
    assert m.roundings is not None
    for place, how in _HOW:
        if m.roundings[place] == m.numel:
            beyond = m.roundings[kernels.BEYOND]
            lost = f"; {plural(beyond, 'element')} beyond its range" if beyond else ""
            if m.base_norm and not m.new_norm and m.finite:
                lost = "; every element is below its range and became zero"
            what = f"rounded to {rounding.dtype} {how}{lost}"
            text = f"the base is the new tensor {what}" if rounding.reverse else what
            facts: dict[str, Fact] = {"dtype": rounding.dtype, "beyond": beyond}
            return Explanation(kind="rounded", text=text, residual=0.0, facts=facts)
    return None


def _rounded_in_place(s: Subject) -> Explanation | None:
    """Stored in the type of the base, but rounded to a narrower one on the way."""
    if s.base.dtype != s.new.dtype or not s.floats or s.quantized is not None:
        return None
    if s.base.dtype not in ("F64", "F32", "F16", "BF16") or s.measures.numel < _FEW:
        return None
    own = FORMATS[s.base.dtype]
    for dtype in ("F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"):
        if FORMATS[dtype].mantissa_bits >= own.mantissa_bits:
            continue
        rounding = Rounding(dtype)
        start = compare_start(s.base, s.new, rounding)
        if _rounded(start, rounding) is None:
            continue
        found = _rounded(compare_all(s.base, s.new, rounding), rounding)
        if found is not None:
            text = f"{found.text}, and stored as {s.new.dtype}"
            return found.model_copy(update={"text": text})
    return None


def _quantised(s: Subject) -> Explanation | None:
    """How far the values of codes are from what they stand for, as a signal-to-noise ratio."""
    noise = s.measures.relative_drift
    if s.quantized is None or not noise or noise >= 1:
        return None
    ratio = -20 * math.log10(noise)
    scheme = s.quantized.scheme
    text = f"quantised ({scheme}): {ratio:.1f} dB signal to noise"
    facts: dict[str, Fact] = {"scheme": scheme, "snr_db": ratio, "nmse": noise**2}
    if s.quantized.bits is not None:
        facts["bits"] = s.quantized.bits
    return Explanation(kind="quantised", text=text, residual=noise, facts=facts)


# -- simple operations -----------------------------------------------------------------------------


def _scaled(s: Subject) -> Explanation | None:
    m = s.measures
    if not s.floats or not m.finite or m.cosine is None or m.numel < 2:
        return None
    factor = m.sums[kernels.PRODUCTS] / m.sums[kernels.SQUARES_BASE]
    estimate = math.sqrt(max(0.0, 1 - m.cosine**2))
    if estimate > max(s.coarser, 1e-6):
        return None
    if factor > 0 and abs(factor - 1) < 4 * max(estimate, s.coarser):
        return None
    residual = scale_residual(s.base, s.new, factor)
    if residual > s.coarser:
        return None
    text = "every sign was turned" if abs(factor + 1) < s.coarser else f"scaled by {factor:.6g}"
    return Explanation(kind="scaled", text=text, residual=residual, facts={"factor": factor})


def _pruned(s: Subject) -> Explanation | None:
    m = s.measures
    ab, b = m.sums[kernels.PRODUCTS], m.sums[kernels.SQUARES_NEW]
    if not m.finite or not b or abs(ab - b) > 1e-12 * b or any(c.new for c in m.largest):
        return None
    text = (
        f"{m.changed:,} elements ({m.changed / m.numel:.1%}) became zero, the others are the same"
    )
    return Explanation(kind="pruned", text=text, residual=0.0, facts={"elements": m.changed})


def _some_rows(s: Subject, most: float = 0.5, least: int = 8) -> Explanation | None:
    changed = np.flatnonzero(s.measures.row_changed)
    total = len(s.measures.row_changed)
    if total < least or len(changed) > most * total:
        return None
    which = runs(map(int, changed), len(changed))
    noun = "row" if len(changed) == 1 else "rows"
    text = f"only {noun} {which} of {total:,} changed"
    return Explanation(kind="rows", text=text, residual=0.0, facts={"rows": len(changed)})


# -- the same elements elsewhere -------------------------------------------------------------------


def _transposed(s: Subject) -> Explanation | None:
    if not s.rearranged or not s.floats:
        return None
    axes = next(transpositions(s.base, s.new), None)
    if axes is None:
        return None
    return Explanation(kind="transposed", text=f"transposed: axes {_words(axes)}", residual=0.0)


def _words(axes: tuple[int, ...]) -> str:
    return ", ".join(map(str, axes))


def _permuted(s: Subject) -> Explanation | None:
    if not s.rearranged or not s.floats or s.base.dtype != s.new.dtype:
        return None
    for axis in range(min(2, len(s.base.shape))):
        order = permuted(s.base, s.new, axis) if len(s.base.shape) > 1 else None
        if order is not None:
            text = _described(order, ("rows", "columns")[axis])
            return Explanation(kind="permuted", text=text, residual=0.0, facts={"axis": axis})
    return None


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


def _low_rank(s: Subject) -> Explanation | None:
    m = s.measures
    dense = (m.changed_fraction or 0) > 0.25 and m.finite and len(s.base.shape) >= 2
    if not dense or not s.floats or m.numel < _LEAST or not s.trained:
        return None
    found = low_rank(s.base, s.new)
    if found is None:
        return None
    text = f"an update of rank {found.rank} ({found.energy:.1%} of its energy)"
    facts: dict[str, Fact] = {"rank": found.rank, "energy": found.energy}
    return Explanation(kind="low-rank", text=text, residual=found.residual, facts=facts)


def _replaced(s: Subject) -> Explanation | None:
    m = s.measures
    if m.numel < _LEAST or len(s.base.shape) < 2 or m.cosine is None or not s.floats:
        return None
    if not s.trained:
        return None
    bound = _DEVIATIONS / math.sqrt(m.numel)
    if abs(m.cosine) >= bound or not 0.01 < (m.norm_ratio or 0) < 100:
        return None
    return Explanation(
        kind="re-initialised",
        text=f"unrelated to the base: a cosine of {m.cosine:.2g}, as of independent tensors",
        residual=math.sqrt(1 - m.cosine**2),
        facts={"cosine": m.cosine, "bound": bound},
    )


_FINDERS: tuple[Callable[[Subject], Explanation | None], ...] = (
    _one_bit, _byte_swapped, _cast, _zeroed, _from_zero, _quantised, _non_finite, _pruned, _scaled,
    _rounded_in_place, _transposed, _permuted, _some_rows, _replaced, _low_rank,
)  # fmt: skip


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
