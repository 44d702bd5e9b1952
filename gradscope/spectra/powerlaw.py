"""The exponent of a spectrum's tail: maximum likelihood, its beginning where the fit is closest.

weightwatcher's procedure (0.7.7; Clauset, Shalizi and Newman 2009): every value but the last may
begin the tail; alpha is the maximum-likelihood exponent above it; taken is the one whose
Kolmogorov-Smirnov distance is least. Only few distances are computed in full: the distance at some
probes bounds it from below, and no candidate whose bound is above the best can be best.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Values = npt.NDArray[np.float64]

#: Eigenvalues up to this are dropped, whatever the scale of the matrix (weightwatcher's).
LEAST = 1e-5
#: Of fewer values weightwatcher corrects the bias, and wants eight in the tail.
SMALL = 20
_SMALL_TAIL = 8
_PROBES = 64
#: What rounding may take from a bound.
_SLACK = 1e-12


@dataclass(frozen=True, slots=True)
class PowerLaw:
    """A fitted tail: density x^-alpha from ``xmin`` on, ``distance`` the KS statistic."""

    alpha: float
    xmin: float
    distance: float
    #: How many values are in the tail.
    tail: int


def fit(eigenvalues: Values, least: float = LEAST) -> PowerLaw | None:
    """The tail of some eigenvalues (squared singular values); None where there is no fit."""
    data = np.sort(eigenvalues[eigenvalues > least])
    if len(data) < 2:
        return None
    log = np.log(data)
    alphas = _alphas(log)
    candidates = np.flatnonzero((alphas > 1) & np.isfinite(alphas))
    if not len(candidates):
        return None
    best, distance = _closest(data, log, alphas, candidates)
    tail = int(np.count_nonzero(data >= data[best]))
    return PowerLaw(float(alphas[best]), float(data[best]), distance, tail)


def _alphas(log: Values) -> Values:
    """The exponent of each beginning but the last; NaN of tails that are too short."""
    n = np.arange(len(log), 0, -1, dtype=np.float64)
    sums = np.cumsum(log[::-1])[::-1] - n * log
    with np.errstate(divide="ignore", invalid="ignore"):
        if len(log) >= SMALL:
            return np.asarray(1 + n / sums)[:-1]
        corrected = 1 + (n - 1) / sums
    return np.asarray(np.where((n >= _SMALL_TAIL) & (sums > 1e-12), corrected, np.nan))[:-1]


def _closest(
    data: Values, log: Values, alphas: Values, candidates: npt.NDArray[Any]
) -> tuple[int, float]:
    """The beginning with the least distance, the first of equal ones, and that distance."""
    bounds = _bounds(log, alphas, candidates) - _SLACK
    best, least = -1, np.inf
    for place in np.argsort(bounds, kind="stable"):
        if bounds[place] > least:
            break
        i = int(candidates[place])
        distance = _distance(data, alphas[i], i)
        if distance < least or (distance == least and i < best):
            best, least = i, distance
    return best, float(least)


def _bounds(log: Values, alphas: Values, candidates: npt.NDArray[Any]) -> Values:
    """The distance of each candidate at some of the values of its tail."""
    n = (len(log) - candidates)[:, None]
    ranks = (n * np.arange(_PROBES)) // _PROBES
    beyond = log[candidates[:, None] + ranks] - log[candidates][:, None]
    fitted = -np.expm1((1 - alphas[candidates])[:, None] * beyond)
    return np.asarray(np.abs(fitted - ranks / n).max(axis=1))


def _distance(data: Values, alpha: float, first: int) -> float:
    tail = data[first:]
    n = len(tail)
    return float(np.abs(1 - (tail / tail[0]) ** (1 - alpha) - np.arange(n) / n).max())


def p_value(eigenvalues: Values, found: PowerLaw, repeats: int, seed: int = 0) -> float:
    """How often what is drawn from the fit is farther from its own fit than the data are.

    Clauset, Shalizi and Newman 2009, section 4.1: each set has as many values, above xmin from
    the power law, below it from the data; below 0.1 the power law is ruled out.
    """
    data = eigenvalues[eigenvalues > LEAST]
    below = data[data < found.xmin]
    rng = np.random.default_rng(seed)
    farther = 0
    for _ in range(repeats):
        tail = int(rng.binomial(len(data), found.tail / len(data)))
        drawn = found.xmin * (1 - rng.random(tail)) ** (-1 / (found.alpha - 1))
        rest = rng.choice(below, len(data) - tail) if len(below) else np.empty(0)
        again = fit(np.concatenate([rest, drawn]))
        farther += again is not None and again.distance >= found.distance
    return farther / repeats
