"""The shards of one run, joined: cut anywhere, in any order of rows, with one of them damaged."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gradscope.histories.format import KEYS, write
from gradscope.histories.history import Status
from gradscope.histories.open import open_history

from .files import LAYERS, RECORDS, every_key, fields, native


@given(cut=st.integers(1, 9), later=st.integers(0, 2))
@settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_shards_cut_anywhere_are_the_whole(cut: int, later: int, tmp_path: Path) -> None:
    whole = open_history(str(native(tmp_path / "whole.npz", 10)))
    folder = tmp_path / f"{cut}-{later}"
    folder.mkdir(exist_ok=True)
    names = np.array([f"l{i}.weight" for i in range(3)])
    # The second shard may have its rows in another order.
    order = np.roll(np.arange(3), later)
    for number, (records, rows) in enumerate(
        ((slice(0, cut), np.arange(3)), (slice(cut, 10), order))
    ):
        arrays = {
            "steps": whole.steps[records],
            "layer/name": names[rows],
            "grad/l2": whole.l2[records][:, rows],
        }
        write(folder / f"{number:05d}.npz", arrays, {})

    joined = open_history(str(folder))

    np.testing.assert_array_equal(joined.l2, whole.l2)
    assert joined.steps.tolist() == whole.steps.tolist()


def test_a_damaged_shard_costs_its_records_only_and_is_reported(tmp_path: Path) -> None:
    native(tmp_path / "00000.npz")
    bad = native(tmp_path / "00001.npz", first=6)
    bad.write_bytes(bad.read_bytes()[:300])

    history = open_history(str(tmp_path))

    assert history.steps.tolist() == list(range(6))
    assert history.failures[0].kind == "truncated"
    assert "00001.npz" in history.failures[0].message


def test_a_layer_that_was_unfrozen_late_has_no_records_before(tmp_path: Path) -> None:
    for number, names in enumerate((["b"], ["a", "b", "c"], ["a", "b", "c"])):
        arrays = {
            "steps": np.arange(3) + 3 * number,
            "layer/name": np.array(names),
            "grad/l2": np.ones((3, len(names)), np.float32),
            "grad/sketch": np.full((1, len(names), 4), number, np.float16),
            "grad/sketch_index": np.array([1]),
        }
        write(tmp_path / f"{number:05d}.npz", arrays, {"topology": {"source": "recorded"}})

    history = open_history(str(tmp_path))

    assert [layer.name for layer in history.layers] == ["b", "a", "c"]
    absent = (history.status == Status.NOT_RECORDED).tolist()
    assert absent == [[False, True, True]] * 3 + [[False] * 3] * 6
    assert np.isnan(history.l2[:3, 1:]).all()
    assert history.sketches is not None
    assert history.sketches.index.tolist() == [1, 4, 7]
    assert history.sketches.values[0, :, 0].tolist() == [0, 0, 0]
    assert history.sketches.values[1].tolist() == [[1] * 4] * 3


def test_shards_of_a_glob_are_taken_by_number(tmp_path: Path) -> None:
    native(tmp_path / "10.npz", first=6)
    native(tmp_path / "9.npz")

    history = open_history(str(tmp_path / "*.npz"))

    assert history.steps.tolist() == list(range(12))
    assert history.notes == ()


@given(cuts=st.sets(st.integers(1, RECORDS - 1), max_size=4), order=st.permutations(range(LAYERS)))
@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_shards_cut_anywhere_with_rows_in_any_order_are_the_whole(
    cuts: set[int], order: list[int], tmp_path: Path
) -> None:
    arrays = every_key()
    write(tmp_path / "x.npz", arrays, {})
    folder = tmp_path / "-".join(map(str, [*sorted(cuts), *order]))
    folder.mkdir(exist_ok=True)
    edges = [0, *sorted(cuts), RECORDS]
    last = len(edges) - 2
    for number, (first, end) in enumerate(pairwise(edges)):
        rows = list(range(LAYERS)) if number == last else order
        write(folder / f"{number:05d}.npz", cut(arrays, first, end, rows), {})

    whole = fields(open_history(str(tmp_path / "x.npz")))

    for name, found in fields(open_history(str(folder))).items():
        np.testing.assert_array_equal(found, whole[name], name)


def cut(
    arrays: dict[str, np.ndarray[Any, Any]], first: int, end: int, rows: list[int]
) -> dict[str, np.ndarray[Any, Any]]:
    """Records ``first`` to ``end`` with the layers in another order, as a recorder would write."""
    new = {old: place for place, old in enumerate(rows)} | {-1: -1, LAYERS: LAYERS}
    index = arrays["grad/sketch_index"]
    inside = (index >= first) & (index < end)
    part = {}
    for name, array in arrays.items():
        for axis, size in enumerate(KEYS[name].shape):
            if size == "L":
                array = array.take(rows, axis)
            elif size == "T":
                array = array[first:end]
            elif size == "S":
                array = array[inside]
        part[name] = array
    part["grad/sketch_index"] = index[inside] - first
    part["layer/tied_to"] = np.array([new[int(row)] for row in part["layer/tied_to"]])
    part["graph/edges"] = np.array([[new[int(n)] for n in e] for e in arrays["graph/edges"]])
    return part
