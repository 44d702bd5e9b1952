"""The network as a graph, and widest paths over it, against enumeration of every path."""

from __future__ import annotations

import math
from itertools import pairwise

import networkx as nx
import numpy as np
import pytest

from gradscope.flow.graph import LOSS, Graph, graph_of
from gradscope.flow.joining import series
from gradscope.flow.paths import critical_paths, walk, widest
from gradscope.histories.history import History

from .made import made, noise


def history(layers: int, edges: list[tuple[int, int]]) -> History:
    return made(noise(6, layers), edges=np.array(edges).reshape(-1, 2), topology="given")


def graph(layers: int, edges: list[tuple[int, int]]) -> Graph:
    return graph_of(series(history(layers, edges)))


def random_graph(seed: int, layers: int = 7) -> tuple[Graph, nx.DiGraph]:
    """A random DAG, and the same as networkx has it."""
    rng = np.random.default_rng(seed)
    edges = [(u, v) for u in range(layers) for v in range(u + 1, layers) if rng.random() < 0.4]
    edges += [(u, layers) for u in range(layers) if rng.random() < 0.2 or u == layers - 1]
    plain = nx.DiGraph()
    plain.add_nodes_from(range(layers + 1))
    plain.add_edges_from(edges)
    return graph(layers, edges), plain


def test_without_edges_layers_follow_each_other() -> None:
    found = graph_of(series(made(noise(5, 3))))

    assert found.topology == "assumed-chain"
    assert found.edges == [(0, 1), (1, 2)]
    assert found.entries == [0]
    assert found.exits == [2]
    assert found.depth == {0: 2, 1: 1, 2: 0}


def test_neighbours_leave_out_the_input_and_the_loss() -> None:
    found = graph(3, [(-1, 0), (0, 1), (0, 2), (1, 2), (2, 3)])

    assert found.topology == "given"
    assert (found.before(0), found.after(2)) == ([], [])
    assert (found.before(2), found.after(0)) == ([0, 1], [1, 2])


def test_a_layer_apart_from_the_rest_belongs_to_no_path() -> None:
    found = graph(4, [(0, 1), (1, 4), (2, 2)])

    assert found.connected == {0, 1}
    assert found.entries == [0]
    assert sorted(found.order) == [0, 1, 2, 3]


def test_edges_that_go_back_in_time_are_cut_where_a_loop_closes() -> None:
    found = graph(4, [(0, 1), (1, 2), (2, 1), (1, 1), (3, 2), (2, 3), (3, 4)])

    assert found.edges == [(0, 1), (1, 2), (2, 3)]


def test_where_nothing_leads_to_the_loss_the_last_layers_do() -> None:
    found = graph(4, [(0, 1), (0, 2)])

    assert found.exits == [1, 2]
    assert found.connected == {0, 1, 2}


@pytest.mark.parametrize("seed", range(8))
def test_order_depth_and_connection_are_those_of_every_path(seed: int) -> None:
    found, plain = random_graph(seed)
    place = {row: i for i, row in enumerate(found.order)}

    assert all(place[u] < place[v] for u, v in plain.edges if v < 7)
    for row in range(7):
        ways = list(nx.all_simple_paths(plain, row, 7))
        assert (row in found.connected) is bool(ways)
        if ways:
            longest = max(len(way) for way in ways) - 2
            assert found.depth[row] >= longest
            if all(nx.has_path(plain, other, 7) for other in nx.descendants(plain, row)):
                assert found.depth[row] == longest


@pytest.mark.parametrize("seed", range(8))
def test_a_layer_dominates_those_whose_every_path_passes_it(seed: int) -> None:
    found, plain = random_graph(seed)

    for row in found.connected:
        expected = {
            other
            for other in found.connected
            if all(row in way for way in nx.all_simple_paths(plain, other, 7))
        }
        assert found.dominated[row] == expected


def capacities(plain: nx.DiGraph, seed: int) -> dict[tuple[int, int], float]:
    rng = np.random.default_rng(seed + 100)
    return {(u, LOSS if v == 7 else v): float(rng.integers(0, 5)) for u, v in plain.edges}


def width_of(way: list[int], capacity: dict[tuple[int, int], float]) -> float:
    steps = [LOSS if row == 7 else row for row in way]
    return min(capacity[edge] for edge in pairwise(steps))


@pytest.mark.parametrize("seed", range(12))
def test_the_widest_path_is_the_widest_of_all_paths(seed: int) -> None:
    found, plain = random_graph(seed)
    capacity = capacities(plain, seed)

    width, onward = widest(found, capacity)

    for row in range(7):
        ways = list(nx.all_simple_paths(plain, row, 7))
        assert (row in width) is bool(ways)
        if ways:
            assert width[row] == max(width_of(way, capacity) for way in ways)
            way = walk(row, onward)
            assert width_of([*way[::-1], 7], capacity) == width[row]


def test_of_equally_wide_paths_the_shorter_and_then_the_earlier_is_taken() -> None:
    found = graph(4, [(0, 1), (1, 3), (0, 2), (2, 3), (0, 3), (3, 4)])
    even = dict.fromkeys(found.edges, 1.0) | {(3, LOSS): 1.0}

    assert walk(0, widest(found, even)[1]) == [3, 0]
    assert walk(0, widest(found, even, frozenset({(0, 3)}))[1]) == [3, 1, 0]


@pytest.mark.parametrize("seed", range(12))
def test_a_critical_path_and_its_alternative_are_those_of_enumeration(seed: int) -> None:
    found, plain = random_graph(seed)
    capacity = capacities(plain, seed)
    names = [str(row) for row in range(7)]

    for path in critical_paths(names, found, capacity, np.arange(1.0, 8.0), frozenset({4})):
        entry = int(path.layers[-1])
        ways = list(nx.all_simple_paths(plain, entry, 7))
        best = max(width_of(way, capacity) for way in ways)
        assert path.path_length == len(path.layers)
        assert path.total_flow_strength == pytest.approx(
            math.log((entry + 1) / (int(path.layers[0]) + 1))
        )
        if path.weakest_link is None:
            assert path.path_length == 1
            assert path.criticality_score is None
            continue
        weak = (int(path.weakest_link[0]), int(path.weakest_link[1]))
        links = [(int(u), int(v)) for v, u in pairwise(path.layers)]
        assert capacity[weak] == min(capacity[link] for link in links)
        assert set(path.bottleneck_layers) == {
            str(row) for row in map(int, path.layers) if row in (*weak, 4)
        }
        others = [way for way in ways if weak not in list(pairwise(way))]
        if not others:
            assert path.criticality_score == 1.0
            assert path.alternatives == ()
        else:
            around = max(width_of(way, capacity) for way in others)
            expected = 1 - around / best if best > 0 else float(around <= 0)
            assert path.criticality_score == pytest.approx(expected)
            assert path.alternatives[0][1] == pytest.approx(around / best if best > 0 else 1.0)
        if capacity[weak] > 0:
            median = np.median([capacity[link] for link in links])
            assert path.optimization_potential == pytest.approx(math.log10(median / capacity[weak]))
        else:
            assert path.optimization_potential is None


def test_up_to_three_ways_around_are_told_each_without_the_weak_links_before() -> None:
    middle = range(1, 6)
    found = graph(7, [*((0, m) for m in middle), *((m, 6) for m in middle), (6, 7)])
    capacity = (
        {(m, 6): 10.0 for m in middle} | {(0, m): float(m) for m in middle} | {(6, LOSS): 9.0}
    )

    (path,) = critical_paths(list("abcdefg"), found, capacity, np.ones(7), frozenset())

    assert path.layers == ("g", "f", "a")
    assert path.criticality_score == pytest.approx(1 - 4 / 5)
    assert path.alternatives == (
        (("g", "e", "a"), 0.8),
        (("g", "d", "a"), 0.6),
        (("g", "c", "a"), 0.4),
    )


def test_a_chain_that_was_assumed_claims_nothing_about_ways_around() -> None:
    found = graph_of(series(made(noise(5, 3))))
    capacity = {(0, 1): 1.0, (1, 2): 0.01, (2, LOSS): 1.0}

    (path,) = critical_paths("abc", found, capacity, np.array([1.0, 0.0, 2.0]), frozenset())

    assert path.criticality_score is None
    assert path.alternatives == ()
    assert path.weakest_link == ("b", "c")
    assert path.total_flow_strength == pytest.approx(-math.log(2))


def test_of_many_entries_the_weakest_are_walked_to() -> None:
    layers = 70
    found = graph(layers, [*((row, layers - 1) for row in range(layers - 1)), (layers - 1, layers)])
    capacity = {(row, layers - 1): float(layers - row) for row in range(layers - 1)}
    capacity[layers - 1, LOSS] = 1000.0

    paths = critical_paths(
        [str(i) for i in range(layers)], found, capacity, np.ones(layers), frozenset()
    )

    assert len(paths) == 64
    assert [path.layers[-1] for path in paths] == [str(row) for row in range(68, 4, -1)]
    assert [path.path_id for path in paths[:2]] == ["path-1", "path-2"]
