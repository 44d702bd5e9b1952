"""Where gradients are dead: zero, or absent though they are required, for five records or more."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from gradscope.flow.graph import Graph
from gradscope.flow.regions import BRIDGE, Run, extent, joined, named, rows_of, runs
from gradscope.flow.result import DeadZone, Recovery
from gradscope.flow.series import Mask, Series
from gradscope.histories.history import Status

SHORTEST_ZONE = 5
#: Share of zero elements above which a gradient counts as dead; embeddings, of which a batch
#: touches few rows, only when they are zero throughout.
ZERO_SHARE = 0.999
#: A run this many times longer than any that ended is of another sort.
_OUTLIVED = 10


def dead(series: Series) -> Mask:
    """Cells without gradient. A parameter that never had one is missing, not dead."""
    zero = series.recorded & (series.norm == 0)
    if series.zero_fraction is not None:
        dense = np.array([layer.kind != "embedding" for layer in series.layers], dtype=bool)
        with np.errstate(invalid="ignore"):
            zero |= series.recorded & (series.zero_fraction >= ZERO_SHARE) & dense
    none = series.status == Status.NONE
    result: Mask = (zero | none) & series.recorded.any(axis=0) & ~series.nonfinite
    return result


def dead_zones(series: Series, graph: Graph) -> list[DeadZone]:
    """Zones over the graph and time, each with what its past says about recovery."""
    flags = dead(series)
    found = runs(flags, shortest=SHORTEST_ZONE, bridge=0)
    parts = joined(found, graph)
    return [
        _zone(series, graph, flags, part, name)
        for name, part in named("dead", parts, series, graph)
    ]


def dead_cells(series: Series) -> Mask:
    """The cells that zones are made of: those of runs that are long enough."""
    out = np.zeros(series.norm.shape, bool)
    for run in runs(dead(series), shortest=SHORTEST_ZONE, bridge=0):
        out[run.first : run.end, run.row] = True
    return out


def _zone(series: Series, graph: Graph, flags: Mask, part: Sequence[Run], name: str) -> DeadZone:
    rows = rows_of(part, graph)
    where = extent(part, series, graph)
    ongoing = any(run.end >= len(series.steps) - BRIDGE for run in part)
    ended = past_runs(flags, rows, part)
    recovery = _recovery(series, flags, part, ended)
    return DeadZone(
        zone_id=name,
        affected_layers=tuple(series.names[row] for row in rows),
        origin=series.names[rows[-1]],
        dead_duration=max(int(series.steps[r.end - 1] - series.steps[r.first]) for r in part),
        recovery_potential=recovery,
        # A bias before a normalisation rightly has a gradient of zero.
        intervention_required=ongoing
        and recovery in ("low", "none")
        and any(series.group(row) != "bias" for row in rows),
        extent=where.model_copy(update={"ongoing": ongoing}),
        past_recoveries=len(ended),
    )


def past_runs(flags: Mask, rows: Sequence[int], part: Sequence[Run]) -> list[int]:
    """Lengths, in records, of earlier dead runs of these layers that ended."""
    begin = {run.row: run.first for run in part}
    inside = runs(flags[:, list(rows)], shortest=1, bridge=0)
    return [r.end - r.first for r in inside if r.end < begin.get(rows[r.row], 0)]


def _recovery(series: Series, flags: Mask, part: Sequence[Run], ended: Sequence[int]) -> Recovery:
    """From the data: what share of past runs that reached this age ended (Kaplan-Meier).

    The current run is censored, so it counts among those at risk and not among those that ended.
    """
    if _hopeless(series, part):
        return "none"
    still = [run for run in part if run.end >= len(flags) - BRIDGE]
    if not still:
        return "high"
    age = max(run.end - run.first for run in still)
    survivors = sum(length >= age for length in ended)
    if len(ended) >= 2 and survivors / (survivors + 1) >= 0.5:
        return "high"
    recovers = bool(ended) and age <= _OUTLIVED * max(ended)
    return "medium" if recovers or _partly_alive(series, still) else "low"


def _partly_alive(series: Series, part: Sequence[Run]) -> bool:
    """Whether some elements still have a gradient."""
    return any(bool(series.norm[r.end - 1, r.row] > 0) for r in part)


def _hopeless(series: Series, part: Sequence[Run]) -> bool:
    """Non-finite before, or every layer of the network dead at the end of the zone."""
    first, end = min(r.first for r in part), max(r.end for r in part)
    rows = {run.row for run in part}
    was_lost = any(series.nonfinite[:first, row].any() for row in rows)
    return was_lost or (len(rows) == len(series.layers) and end >= len(series.steps) - BRIDGE)
