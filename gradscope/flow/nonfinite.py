"""Gradients that are not finite: which layer turned first, and which inherited it."""

from __future__ import annotations

import numpy as np

from gradscope.flow.graph import Graph
from gradscope.flow.levels import own_records
from gradscope.flow.limits import BRIDGE, GROWTH_FACTOR, MIN_TREND, SHORTEST
from gradscope.flow.records.events import NonFinite
from gradscope.flow.robust import nanmedian
from gradscope.flow.series import Series


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
    climb = _climb(series, first)
    return NonFinite(
        step=int(series.steps[first]),
        origin=None if origin is None else series.names[origin],
        inherited_by=tuple(series.names[row] for row in everywhere if row != origin),
        loss_nonfinite=from_loss,
        records=len(stretch),
        last_finite_step=int(series.steps[finite_before[0]]) if finite_before else None,
        growth_before=None if climb is None else climb[0],
        growing_since=None if climb is None else climb[1],
    )


def _climb(series: Series, first: int) -> tuple[float, tuple[int, int]] | None:
    """How far the total norm had left its level before a record, and between which steps it did.

    None where it had not grown fourfold, or too little came before.
    """
    before = series.norm[:first]
    known = np.isfinite(before).any(axis=1) & ~series.skipped[:first]
    total = np.where(known, np.sqrt(np.nansum(before**2, axis=1)), np.nan)
    usual = total[own_records(series)]
    if np.isfinite(usual).sum() < SHORTEST:
        usual = total[: max(first // 2, SHORTEST)]
    finite = np.flatnonzero(np.isfinite(total) & (total > 0))
    level = float(nanmedian(usual))
    if len(finite) < MIN_TREND or not level > 0 or total[finite[-1]] <= GROWTH_FACTOR * level:
        return None
    inside = finite[total[finite] <= GROWTH_FACTOR * level]
    at = int(inside[-1]) if len(inside) else 0
    after = int(finite[np.searchsorted(finite, at, side="right")])
    return float(total[finite[-1]] / level), (int(series.steps[at]), int(series.steps[after]))
