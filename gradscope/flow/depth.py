"""How gradients change with distance from the loss: a whole stack, or one place?"""

from __future__ import annotations

import numpy as np

from gradscope.flow.graph import Graph
from gradscope.flow.levels import DECADE
from gradscope.flow.limits import DEPTH_DECADES, SYSTEMIC_FIT, SYSTEMIC_NATS
from gradscope.flow.records.regions import Depth
from gradscope.flow.robust import Array, nanmedian, r_squared, theil_sen
from gradscope.flow.series import Series

_LEAST_LAYERS = 4
#: Fewer decades from end to end do no harm, however regular.
_LEAST_DECADES = DEPTH_DECADES
#: Pairwise slopes are quadratic in the layers.
_MOST_LAYERS = 1000


def depth_of(series: Series, graph: Graph) -> Depth | None:
    """The depth growth exponent of a network's weights, in nats a layer towards the input.

    Theil-Sen slope of the median over records of ln RMS against the layers' distance from the
    loss (He-initialised nets without skips stay near zero, sigmoid stacks lose about two).
    None when there are fewer than four comparable layers.
    """
    rows = [r for r in graph.order if series.group(r) == "weight" and r in graph.connected]
    level: Array = nanmedian(series.finite_log, axis=0)[rows] if rows else np.empty(0)
    away = np.array([graph.depth[r] for r in rows], dtype=np.float64)
    known = np.flatnonzero(np.isfinite(level))
    if len(known) < _LEAST_LAYERS:
        return None
    known = known[np.linspace(0, len(known) - 1, min(len(known), _MOST_LAYERS)).astype(int)]
    line = theil_sen(away[known], level[known])
    if line is None:
        return None
    fit = r_squared(away[known], level[known], *line)
    lost = -line[0]
    decades = abs(lost) * float(np.ptp(away[known])) / DECADE
    gradual = fit > SYSTEMIC_FIT and decades >= _LEAST_DECADES
    systemic = gradual and abs(lost) > SYSTEMIC_NATS
    return Depth(
        nats_per_layer=lost,
        r_squared=fit,
        layers=len(known),
        systemic=None if not systemic else "vanishing" if lost > 0 else "exploding",
        gradual=gradual,
    )
