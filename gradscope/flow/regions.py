"""From flags over records and layers to regions: stretches in time, joined over the graph."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256

import numpy as np
from numpy.typing import NDArray

from gradscope.compiled import kernel
from gradscope.flow.graph import Graph
from gradscope.flow.limits import BRIDGE, SHORTEST
from gradscope.flow.records.regions import Extent
from gradscope.flow.robust import Array
from gradscope.flow.series import Mask, Series

Rows = NDArray[np.intp]


@dataclass(frozen=True, slots=True)
class Stretch:
    """One layer over the records ``first`` to ``end`` (not included)."""

    row: int
    first: int
    end: int


def hysteresis(enter: Mask, stay: Mask) -> Mask:
    """Cells of ``stay`` whose unbroken stretch in time has a cell of ``enter``."""
    out = np.zeros(enter.shape, np.bool_)
    rows = np.flatnonzero(enter.any(axis=0))
    _held_on(np.ascontiguousarray(enter), np.ascontiguousarray(stay), rows, out)
    return out


@kernel(alone=True)
def _held_on(enter: Mask, stay: Mask, rows: Rows, out: Mask) -> None:
    """Layer by layer: forwards from each entry as long as it stays, then backwards."""
    for row in rows:
        on = False
        for t in range(len(enter)):
            on = enter[t, row] or (on and stay[t, row])
            out[t, row] = on
        for t in range(len(enter) - 1, -1, -1):
            on = out[t, row] or (on and stay[t, row])
            out[t, row] = on


def carried(flags: Mask, known: Mask) -> Mask:
    """Flags with those of cells that are not known taken from the last known one before."""
    rows = np.flatnonzero(flags.any(axis=0))
    out = np.zeros(flags.shape, np.bool_)
    _carried(np.ascontiguousarray(flags), np.ascontiguousarray(known), rows, out)
    return out


@kernel(alone=True)
def _carried(flags: Mask, known: Mask, rows: Rows, out: Mask) -> None:
    for row in rows:
        on = False
        for t in range(len(flags)):
            if known[t, row]:
                on = flags[t, row]
            out[t, row] = on


def stretches(flags: Mask, shortest: int = SHORTEST, bridge: int = BRIDGE) -> list[Stretch]:
    """The stretches of each layer, gaps of up to ``bridge`` records closed, short ones dropped."""
    joined: list[Stretch] = []
    for run in _unbroken(flags):
        if joined and joined[-1].row == run.row and run.first - joined[-1].end <= bridge:
            joined[-1] = Stretch(run.row, joined[-1].first, run.end)
        else:
            joined.append(run)
    return [run for run in joined if run.end - run.first >= shortest]


def _unbroken(flags: Mask) -> Iterator[Stretch]:
    """Unbroken stretches by layer, then time."""
    for row in np.flatnonzero(flags.any(axis=0)).tolist():
        change = np.diff(flags[:, row].astype(np.int8), prepend=0, append=0)
        ends = np.flatnonzero(change == -1).tolist()
        for first, end in zip(np.flatnonzero(change == 1).tolist(), ends, strict=True):
            yield Stretch(row, first, end)


def joined(found: Sequence[Stretch], graph: Graph) -> list[list[Stretch]]:
    """Connected components of stretches: same time, layers adjacent or with one layer between."""
    by_row: dict[int, list[int]] = defaultdict(list)
    for i, run in enumerate(found):
        by_row[run.row].append(i)
    parent = list(range(len(found)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    for row, here in by_row.items():
        for other in _near(graph, row):
            for a, b in _overlaps(found, here, by_row.get(other, [])):
                parent[max(root(a), root(b))] = min(root(a), root(b))
    parts: dict[int, list[Stretch]] = defaultdict(list)
    for i, run in enumerate(found):
        parts[root(i)].append(run)
    return sorted(parts.values(), key=lambda part: min((r.first, r.row) for r in part))


def _near(graph: Graph, row: int) -> set[int]:
    after = graph.after(row)
    return {far for near in after for far in (near, *graph.after(near))}


def _overlaps(
    found: Sequence[Stretch], a: Sequence[int], b: Sequence[int]
) -> Iterator[tuple[int, int]]:
    """Pairs of stretches of two layers that share or touch in time; both are in order."""
    i = j = 0
    while i < len(a) and j < len(b):
        left, right = found[a[i]], found[b[j]]
        if left.first <= right.end and right.first <= left.end:
            yield a[i], b[j]
        if left.end <= right.end:
            i += 1
        else:
            j += 1


def rows_of(part: Sequence[Stretch], graph: Graph) -> list[int]:
    """The layers of a region from the input to the loss."""
    inside = {run.row for run in part}
    return [row for row in graph.order if row in inside]


def named(
    kind: str, parts: Sequence[Sequence[Stretch]], series: Series, graph: Graph
) -> Iterator[tuple[str, Sequence[Stretch]]]:
    """Each region with an identity that survives another run: kind, ends, which of several."""
    seen: dict[tuple[str, str], int] = defaultdict(int)
    for part in parts:
        rows = rows_of(part, graph)
        ends = (series.names[rows[0]], series.names[rows[-1]])
        seen[ends] += 1
        key = "\0".join((kind, *ends, str(seen[ends])))
        yield f"{kind}-{sha256(key.encode(errors='surrogatepass')).hexdigest()[:8]}", part


def fired(tests: Mapping[str, Mask], part: Sequence[Stretch]) -> tuple[str, ...]:
    """The tests that any cell of a region passed."""
    return tuple(
        name
        for name, flags in tests.items()
        if any(bool(flags[run.first : run.end, run.row].any()) for run in part)
    )


def median_update(series: Series, part: Sequence[Stretch]) -> float | None:
    """Median update ratio over a region; None when it was not recorded."""
    if series.update_ratio is None:
        return None
    inside = np.concatenate([series.update_ratio[run.first : run.end, run.row] for run in part])
    inside = inside[np.isfinite(inside)]
    return float(np.median(inside)) if len(inside) else None


def extent(part: Sequence[Stretch], series: Series, graph: Graph) -> Extent:
    """Where and when a region is, in the history's own steps."""
    rows = rows_of(part, graph)
    first, end = min(run.first for run in part), max(run.end for run in part)
    steps = series.steps
    return Extent(
        start_layer=series.names[rows[0]],
        end_layer=series.names[rows[-1]],
        layer_count=len(rows),
        affected_parameters=series.numel(rows),
        duration_steps=int(steps[end - 1] - steps[first]),
        records=end - first,
        onset=onset(series, first),
        end=int(steps[end - 1]),
        ongoing=end >= len(steps) - BRIDGE,
    )


def onset(series: Series, record: int) -> tuple[int | None, int]:
    """Between which two steps something began that is first seen at a record."""
    before = int(series.steps[record - 1]) if record else None
    return before, int(series.steps[record])


def held(
    values: Array | Mask, part: Sequence[Stretch], where: Sequence[Mask] | None = None
) -> float:
    """The greatest value that one layer of a region reaches at ``SHORTEST`` records or more.

    At all of them when the stretch is shorter; minus infinity where values are not known, and
    where none of the masks ``where`` is set.
    """
    greatest = -math.inf
    for run in part:
        cells = slice(run.first, run.end), run.row
        inside = values[cells].astype(np.float64)
        inside[np.isnan(inside)] = -np.inf
        if where is not None:
            inside[~np.logical_or.reduce([mask[cells] for mask in where])] = -np.inf
        ordered = np.sort(inside)
        greatest = max(greatest, float(ordered[-min(SHORTEST, len(ordered))]))
    return greatest


def held_tests(tests: Mapping[str, Mask], part: Sequence[Stretch]) -> tuple[str, ...]:
    """The tests that one layer of a region passes for as long."""
    return tuple(name for name, flags in tests.items() if held(flags, part) == 1)
