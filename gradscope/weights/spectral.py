"""``--spectral``: the singular values of every matrix of a checkpoint."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from gradscope.checkpoints.tensors import Checkpoint, TensorRef
from gradscope.errors import UsageError
from gradscope.quantization.weights import Quantization
from gradscope.report.model import Skip
from gradscope.spectra.algebra import Algebra, Array, Values
from gradscope.spectra.convolutions import operator_norm, slices
from gradscope.spectra.matrices import Matrix, matrix, read
from gradscope.spectra.spectrum import Spectrum, Tail, greatest, spectrum, tail
from gradscope.statistics.dtypes import is_float
from gradscope.text import quoted
from gradscope.weights.heads import Attention, Heads
from gradscope.weights.layouts import as_rows, layouts
from gradscope.weights.measuring import roles_of
from gradscope.weights.result import (
    AttentionResult,
    Examined,
    Need,
    SpectrumResult,
    TensorResult,
    header_result,
)
from gradscope.weights.roles import MATRICES, Role

if TYPE_CHECKING:
    from gradscope.statistics import Engine
    from gradscope.statistics.layout import UnitLayout

S = TypeVar("S")
R = TypeVar("R")

#: Values in a tail from which weightwatcher calls an exponent reliable.
_TAIL = 50
#: The p-value below which a power law is ruled out (Clauset, Shalizi and Newman 2009).
_RULED_OUT = 0.1


@dataclass(frozen=True)
class Wanted:
    """How spectra are computed, and until when."""

    algebra: Algebra
    #: Whether the greatest singular values are enough.
    norms_only: bool = False
    #: Drawn sets of the p-value of each fit; none without.
    bootstrap: int = 0
    #: As it was given, and when no further spectrum is begun, by ``time.monotonic``.
    budget: str | float | None = None
    until: float = math.inf

    @property
    def spent(self) -> bool:
        """Whether the budget is."""
        return time.monotonic() >= self.until


def wanted_spectra(
    device: str,
    norms_only: bool = False,
    bootstrap: int = 0,
    budget: str | float | None = None,
) -> Wanted:
    """What the options of ``--spectral`` say; the time of the budget begins now.

    Raises UsageError for a budget that is no time, for options that exclude each other, and for a
    device that is absent.
    """
    until = math.inf if budget is None else time.monotonic() + _seconds(budget)
    if norms_only and bootstrap:
        raise UsageError("--bootstrap tests fitted tails, which --norms-only leaves out")
    return Wanted(algebra_for(device), norms_only, bootstrap, budget, until)


def _seconds(budget: str | float) -> float:
    """Seconds, with or without their unit, or minutes."""
    match = re.fullmatch(r"\s*(\d+(\.\d*)?)\s*(s|m)?\s*", str(budget))
    if match is None:
        raise UsageError(f"--budget {quoted(str(budget), 40)} is no time, such as 60s or 5m")
    return float(match[1]) * (60 if match[3] == "m" else 1)


def algebra_for(device: str) -> Algebra:
    """What computes on a device; torch is imported for any but the CPU. Raises UsageError."""
    if device == "cpu":
        from gradscope.spectra.algebra import Numpy

        return Numpy()
    from gradscope.spectra.torch_algebra import algebra_on

    return algebra_on(device)


@dataclass(frozen=True, slots=True)
class _Subject:
    """A tensor, the matrix [rows, columns] that it is read as, and how its units lie."""

    tensor: TensorResult
    ref: TensorRef
    rows: int
    columns: int
    layout: UnitLayout | None

    @property
    def cost(self) -> float:
        """About how many multiplications all of its spectrum takes."""
        short = min(self.rows, self.columns)
        return self.tensor.numel * short + 10.0 * short**3


def with_spectra(
    examined: Examined, engine: Engine[Any, Any], progress: Callable[[int], None], *, wanted: Wanted
) -> Examined:
    """The tensors with their spectra, while there is time for them.

    The cheapest first within a budget, of which they then get the most; else the dearest first,
    after which no core waits for another. Raises InputError when a file changes or ends while it
    is read.
    """
    whole = wanted.budget is None
    subjects = sorted(_subjects(examined), key=lambda s: s.cost, reverse=whole)
    found: dict[str, SpectrumResult] = {}
    for subject, result in zip(subjects, _each(engine, _Work(wanted), subjects), strict=True):
        if result is not None:
            found[subject.tensor.name] = result
        progress(subject.ref.nbytes)
    wanting = {s.tensor.name for s in subjects} - found.keys()
    late = [t.name for t in examined.tensors if t.name in wanting]
    tensors = tuple(
        t.model_copy(update={"spectrum": found[t.name]}) if t.name in found else t
        for t in examined.tensors
    )
    left = tuple(_late(name, "its spectrum", wanted) for name in late)
    seen = replace(examined, tensors=tensors, left_out=left)
    if wanted.norms_only:
        return seen
    seen = replace(seen, measured=examined.measured | {Need.SPECTRA})
    return _with_attention(seen, engine, wanted)


def _each(
    engine: Engine[Any, Any], work: Callable[[S], R | None], subjects: Sequence[S]
) -> Iterator[R | None]:
    """What an engine finds of each, which is not to wait for the threads of another's algebra."""
    from gradscope.statistics.engine import one_blas_thread

    with one_blas_thread():
        yield from engine(work, subjects)


def _late(name: str, what: str, wanted: Wanted) -> Skip:
    return Skip(subject=name, reason=f"{what}: no time left of --budget {wanted.budget}")


def _with_attention(examined: Examined, engine: Engine[Any, Any], wanted: Wanted) -> Examined:
    """With the heads of every attention for which there is time."""
    known = Heads.of(examined, *as_values(examined))
    attentions = list(known.attentions())
    found = list(_each(engine, _OfHeads(known, wanted), attentions))
    late = [a.module for a, result in zip(attentions, found, strict=True) if result is None]
    left = (_late(module.rstrip("./"), "its heads", wanted) for module in late)
    return replace(
        examined,
        attention=tuple(result for result in found if result is not None),
        left_out=(*examined.left_out, *left),
    )


def attention_groups(checkpoint: Checkpoint, quantization: Quantization) -> Iterator[Iterator[str]]:
    """Names of what each attention that may be known is measured by, from headers alone."""
    names = roles_of(checkpoint.tensors, quantization)
    unread = tuple(header_result(r, names[r.name], checkpoint.path) for r in checkpoint.tensors)
    seen = Examined(checkpoint, unread, frozenset(), quantization=quantization)
    refs, layout = as_values(seen)
    known = Heads(seen, {n: ref for n, ref in refs.items() if is_float(ref.dtype)}, layout)
    yield from map(known.reads, known.attentions())


@dataclass(frozen=True)
class _OfHeads:
    """What the heads of one attention can do; None once the budget is spent."""

    known: Heads
    wanted: Wanted

    def __call__(self, found: Attention) -> AttentionResult | None:
        return None if self.wanted.spent else self.known.result(found)


def as_values(
    examined: Examined,
) -> tuple[Mapping[str, TensorRef], Callable[[TensorRef], UnitLayout | None]]:
    """The tensors by name, quantised weights as their values, and how the units of each lie."""
    values = {w.codes.name: w.values for w in examined.quantization.weights}
    refs = {ref.name: values.get(ref.name) or ref for ref in examined.checkpoint.tensors}
    roles = {t.name: t.role for t in examined.tensors}
    return refs, layouts(refs.values(), roles, examined.document("config"))


def _subjects(examined: Examined) -> Iterator[_Subject]:
    """The matrices of the model whose every element is finite."""
    refs, layout = as_values(examined)
    for tensor in examined.tensors:
        ref = refs[tensor.name]
        if not _has_spectrum(tensor, ref):
            continue
        units = layout(ref)
        subject = _Subject(tensor, *as_rows(ref, units), units)
        if min(subject.rows, subject.columns) > 1:
            yield subject


def _has_spectrum(tensor: TensorResult, ref: TensorRef) -> bool:
    s = tensor.statistics
    if s is None or tensor.role not in MATRICES or len(tensor.shape) < 2 or not is_float(ref.dtype):
        return False
    return ref.part == "model" and s.count == s.finite_count > s.zero_count


@dataclass(frozen=True)
class _Work:
    """One tensor's spectrum; None once the budget is spent."""

    wanted: Wanted

    def __call__(self, subject: _Subject) -> SpectrumResult | None:
        if self.wanted.spent:
            return None
        if subject.tensor.role is Role.EXPERTS and subject.layout is not None:
            return self._experts(subject, subject.layout)
        if subject.tensor.role in (Role.CONV, Role.DEPTHWISE) and not self.wanted.norms_only:
            return self._convolution(subject)
        return self._matrix(matrix(subject.ref, subject.rows, subject.columns))

    def _matrix(self, found: Matrix) -> SpectrumResult:
        if self.wanted.norms_only:
            norm, squares = greatest(found, self.wanted.algebra)
            return SpectrumResult(spectral_norm=norm, stable_rank=squares / norm**2 or None)
        values = self.wanted.algebra.eigenvalues(found.chunks, found.columns)
        return self._result(values, values, found)

    def _result(self, values: Values, pooled: Values, found: Matrix) -> SpectrumResult:
        """Of a matrix, with the tail of ``pooled``."""
        seen = spectrum(values, found.rows, found.columns)
        return _described(seen, tail(pooled, self.wanted.bootstrap))

    def _convolution(self, subject: _Subject) -> SpectrumResult:
        """As the matrix that it is reshaped to; alpha of weightwatcher's slices."""
        algebra = self.wanted.algebra
        rows = read(subject.ref, 0, subject.tensor.numel).reshape(subject.rows, subject.columns)
        found, kernel = Matrix.of(rows), _kernel(rows, subject)
        values = algebra.eigenvalues(found.chunks, found.columns)
        pointwise = math.prod(kernel.shape[2:]) == 1
        pooled = values / 2 if pointwise else slices(kernel, algebra)
        operator = operator_norm(kernel, _groups(subject))
        return self._result(values, pooled, found).model_copy(update={"operator_norm": operator})

    def _experts(self, subject: _Subject, layout: UnitLayout) -> SpectrumResult:
        """Of each expert, and the extremes of all."""
        each = subject.rows // layout.groups
        found = []
        for expert in range(layout.groups):
            part = matrix(subject.ref, each, subject.columns, first=expert * each)
            found.append(self._matrix(part))
        return SpectrumResult(
            spectral_norm=max(e.spectral_norm for e in found),
            stable_rank=min((e.stable_rank for e in found if e.stable_rank), default=None),
            effective_rank=min((e.effective_rank for e in found if e.effective_rank), default=None),
            experts=tuple(found),
        )


def _groups(subject: _Subject) -> int:
    """Of a convolution: what the layout tells, and depthwise ones."""
    if subject.tensor.role is Role.DEPTHWISE:
        return subject.rows
    return subject.layout.groups if subject.layout is not None else 1


def _kernel(rows: Array, subject: _Subject) -> Array:
    """[out, in, *places], whatever dimension of the tensor counts which."""
    shape, layout = subject.tensor.shape, subject.layout
    if layout is None or layout.axis == 0:
        return rows.reshape(shape)
    if layout.axis == 1 < len(shape) - 1:  # transposed: groups lie one after another
        return rows.reshape(layout.units, -1, *shape[2:])
    places = shape[:-2]
    return np.moveaxis(rows.reshape(subject.rows, *places, -1), -1, 1)


def _described(seen: Spectrum, found: Tail | None) -> SpectrumResult:
    bulk = seen.bulk
    described = SpectrumResult(
        spectral_norm=seen.norm,
        stable_rank=seen.stable_rank,
        effective_rank=seen.effective_rank,
        mp_edge=bulk.edge if bulk else None,
        spikes=bulk.spikes if bulk else None,
        mp_distance=bulk.distance if bulk else None,
    )
    if found is None:
        return described
    p, law = found.p_value, found.law
    fitted = {
        "alpha": law.alpha,
        "alpha_tail_count": law.tail,
        "alpha_xmin": law.xmin,
        "alpha_distance": law.distance,
        "alpha_p_value": p,
        "alpha_reliable": law.tail >= _TAIL and (p is None or p >= _RULED_OUT),
    }
    return described.model_copy(update=fitted)
