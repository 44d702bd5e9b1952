"""Gradients that are not finite: which layer turned first, and which inherited it."""

from __future__ import annotations

import numpy as np

from gradscope.flow.graph import Graph
from gradscope.flow.limits import BRIDGE, MIN_TREND
from gradscope.flow.result import NonFinite
from gradscope.flow.series import Series

#: Records that say what was usual before gradients overflowed, and the latest, which do not.
_USUAL = 32
_LATEST = 4


def nonfinite(series: Series, graph: Graph) -> list[NonFinite]:
    """One entry for each stretch of records with non-finite gradients on steps that counted.

    Backpropagation reaches the layers next to the loss first, so of the layers that turn at the
    earliest step the nearest to the loss is the origin; what lies behind it inherits. Steps that
    mixed precision skipped are left out: finding Inf and skipping is how a loss scaler works.
    """
    bad = series.nonfinite & ~series.skipped[:, None]
    loss = series.history.loss
    # A loss of NaN is data where the file has losses; NaN is also "unknown" where it is all NaN.
    lost = ~np.isfinite(loss) if loss is not None and np.isfinite(loss).any() else None
    records = np.flatnonzero(bad.any(axis=1))
    if not len(records):
        return []
    stretches = np.split(records, np.flatnonzero(np.diff(records) > BRIDGE + 1) + 1)
    return [_entry(series, graph, bad, lost, stretch) for stretch in stretches]


def _entry(
    series: Series, graph: Graph, bad: np.ndarray, lost: np.ndarray | None, stretch: np.ndarray
) -> NonFinite:
    first = int(stretch[0])
    turned = [row for row in reversed(graph.order) if bad[first, row]]
    everywhere = [row for row in graph.order if bad[stretch][:, row].any()]
    from_loss = bool(lost is not None and lost[first])
    origin = None if from_loss and len(turned) == len(graph.order) else turned[0]
    finite_before = [t for t in range(first - 1, -1, -1) if not series.skipped[t]]
    return NonFinite(
        step=int(series.steps[first]),
        origin=None if origin is None else series.names[origin],
        inherited_by=tuple(series.names[row] for row in everywhere if row != origin),
        loss_nonfinite=from_loss,
        records=len(stretch),
        last_finite_step=int(series.steps[finite_before[0]]) if finite_before else None,
        growth_before=_growth(series, turned[0], first),
    )


def _growth(series: Series, row: int, first: int) -> float | None:
    """The last norm before a record over the median of those that precede it by a few records."""
    before = series.norm[max(0, first - _USUAL - _LATEST) : first, row]
    before = before[np.isfinite(before) & (before > 0)]
    if len(before) < MIN_TREND:
        return None
    return float(before[-1] / np.median(before[:-_LATEST]))
