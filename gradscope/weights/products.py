"""What an adapter does to its module: the singular values of the product, which is never formed.

With B = Q R and Aᵀ = P S (QR, by pieces of rows), B A = Q (R Sᵀ) Pᵀ: its singular values are those
of the r × r matrix R Sᵀ.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from gradscope.checkpoints.tensors import TensorRef
from gradscope.checkpoints.tiles import PIECE, read_range
from gradscope.statistics.codings import CODED, code_values, is_float
from gradscope.statistics.engine import Engine, one_blas_thread
from gradscope.weights.adapters import Adapter, Layout
from gradscope.weights.result import AdapterResult, Examined

Values = npt.NDArray[np.float64]

#: Multiplications that all products of a checkpoint may cost: about two seconds of one core. Of
#: more, every second, third … module is measured.
BUDGET = 2e10


def values(ref: TensorRef, start: int = 0, stop: int | None = None) -> Values:
    """The elements of a float or integer tensor, at most a piece, in float64."""
    stored = read_range(ref, start, ref.numel if stop is None else stop)
    if ref.dtype in CODED:
        return np.asarray(code_values(ref.dtype)[stored.view(f"u{stored.itemsize}")])
    return stored.astype(np.float64)


def with_products(
    examined: Examined,
    engine: Engine[Any, Any],
    budget: float = BUDGET,
    own: Collection[str] | None = None,
) -> tuple[AdapterResult, ...]:
    """The adapters of a checkpoint with the effective rank and the norm of each product.

    Of those alone whose first factor is ``own``, where that is given. Raises InputError when a
    file changes while it is read.
    """
    if not examined.adapters:  # lest every run looks for libraries of BLAS
        return ()
    refs = {ref.name: ref for ref in examined.checkpoint.tensors}

    def spectrum(adapter: Adapter | None) -> Values | None:
        if adapter is None or (own is not None and next(iter(adapter.names.values())) not in own):
            return None
        return singular_values(adapter, refs)

    with one_blas_thread():
        spectra = list(engine(spectrum, _within(examined.adapted, refs, budget)))
    return tuple(
        known if sigma is None else _with_spectrum(known, sigma)
        for known, sigma in zip(examined.adapters, spectra, strict=True)
    )


def _with_spectrum(known: AdapterResult, sigma: Values) -> AdapterResult:
    entropy = effective_rank(sigma)
    return known.model_copy(
        update={
            "effective_rank": None if entropy is None else round(entropy, 6),
            "norm": float(np.linalg.norm(sigma)),
        }
    )


def _within(
    found: Sequence[Adapter], refs: Mapping[str, TensorRef], budget: float
) -> Iterator[Adapter | None]:
    """The adapters that can be measured, evenly fewer where all would cost too much."""
    costs = [_cost(adapter, refs) for adapter in found]
    every = max(1, math.ceil(sum(costs) / budget))
    measurable = 0
    for adapter, cost in zip(found, costs, strict=True):
        taken = cost > 0 and measurable % every == 0
        measurable += cost > 0
        yield adapter if taken else None


def _cost(adapter: Adapter, refs: Mapping[str, TensorRef]) -> float:
    """Multiplications of both QR and the r × r decomposition; 0 where there is nothing to do."""
    layout = adapter.layout
    if not _is_plain(adapter, layout, refs) or layout is None:
        return 0
    long = sum(refs[adapter.names[f]].numel for f in ("A", "B"))
    return 2.0 * long * layout.rank + 20.0 * layout.rank**3


def _is_plain(adapter: Adapter, layout: Layout | None, refs: Mapping[str, TensorRef]) -> bool:
    """Whether the adapter is a product of two factors, A and B, which can be seen as matrices."""
    if layout is None or layout.grouped or not layout.rank or set(adapter.names) != {"A", "B"}:
        return False
    both = [refs[adapter.names[factor]] for factor in ("A", "B")]
    return all(
        is_float(ref.dtype) and ref.numel and (ref.strides is None or len(ref.shape) == 2)
        for ref in both
    )


def singular_values(adapter: Adapter, refs: Mapping[str, TensorRef]) -> Values | None:
    """The r singular values of B A in float64, greatest first; None where some are not finite."""
    layout = adapter.layout
    assert layout is not None
    a, b = (_matrix(refs[adapter.names[factor]]) for factor in ("A", "B"))
    if layout.flipped:
        a, b = _transposed(a), _transposed(b)
    with np.errstate(all="ignore"):
        core = _triangle(b) @ _triangle(_transposed(a)).T
    if not np.isfinite(core).all():
        return None
    return np.asarray(np.linalg.svd(core, compute_uv=False))


def _matrix(ref: TensorRef) -> TensorRef:
    """A convolution's factor as a matrix."""
    if len(ref.shape) == 2:
        return ref
    return replace(ref, shape=(ref.shape[0], ref.row_numel))


def _transposed(ref: TensorRef) -> TensorRef:
    rows, columns = ref.shape
    down, right = ref.strides or (columns, 1)
    return replace(ref, shape=(columns, rows), strides=(right, down))


def _triangle(ref: TensorRef) -> Values:
    """R of the QR decomposition of a tall matrix, from pieces of its rows."""
    rows, columns = ref.shape
    step = max(1, PIECE // columns)
    r: Values = np.empty((0, columns))
    for first in range(0, rows, step):
        last = min(first + step, rows)
        piece = values(ref, first * columns, last * columns).reshape(-1, columns)
        if not np.isfinite(piece).all():
            return np.full((columns, columns), np.nan)
        r = np.asarray(np.linalg.qr(np.concatenate([r, piece]), mode="r"))
    return np.concatenate([r, np.zeros((columns - len(r), columns))])


def effective_rank(sigma: Values) -> float | None:
    """exp of the entropy of the singular values' shares (Roy and Vetterli 2007); None of zeros."""
    total = sigma.sum()
    if not total > 0:
        return None
    shares = sigma[sigma > 0] / total
    return float(np.exp(-(shares * np.log(shares)).sum()))
