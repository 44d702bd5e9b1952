"""The native format as strangers may write it: other byte orders, other orders, and damage."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gradscope.errors import InputError
from gradscope.histories.format import KEYS, write
from gradscope.histories.open import open_history

from .files import LAYERS, RECORDS, every_key, fields, native


def changed(path: Path, change: dict[str, Any], **more: Any) -> str:
    """A good file with some arrays replaced, by NumPy itself."""
    native(path / "good.npz", **more)
    np.savez_compressed(path / "x.npz", **{**np.load(path / "good.npz"), **change})
    return str(path / "x.npz")


@given(places=st.lists(st.integers(0, 10**6), min_size=1, max_size=8), value=st.integers(0, 255))
@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_a_damaged_compressed_file_is_an_error_a_person_can_read(
    places: list[int], value: int, tmp_path: Path
) -> None:
    path = Path(changed(tmp_path, {}))
    data = bytearray(path.read_bytes())
    for place in places:
        data[place % len(data)] = value
    path.write_bytes(data)

    with suppress(InputError):
        open_history(str(path))


def test_layers_come_in_the_order_of_the_forward_pass_where_it_is_known(tmp_path: Path) -> None:
    edges = np.array([[-1, 1], [1, 2], [2, 0], [0, 3]])
    tied = np.array([2, -1, -1])
    more = {"layer/order": np.array([2, 0, 1]), "graph/edges": edges, "layer/tied_to": tied}
    plain = open_history(str(native(tmp_path / "plain.npz")))

    history = open_history(str(native(tmp_path / "x.npz", **more)))

    assert [layer.name for layer in history.layers] == ["l1.weight", "l2.weight", "l0.weight"]
    np.testing.assert_array_equal(history.l2, plain.l2[:, [1, 2, 0]])
    assert history.edges is not None
    assert history.edges.tolist() == [[-1, 0], [0, 1], [1, 2], [2, 3]]
    assert history.layers[2].tied_to == 1


@pytest.mark.parametrize("dtype", [">f4", ">f8", "f2", "longdouble"])
def test_numbers_of_any_width_and_byte_order_come_in_one_that_analyzers_take(
    dtype: str, tmp_path: Path
) -> None:
    l2 = np.array([[1.5, 2.5, np.inf]] * 6)

    history = open_history(changed(tmp_path, {"grad/l2": l2.astype(dtype)}))

    assert history.l2.dtype in (np.dtype("=f4"), np.dtype("=f8"))
    np.testing.assert_array_equal(history.l2, l2)


IMPOSSIBLE = {
    "a norm below zero": ({"grad/l2": np.full((6, 3), -1.0)}, "of 'l0.weight' is below zero"),
    "a step no counter reaches": (
        {"steps": np.array([1, 2, 3, 4, 5, 2**63 + 5], np.uint64)}, "beyond 64-bit integers"),
    "two sketches of one record": (
        {"grad/sketch": np.ones((2, 3, 4), "f4"), "grad/sketch_index": np.array([1, 1])},
        "entry 1 has 1 after 1"),
    "units that are not there": (
        {"unit/offset": np.array([0, 1, 2, 9]), "unit/last_nonzero": np.zeros(4, int)},
        "from 0 to 4"),
    "a name of no characters": (
        {"layer/name": np.array([0x7FFFFFFF, 65, 66], np.uint32).view("<U1")},
        "layer/name is not a readable"),
}  # fmt: skip


@pytest.mark.parametrize("fault", IMPOSSIBLE)
def test_what_cannot_be_is_refused_with_its_place(fault: str, tmp_path: Path) -> None:
    change, said = IMPOSSIBLE[fault]

    with pytest.raises(InputError, match=said) as refused:
        open_history(changed(tmp_path, change))
    assert refused.value.kind == "malformed"


def test_many_arrays_that_inflate_together_are_a_bomb_too(tmp_path: Path) -> None:
    great = {name: np.zeros((6, 3 * 10**7), "f4") for name in ("grad/l2", "grad/mean")}

    with pytest.raises(InputError) as refused:
        open_history(changed(tmp_path, great))
    assert refused.value.kind == "unsafe"


def test_a_file_that_lost_its_meta_is_still_known_for_what_it_is(tmp_path: Path) -> None:
    arrays = dict(np.load(native(tmp_path / "good.npz")))
    del arrays["meta"]
    np.savez(tmp_path / "x.npz", **arrays)

    with pytest.raises(InputError, match="has no meta"):
        open_history(str(tmp_path / "x.npz"))


def test_every_key_that_is_written_is_read_back_to_the_bit(tmp_path: Path) -> None:
    arrays = every_key()
    write(tmp_path / "x.npz", arrays, {})

    history = open_history(str(tmp_path / "x.npz"))

    for name, key in KEYS.items():
        if key.field is not None:
            np.testing.assert_array_equal(getattr(history, key.field), arrays[name], name)
    found = fields(history)
    np.testing.assert_array_equal(found["sketches"], arrays["grad/sketch"])
    np.testing.assert_array_equal(found["cosine"], arrays["grad/prev_cos"])
    assert [(x.kind, x.module, x.tied_to) for x in history.layers] == [
        ("conv", "m", None), ("norm", "m", None), ("other", "m", 0)]  # fmt: skip
    assert history.notes == ()


def test_steps_in_any_order_are_sorted_with_all_that_belongs_to_them(tmp_path: Path) -> None:
    arrays = every_key()
    arrays["grad/prev_lag"] = np.minimum(1, np.arange(RECORDS))[:, None].repeat(LAYERS, 1)
    write(tmp_path / "sorted.npz", arrays, {})
    whole = open_history(str(tmp_path / "sorted.npz"))
    order = np.array([0, 3, 4, 1, 2, 5, 8, 6, 7])
    by_record = {
        name: array[order]
        for name, array in arrays.items()
        if KEYS[name].shape[0] == "T"
    }  # fmt: skip
    # A lag counts records of the file: after the move only neighbours that stayed so are known.
    stayed = np.append(False, np.diff(order) == 1)
    by_record["grad/prev_lag"] *= stayed[:, None]
    place = np.argsort(order)[arrays["grad/sketch_index"]]
    by_record["grad/sketch_index"] = np.sort(place)
    by_record["grad/sketch"] = arrays["grad/sketch"][np.argsort(place)]
    np.savez(
        tmp_path / "moved.npz",
        meta=np.load(tmp_path / "sorted.npz")["meta"],
        **{**arrays, **by_record},
    )

    moved = open_history(str(tmp_path / "moved.npz"))

    assert any("out of order" in note for note in moved.notes)
    assert moved.exact is not None
    known = moved.exact.lag > 0
    assert known[:, 0].tolist() == [t > 0 and stayed[list(order).index(t)] for t in range(RECORDS)]
    one, two = fields(whole), fields(moved)
    np.testing.assert_array_equal(one.pop("cosine")[known], two.pop("cosine")[known])
    np.testing.assert_array_equal(one.pop("lag")[known], two.pop("lag")[known])
    for name, values in one.items():
        np.testing.assert_array_equal(values, two[name], err_msg=name)
