"""What one operation does: a factor, zeros, a few rows, a product of low rank, new values."""

from __future__ import annotations

import math

import numpy as np

from gradscope.drift import kernels
from gradscope.drift.explanations.subject import Subject
from gradscope.drift.low_rank import low_rank
from gradscope.drift.result import Explanation
from gradscope.drift.second_look import scale_residual
from gradscope.report.model import Fact
from gradscope.text import runs

#: Independent tensors of n elements have a cosine of N(0, 1/n).
_DEVIATIONS = 5.0
#: Elements from which a cosine near zero says anything.
_LEAST = 256


def scaled(s: Subject) -> Explanation | None:
    """One factor."""
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


def shifted(s: Subject) -> Explanation | None:
    """One number was added to all: norms whose gain is stored as it is, or without its one."""
    m = s.measures
    if not s.floats or not m.finite or m.numel < 2 or not m.new_norm:
        return None
    by = m.sums[kernels.CHANGES] / m.numel
    squares = m.sums[kernels.SQUARES_CHANGE]
    left = math.sqrt(max(0.0, squares - m.numel * by**2))
    greatest = max(m.base_norm, m.new_norm)
    if left > s.coarser * greatest or squares < 64 * (s.coarser * greatest) ** 2:
        return None
    facts: dict[str, Fact] = {"by": by}
    residual = left / m.new_norm
    return Explanation(kind="shifted", text=f"shifted by {by:.6g}", residual=residual, facts=facts)


def pruned(s: Subject) -> Explanation | None:
    """Elements became zero, the others stayed."""
    m = s.measures
    ab, b = m.sums[kernels.PRODUCTS], m.sums[kernels.SQUARES_NEW]
    if not m.finite or not b or abs(ab - b) > 1e-12 * b or any(c.new for c in m.largest):
        return None
    text = (
        f"{m.changed:,} elements ({m.changed / m.numel:.1%}) became zero, the others are the same"
    )
    return Explanation(kind="pruned", text=text, residual=0.0, facts={"elements": m.changed})


def some_rows(s: Subject, most: float = 0.5, least: int = 8) -> Explanation | None:
    """Some rows moved, the others did not by a bit."""
    changed = np.flatnonzero(s.measures.row_changed)
    total = len(s.measures.row_changed)
    if total < least or len(changed) > most * total:
        return None
    which = runs(map(int, changed), len(changed))
    noun = "row" if len(changed) == 1 else "rows"
    text = f"only {noun} {which} of {total:,} changed"
    return Explanation(kind="rows", text=text, residual=0.0, facts={"rows": len(changed)})


def of_low_rank(s: Subject) -> Explanation | None:
    """The product of two thin matrices was added."""
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


def replaced(s: Subject) -> Explanation | None:
    """Nothing of the base is left."""
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
