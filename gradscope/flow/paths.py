"""Paths of the gradient from the loss to the layers where it ends: the widest, and around it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from gradscope.flow.graph import LOSS, Graph
from gradscope.flow.records.network import CriticalPath
from gradscope.flow.robust import Array

Edge = tuple[int, int]
#: More entries than this are not walked to one by one.
MOST_PATHS = 64
_ALTERNATIVES = 3


def widest(
    graph: Graph, capacity: Mapping[Edge, float], without: frozenset[Edge] = frozenset()
) -> tuple[dict[int, float], dict[int, int]]:
    """Greatest bottleneck capacity from the loss to every layer, and the next layer on that path.

    Dynamic programming in reverse topological order; of equally wide paths the one with fewer
    layers, then that over the earlier layer. Layers that cannot be reached are absent.
    """
    width: dict[int, float] = {LOSS: math.inf}
    hops: dict[int, int] = {LOSS: 0}
    onward: dict[int, int] = {}
    for row in reversed(graph.order):
        best: tuple[float, int, int] | None = None
        for v in graph.graph.successors(row):
            if v not in width or (row, v) in without:
                continue
            candidate = (min(width[v], capacity.get((row, v), 0.0)), -hops[v], -v)
            best = candidate if best is None or candidate > best else best
        if best is not None:
            width[row], hops[row], onward[row] = best[0], 1 - best[1], -best[2]
    return width, onward


def walk(entry: int, onward: Mapping[int, int]) -> list[int]:
    """The layers from the loss to an entry."""
    way = [entry]
    while onward[way[-1]] != LOSS:
        way.append(onward[way[-1]])
    return way[::-1]


def critical_paths(
    names: Sequence[str],
    graph: Graph,
    capacity: Mapping[Edge, float],
    level: Array,
    flagged: frozenset[int],
) -> list[CriticalPath]:
    """The widest path to each entry, the entries with the weakest first when there are many."""
    width, onward = widest(graph, capacity)
    entries = [row for row in graph.entries if row in onward]
    if len(entries) > MOST_PATHS:
        entries = sorted(entries, key=lambda row: width[row])[:MOST_PATHS]
    network = _Described(names, graph, capacity, level, flagged)
    return [network.path(i, walk(row, onward), width[row]) for i, row in enumerate(entries)]


@dataclass(frozen=True, eq=False)
class _Described:
    """A network as its paths are described: what edges carry, how layers do, which are flagged."""

    names: Sequence[str]
    graph: Graph
    capacity: Mapping[Edge, float]
    level: Array
    flagged: frozenset[int]

    def path(self, number: int, way: list[int], width: float) -> CriticalPath:
        links = [(u, v) for v, u in pairwise(way)]
        weakest = min(links, key=lambda e: self.capacity[e], default=None)
        ends = set(weakest or ())
        chain = self.graph.topology == "assumed-chain"
        others = [] if chain or weakest is None else list(self._others(way[-1], weakest))
        with np.errstate(divide="ignore", invalid="ignore"):
            gain = float(np.log(self.level[way[-1]]) - np.log(self.level[way[0]]))
        return CriticalPath(
            path_id=f"path-{number + 1}",
            layers=tuple(self.names[row] for row in way),
            path_length=len(way),
            total_flow_strength=None if math.isnan(gain) else gain,
            bottleneck_layers=tuple(self.names[r] for r in way if r in ends or r in self.flagged),
            weakest_link=None
            if weakest is None
            else (self.names[weakest[0]], self.names[weakest[1]]),
            criticality_score=None if chain or weakest is None else _criticality(width, others),
            optimization_potential=self._potential(links, weakest),
            alternatives=tuple(
                (tuple(self.names[row] for row in other), _ratio(wide, width))
                for other, wide in others
            ),
        )

    def _others(self, entry: int, weakest: Edge) -> Iterator[tuple[list[int], float]]:
        """Up to three paths around: without the weakest link, then without the next one's."""
        without = frozenset({weakest})
        for _ in range(_ALTERNATIVES):
            width, onward = widest(self.graph, self.capacity, without)
            if entry not in onward:
                return
            way = walk(entry, onward)
            yield way, width[entry]
            links = [(u, v) for v, u in pairwise(way)]
            if not links:
                return
            without |= {min(links, key=lambda e: self.capacity[e])}

    def _potential(self, links: Sequence[Edge], weakest: Edge | None) -> float | None:
        """Decades between the median link and the weakest; None where that carries nothing."""
        if weakest is None or self.capacity[weakest] <= 0:
            return None
        median = float(np.median([self.capacity[e] for e in links]))
        return math.log10(median / self.capacity[weakest])


def _ratio(wide: float, width: float) -> float:
    return 1.0 if width <= 0 else wide / width


def _criticality(width: float, others: Sequence[tuple[list[int], float]]) -> float:
    """1 - width of the best other way / width: 1 where nothing else leads there."""
    if not others:
        return 1.0
    best = others[0][1]
    return (0.0 if best > 0 else 1.0) if width <= 0 else 1 - best / width
