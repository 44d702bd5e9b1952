"""What became of the weights of layers that get no gradient: they may be the reason."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from gradscope.flow.facts import Weights
from gradscope.flow.regions import Stretch
from gradscope.flow.series import GROUPS, Series

#: Share of its norm at the first records that a matrix which shrank has left.
_LEFT = 1e-3
_SEVERITY: Sequence[Weights] = ("kept", "shrunk", "zero")


def weights_of(series: Series, part: Sequence[Stretch]) -> Weights:
    """The worst of what became of the weight matrices of some layers, by the end of a stretch.

    Zero where they are so from the first record on. Gains and biases may be small, or zero.
    """
    norms = series.history.param_l2
    if norms is None or not series.parts:
        return "kept"
    layers = series.history.layers
    found = (
        _matrix(np.asarray(norms[: run.end, row], dtype=np.float64))
        for run in part
        for row in series.parts[run.row]
        if GROUPS[layers[row].kind] == "weight"
    )
    return max(found, key=_SEVERITY.index, default="kept")


def _matrix(norms: np.ndarray) -> Weights:
    known = norms[np.isfinite(norms)]
    if not len(known):
        return "kept"
    if not known.any():
        return "zero"
    return "shrunk" if known[-1] < _LEFT * known[0] else "kept"
