"""The same values in fewer bits: casts, and casts on the way back to a wider type."""

from __future__ import annotations

from gradscope.drift import code_kernels
from gradscope.drift.explanations.subject import Subject
from gradscope.drift.measures import Measures
from gradscope.drift.result import Explanation
from gradscope.drift.second_look import compare_all, compare_start, within_roundings
from gradscope.drift.sums import Rounding, rounding_between
from gradscope.report.model import Fact
from gradscope.statistics.dtypes import FORMATS
from gradscope.text import plural

#: Elements of which chance may put all on a coarser grid.
_FEW = 4

#: The surest first: what is nearest is a neighbour as well.
HOW = (
    (code_kernels.NEAREST, "to nearest"),
    (code_kernels.TOWARDS_ZERO, "towards zero"),
    (code_kernels.NEIGHBOUR, "to either neighbour (stochastically)"),
)


def cast(s: Subject) -> Explanation | None:
    """Every value is the other one's, rounded to the type of fewer bits."""
    rounding = rounding_between(s.base.dtype, s.new.dtype)
    return None if rounding is None else _rounded(s.measures, rounding)


def _rounded(m: Measures, rounding: Rounding) -> Explanation | None:
    assert m.roundings is not None
    for place, how in HOW:
        if m.roundings[place] == m.numel:
            beyond = m.roundings[code_kernels.BEYOND]
            lost = f"; {plural(beyond, 'element')} beyond its range" if beyond else ""
            if m.base_norm and not m.new_norm and m.finite:
                lost = "; every element is below its range and became zero"
            what = f"rounded to {rounding.dtype} {how}{lost}"
            text = f"the base is the new tensor {what}" if rounding.reverse else what
            facts: dict[str, Fact] = {"dtype": rounding.dtype, "beyond": beyond}
            return Explanation(kind="rounded", text=text, residual=0.0, facts=facts)
    return None


def of_common_values(s: Subject) -> Explanation | None:
    """Both are roundings of values that neither has: of one original in float32, as a rule."""
    types = s.base.dtype, s.new.dtype
    if len(set(types)) < 2 or not set(types) <= {"F16", "BF16"} or not s.measures.finite:
        return None
    if s.measures.roundings is not None and s.measures.numel in s.measures.roundings[:2]:
        return None  # one is the other's, to nearest or towards zero
    if (s.measures.relative_drift or 1) > 2 * s.coarser or not within_roundings(s.base, s.new):
        return None
    text = f"the same values, which the base has rounded to {types[0]} and this to {types[1]}"
    facts: dict[str, Fact] = {"dtype": "BF16", "beyond": 0}
    return Explanation(kind="rounded", text=text, residual=0.0, facts=facts)


def rounded_in_place(s: Subject) -> Explanation | None:
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
