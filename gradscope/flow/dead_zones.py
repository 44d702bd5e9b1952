"""Where gradients are dead: zero, or absent though they are required, for five records or more."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from gradscope.flow.facts import Candidate, DeadFacts
from gradscope.flow.graph import Graph
from gradscope.flow.limits import BRIDGE, SHORTEST_ZONE, ZERO_SHARE
from gradscope.flow.loss import learnt
from gradscope.flow.regions import Stretch, extent, joined, named, rows_of, stretches
from gradscope.flow.series import Mask, Series
from gradscope.flow.underflow import underflow
from gradscope.flow.weights import weights_of
from gradscope.histories.history import Status


def dead(series: Series) -> Mask:
    """Cells without gradient. A parameter that never had one is missing, not dead.

    A batch touches few rows of an embedding, which is dead only when it is zero throughout.
    """
    zero = series.recorded & (series.norm == 0)
    if series.zero_fraction is not None:
        dense = np.array([layer.kind != "embedding" for layer in series.layers], dtype=bool)
        zero |= series.recorded & (series.zero_fraction >= ZERO_SHARE) & dense
    none = series.status == Status.NONE
    result: Mask = (zero | none) & series.recorded.any(axis=0) & ~series.nonfinite
    return result


def dead_stretches(flags: Mask) -> list[Stretch]:
    """The stretches that are long enough; a single record with a gradient ends one."""
    return stretches(flags, shortest=SHORTEST_ZONE, bridge=0)


def covered(found: Sequence[Stretch], shape: tuple[int, ...]) -> Mask:
    """The cells of some stretches."""
    out = np.zeros(shape, bool)
    for run in found:
        out[run.first : run.end, run.row] = True
    return out


def dead_candidates(
    series: Series, graph: Graph, flags: Mask, found: Sequence[Stretch]
) -> list[Candidate[DeadFacts]]:
    """Zones over the graph and time, each with what its past says about recovery."""
    return [
        Candidate(
            region_id=name,
            affected_layers=tuple(series.names[row] for row in rows_of(part, graph)),
            extent=extent(part, series, graph),
            peak=None,
            update_ratio=None,
            facts=(_facts(series, flags, part, rows_of(part, graph)),),
        )
        for name, part in named("dead", joined(found, graph), series, graph)
    ]


def _facts(series: Series, flags: Mask, part: Sequence[Stretch], rows: Sequence[int]) -> DeadFacts:
    still = [run for run in part if run.end >= len(series.steps) - BRIDGE]
    first = min(run.first for run in part)
    return DeadFacts(
        duration=max(int(series.steps[r.end - 1] - series.steps[r.first]) for r in part),
        age=max((run.end - run.first for run in still), default=None),
        ended=tuple(past_stretches(flags, rows, part)),
        # A layer without a unit that lives is not revived by those that live in another.
        partly_alive=bool(still) and all(series.norm[run.end - 1, run.row] > 0 for run in still),
        was_nonfinite=bool(series.nonfinite[:first, list(rows)].any()),
        everything=bool(still) and len(rows) == len(series.layers),
        underflowed=_underflowed(series, first, rows),
        only_biases=all(series.group(row) == "bias" for row in rows),
        weights=weights_of(series, part),
        learnt=bool(still) and len(rows) == len(series.layers) and learnt(series),
    )


def _underflowed(series: Series, first: int, rows: Sequence[int]) -> bool:
    """Whether float16 gradients had come near its smallest numbers before they were zero.

    Zero from the first record on tells nothing by itself: then a neighbour has to underflow.
    """
    if not series.half_gradients:
        return False
    low = underflow(series)
    return bool(low[:first, list(rows)].any()) if first else bool(low.any())


def past_stretches(flags: Mask, rows: Sequence[int], part: Sequence[Stretch]) -> list[int]:
    """Lengths, in records, of earlier dead stretches of these layers that ended."""
    begin = {run.row: run.first for run in part}
    inside = stretches(flags[:, list(rows)], shortest=1, bridge=0)
    return [r.end - r.first for r in inside if r.end < begin[rows[r.row]]]
