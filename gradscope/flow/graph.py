"""The network as a directed acyclic graph of layers, from the input to the loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import networkx as nx

from gradscope.flow.series import Series
from gradscope.histories.history import Topology

#: Virtual nodes beside the layers' rows.
INPUT, LOSS = -1, -2


@dataclass(frozen=True, eq=False)
class Graph:
    """Layers by row, in an order in which every edge goes forward.

    ``topology`` is ``assumed-chain`` when the history has no edges: the layers then follow each
    other in their order. Layers without an edge belong to no path.
    """

    graph: nx.DiGraph
    rows: tuple[int, ...]
    topology: Topology

    @cached_property
    def order(self) -> tuple[int, ...]:
        """The rows, each after all that feed it; ties as recorded."""
        return tuple(
            row for row in nx.lexicographical_topological_sort(self.graph) if row in self._known
        )

    @cached_property
    def _known(self) -> frozenset[int]:
        return frozenset(self.rows)

    @cached_property
    def depth(self) -> dict[int, int]:
        """Layers on the longest way from a layer to the loss, 0 for the last one."""
        depth: dict[int, int] = {}
        for row in reversed(self.order):
            following = [depth[v] for v in self.graph.successors(row) if v in depth]
            depth[row] = 1 + max(following) if following else 0
        return depth

    def before(self, row: int) -> list[int]:
        """The layers that feed a layer."""
        return [u for u in self.graph.predecessors(row) if u in self._known]

    def after(self, row: int) -> list[int]:
        """The layers that a layer feeds."""
        return [v for v in self.graph.successors(row) if v in self._known]

    @cached_property
    def edges(self) -> list[tuple[int, int]]:
        """Pairs of layers, in the order of the layers."""
        place = {row: i for i, row in enumerate(self.order)}
        pairs = [(u, v) for u, v in self.graph.edges if u in place and v in place]
        return sorted(pairs, key=lambda e: (place[e[0]], place[e[1]]))

    @cached_property
    def entries(self) -> list[int]:
        """The layers that no other layer feeds, in order: where gradients end."""
        return [row for row in self.order if row in self.connected and not self.before(row)]

    @cached_property
    def exits(self) -> list[int]:
        """The layers next to the loss."""
        return [row for row in self.order if self.graph.has_edge(row, LOSS)]

    @cached_property
    def connected(self) -> frozenset[int]:
        """Layers from which the loss can be reached."""
        return frozenset(nx.ancestors(self.graph, LOSS)) & self._known

    @cached_property
    def dominated(self) -> dict[int, set[int]]:
        """The layers whose gradient must all pass a layer, itself included.

        By immediate dominators of the reversed graph (Cooper, Harvey & Kennedy 2001).
        """
        above = nx.immediate_dominators(self.graph.reverse(copy=False), LOSS)
        found: dict[int, set[int]] = {row: {row} for row in self.connected}
        for row in self.connected:
            walker = above.get(row)
            while walker is not None and walker != LOSS and row != walker:
                found[walker].add(row)
                following = above.get(walker)
                walker = None if following == walker else following
        return found


def graph_of(series: Series) -> Graph:
    """The graph of a history's layers; cycles are cut where they close against the order."""
    rows = tuple(range(len(series.layers)))
    if series.edges is None or not len(series.edges):
        return Graph(_chain(rows), rows, "assumed-chain")
    made = nx.DiGraph()
    made.add_nodes_from([*rows, LOSS])
    for u, v in series.edges.tolist():
        made.add_edge(u, LOSS if v == len(rows) else v)
    _cut_cycles(made)
    _end_at_the_loss(made, rows)
    topology = series.history.topology
    return Graph(made, rows, "given" if topology == "assumed-chain" else topology)


def _chain(rows: Sequence[int]) -> nx.DiGraph:
    made = nx.DiGraph()
    made.add_nodes_from([*rows, LOSS])
    nx.add_path(made, [INPUT, *rows, LOSS])
    return made


def _cut_cycles(graph: nx.DiGraph) -> None:
    """A recurrent or shared module closes a loop: drop its edges that go back in time."""
    for component in list(nx.strongly_connected_components(graph)):
        if len(component) > 1:
            back = [(u, v) for u, v in graph.subgraph(component).edges if u >= v]
            graph.remove_edges_from(back)


def _end_at_the_loss(graph: nx.DiGraph, rows: Sequence[int]) -> None:
    if not graph.in_degree(LOSS):
        ends = [
            r for r in rows if graph.in_degree(r) + graph.out_degree(r) and not graph.out_degree(r)
        ]
        graph.add_edges_from((row, LOSS) for row in ends)
