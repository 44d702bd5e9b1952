"""What all singular values of one matrix say."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gradscope.spectra.algebra import Algebra
from gradscope.spectra.marchenko import Bulk, bulk
from gradscope.spectra.matrices import Matrix
from gradscope.spectra.powerlaw import PowerLaw, fit, p_value

Values = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Spectrum:
    """Of one matrix. Ranks are None of zeros, the bulk where most singular values are zero."""

    norm: float
    stable_rank: float | None
    effective_rank: float | None
    bulk: Bulk | None


def spectrum(values: Values, rows: int, columns: int) -> Spectrum:
    """What all squared singular values of a matrix say, ascending."""
    return Spectrum(
        float(np.sqrt(values[-1])),
        float(values.sum() / values[-1]) if values[-1] > 0 else None,
        effective_rank(np.sqrt(values)),
        bulk(values, rows, columns),
    )


#: Columns up to which all eigenvalues cost less than the steps towards the greatest.
_NARROW = 192


def greatest(matrix: Matrix, algebra: Algebra) -> tuple[float, float]:
    """The greatest singular value, to a relative 1e-4, and the sum of the squares of all."""
    if matrix.columns <= _NARROW:
        values = algebra.eigenvalues(matrix.chunks, matrix.columns)
        return float(np.sqrt(values[-1])), float(values.sum())
    squares = sum(float(np.square(chunk, dtype=np.float64).sum()) for chunk in matrix.chunks())
    return algebra.norm(matrix.chunks, matrix.columns), squares


@dataclass(frozen=True, slots=True)
class Tail:
    """The fitted tail of some eigenvalues, and the p-value of the fit where it was tested."""

    law: PowerLaw
    p_value: float | None = None


def tail(values: Values, repeats: int = 0) -> Tail | None:
    """The tail of eigenvalues, tested by so many drawn sets if any; None where the fit fails."""
    law = fit(values)
    if law is None:
        return None
    return Tail(law, p_value(values, law, repeats) if repeats else None)


def effective_rank(sigma: Values) -> float | None:
    """exp of the entropy of the singular values' shares (Roy and Vetterli 2007); None of zeros."""
    total = sigma.sum()
    if not total > 0:
        return None
    shares = sigma[sigma > 0] / total
    return float(np.exp(-(shares * np.log(shares)).sum()))
