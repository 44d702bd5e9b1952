"""From flags to regions, against loops over cells."""

from __future__ import annotations

import math

import numpy as np
import pytest

from gradscope.flow.graph import graph_of
from gradscope.flow.joining import series
from gradscope.flow.regions import (
    Stretch,
    extent,
    fired,
    held,
    held_tests,
    hysteresis,
    joined,
    median_update,
    named,
    onset,
    rows_of,
    stretches,
)

from .made import made, noise


def flags(*columns: str) -> np.ndarray:
    """One string a layer, ``#`` where a flag is set."""
    return np.array([[cell == "#" for cell in column] for column in columns]).T


def chain(layers: int, records: int = 20):
    s = series(made(noise(records, layers), steps=np.arange(records) * 10))
    return s, graph_of(s)


def test_a_stretch_is_kept_whole_when_any_of_it_enters() -> None:
    enter = flags("..#.......", ".........#", "..........")
    stay = flags(".###..###.", "..........", "####......")

    found = hysteresis(enter, stay)

    assert (found == flags(".###......", ".........#", "..........")).all()


@pytest.mark.parametrize(
    ("column", "found"),
    [
        ("###.......", [(0, 3)]),
        ("##........", []),
        ("##..##....", [(0, 6)]),
        ("##...##...", []),
        ("###...###.", [(0, 3), (6, 9)]),
        ("#..#......", [(0, 4)]),
        (".......###", [(7, 10)]),
    ],
)
def test_gaps_of_two_are_bridged_and_what_is_shorter_than_three_is_dropped(
    column: str, found: list[tuple[int, int]]
) -> None:
    assert [(s.first, s.end) for s in stretches(flags(column))] == found


def test_gaps_are_not_bridged_from_one_layer_to_the_next() -> None:
    assert stretches(flags(".......###", "###.......")) == [Stretch(0, 7, 10), Stretch(1, 0, 3)]


def test_stretches_without_bridges_are_the_runs_of_a_loop() -> None:
    grid = np.random.default_rng(0).random((50, 4)) < 0.6
    expected = []
    for row in range(4):
        first = None
        for t in range(51):
            on = t < 50 and grid[t, row]
            if on and first is None:
                first = t
            if not on and first is not None:
                if t - first >= 2:
                    expected.append(Stretch(row, first, t))
                first = None

    assert stretches(grid, shortest=2, bridge=0) == expected


@pytest.mark.parametrize(
    ("a", "b", "together"),
    [
        (Stretch(0, 0, 5), Stretch(1, 5, 9), True),
        (Stretch(0, 0, 5), Stretch(1, 6, 9), False),
        (Stretch(0, 6, 9), Stretch(1, 0, 6), True),
        (Stretch(0, 7, 9), Stretch(1, 0, 6), False),
        (Stretch(0, 0, 9), Stretch(2, 3, 4), True),
        (Stretch(0, 0, 9), Stretch(3, 3, 4), False),
        (Stretch(0, 0, 3), Stretch(0, 8, 9), False),
    ],
)
def test_stretches_join_when_they_touch_in_time_and_at_most_one_layer_lies_between(
    a: Stretch, b: Stretch, together: bool
) -> None:
    _, graph = chain(5)

    assert len(joined([a, b], graph)) == (1 if together else 2)


def test_one_long_stretch_joins_many_short_ones() -> None:
    _, graph = chain(3)
    short = [Stretch(0, t, t + 3) for t in (0, 6, 12)]

    parts = joined([*short, Stretch(1, 0, 20), Stretch(2, 16, 20)], graph)

    assert [len(part) for part in parts] == [5]


def test_regions_are_ordered_by_when_they_begin() -> None:
    _, graph = chain(8)

    parts = joined([Stretch(0, 9, 12), Stretch(4, 3, 6), Stretch(7, 3, 6)], graph)

    assert [part[0].row for part in parts] == [4, 7, 0]


def test_an_identity_tells_regions_of_the_same_layers_apart_and_does_not_depend_on_time() -> None:
    s, graph = chain(4)

    def names(*parts: list[Stretch]) -> list[str]:
        return [name for name, _ in named("dead", parts, s, graph)]

    once = names([Stretch(1, 0, 5)])
    twice = names([Stretch(1, 3, 9)], [Stretch(1, 12, 15)])
    assert twice[0] == once[0]
    assert len({*twice, *names([Stretch(1, 0, 5), Stretch(2, 0, 5)])}) == 3
    assert next(named("vanishing", [[Stretch(1, 0, 5)]], s, graph))[0].startswith("vanishing-")


def test_layers_are_listed_from_the_input_to_the_loss() -> None:
    _, graph = chain(4)

    assert rows_of([Stretch(3, 0, 2), Stretch(1, 0, 2), Stretch(3, 5, 8)], graph) == [1, 3]


def test_an_extent_is_in_steps_records_layers_and_parameters() -> None:
    s, graph = chain(4)

    found = extent([Stretch(1, 4, 9), Stretch(2, 6, 12)], s, graph)

    assert (found.start_layer, found.end_layer, found.layer_count) == ("layers.1", "layers.2", 2)
    assert found.affected_parameters == 200
    assert found.onset == (30, 40)
    assert found.end == 110
    assert found.duration_steps == 70
    assert found.records == 8
    assert not found.ongoing


@pytest.mark.parametrize(("end", "ongoing"), [(17, False), (18, True), (20, True)])
def test_a_region_that_reaches_the_last_two_records_is_ongoing(end: int, ongoing: bool) -> None:
    s, graph = chain(2)

    assert extent([Stretch(0, 3, end)], s, graph).ongoing is ongoing


def test_an_onset_at_the_first_record_has_no_earlier_step() -> None:
    s, _ = chain(2)

    assert onset(s, 0) == (None, 0)
    assert onset(s, 1) == (0, 10)


def test_a_test_fires_when_any_cell_of_the_region_passes() -> None:
    tests = {"a": flags("....#", "....."), "b": flags(".....", "#....")}

    assert fired(tests, [Stretch(0, 2, 5)]) == ("a",)
    assert fired(tests, [Stretch(0, 0, 4), Stretch(1, 0, 1)]) == ("b",)


def test_a_value_is_held_when_one_layer_reaches_it_three_times() -> None:
    values = np.array([[5.0, 1.0], [4.0, np.nan], [3.0, 9.0], [2.0, 8.0]])

    assert held(values, [Stretch(0, 0, 4)]) == 3.0
    assert held(values, [Stretch(0, 0, 2)]) == 4.0
    assert held(values, [Stretch(1, 0, 4)]) == 1.0
    assert held(values, [Stretch(0, 1, 4), Stretch(1, 2, 4)]) == 8.0
    assert held(values, [Stretch(1, 0, 3)]) == -math.inf


def test_a_test_is_held_when_one_layer_passes_it_three_times() -> None:
    tests = {"often": flags("##..#"), "rarely": flags("##..."), "never": flags(".....")}

    assert held_tests(tests, [Stretch(0, 0, 5)]) == ("often",)
    assert held_tests(tests, [Stretch(0, 0, 2)]) == ("often", "rarely")


def test_the_median_update_of_a_region_leaves_out_what_is_not_known() -> None:
    updates = np.array([[1.0, 10.0], [2.0, 20.0], [np.nan, 30.0], [4.0, 40.0]])
    s = series(made(np.ones((4, 2)), numel=1, param_l2=np.ones((4, 2)), update_l2=updates))

    assert median_update(s, [Stretch(0, 0, 4)]) == 2.0
    assert median_update(s, [Stretch(0, 1, 3), Stretch(1, 3, 4)]) == 21.0
    assert median_update(s, [Stretch(0, 2, 3)]) is None
    assert median_update(chain(2)[0], [Stretch(0, 0, 4)]) is None
