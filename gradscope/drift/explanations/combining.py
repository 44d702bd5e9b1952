"""A mix of several checkpoints: interpolation, and sums of what each of them learnt."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gradscope.checkpoints.tensors import TensorRef
from gradscope.checkpoints.tiles import PIECE
from gradscope.drift.explanations.subject import Parent, Subject
from gradscope.drift.result import Explanation
from gradscope.drift.steps import step_of
from gradscope.report.model import Fact
from gradscope.text import quoted
from gradscope.weights.products import values

Values = npt.NDArray[np.float64]

#: What a mix may leave over: so many times the energy of one rounding (arithmetic in the stored
#: type rounds product and sum), or so much of the energy of the change.
_ROUNDINGS, _LEFT = 8.0, 0.01
#: Directions of less than this share of the greatest energy say nothing.
_DEGENERATE = 1e-12
#: A weight so near to 0 or 1 is it.
_WHOLE = 1e-3


@dataclass(frozen=True, slots=True)
class _Mix:
    """Weights of the base and of each parent, and the squares of what they leave over."""

    weights: tuple[float, ...]
    left: float
    rounding: float
    change: float
    norm: float

    @property
    def exact(self) -> bool:
        """Whether nothing but rounding is left."""
        return self.left <= _ROUNDINGS * self.rounding

    @property
    def holds(self) -> bool:
        """Whether it explains the change."""
        return self.exact or self.left <= _LEFT * self.change


def combined(s: Subject) -> Explanation | None:
    """base + Σ aᵢ (parentᵢ − base) with fitted aᵢ, else Σ aᵢ tensorᵢ with weights of any sum.

    The first is interpolation, an average, and task arithmetic (Ilharco et al. 2023, arXiv
    2212.04089); the second spherical interpolation.
    """
    parents = [p for p in s.parents if p.ref.shape == s.new.shape]
    if not parents or not s.floats or not s.measures.finite or s.measures.numel < 4:
        return None
    refs = [s.base, *(p.ref for p in parents)]
    gram = _gram([*refs, s.new])
    if not np.isfinite(gram).all():
        return None
    mix = _mixed(refs, s.new, _to_one(gram))
    if not mix.holds:
        free = _mixed(refs, s.new, _least_squares(gram[:-1, :-1], gram[:-1, -1]))
        mix = free if free.exact else mix
    return _explanation(mix, parents) if mix.holds else None


def _gram(refs: Sequence[TensorRef]) -> Values:
    """The products of all tensors with one another."""
    total = np.zeros((len(refs), len(refs)))
    for rows in _together(refs):
        total += rows @ rows.T
    return total


def _together(refs: Sequence[TensorRef]) -> Iterator[Values]:
    numel = refs[0].numel
    for start in range(0, numel, PIECE):
        yield np.stack([values(ref, start, min(start + PIECE, numel)) for ref in refs])


def _to_one(gram: Values) -> Values:
    """The best weights of all but the last that sum to one."""
    towards = np.eye(len(gram))
    towards[:, 0] -= 1  # differences from the base
    towards[0, 0] = 1
    inner = (towards @ gram @ towards.T)[1:, 1:]
    steps = _least_squares(inner[:-1, :-1], inner[:-1, -1])
    return np.array([1 - steps.sum(), *steps])


def _least_squares(gram: Values, products: Values) -> Values:
    return np.asarray(np.linalg.lstsq(gram, products, rcond=_DEGENERATE)[0])


def _mixed(refs: Sequence[TensorRef], new: TensorRef, weights: Values) -> _Mix:
    left = rounding = change = norm = 0.0
    for rows in _together([*refs, new]):
        stored = rows[-1]
        left += float(np.sum((stored - weights @ rows[:-1]) ** 2))
        rounding += float(np.sum(step_of(stored, new.dtype) ** 2) / 12)
        change += float(np.sum((stored - rows[0]) ** 2))
        norm += float(np.vdot(stored, stored))
    return _Mix(tuple(map(float, weights)), left, rounding, change, norm)


def _explanation(mix: _Mix, parents: Sequence[Parent]) -> Explanation:
    facts: dict[str, Fact] = {"base": mix.weights[0]}
    facts |= {p.label: weight for p, weight in zip(parents, mix.weights[1:], strict=True)}
    text = _sum(mix.weights, parents)
    residual = math.sqrt(mix.left / mix.norm) if mix.norm else 0.0
    if not mix.exact:
        facts["left"] = residual
        text += f"; {math.sqrt(mix.left / mix.change):.1%} of the change is left over"
    return Explanation(kind="combined", text=text, residual=residual, facts=facts)


def _sum(weights: Sequence[float], parents: Sequence[Parent]) -> str:
    """The mix in words: shares that sum to one, or what is added to the base."""
    names = [quoted(p.label) for p in parents]
    whole = [n for n, w in zip(names, weights[1:], strict=True) if abs(w - 1) < _WHOLE]
    others = [w for w in weights if abs(w) >= _WHOLE]
    if whole and len(others) == 1:
        return f"the tensor of {whole[0]}"
    if abs(sum(weights) - 1) < _WHOLE and min(weights) < -_WHOLE:
        added = [f"({n} − the base)" for n in names]
        return f"the base{_terms(weights[1:], added)}"
    return _terms(weights, ["the base", *names]).removeprefix(" + ")


def _terms(weights: Sequence[float], names: Sequence[str]) -> str:
    """Each with its sign before it; those that are not there are left out."""
    return "".join(
        f" {'−' if w < 0 else '+'} {abs(w):.4g} × {n}"
        for n, w in zip(names, weights, strict=True)
        if abs(w) >= _WHOLE
    )
