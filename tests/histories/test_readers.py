"""Every format people have becomes the same history, or an error that says what to do."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gradscope.errors import InputError, UsageError
from gradscope.histories.format import KEYS, meta_schema
from gradscope.histories.history import History, Status
from gradscope.histories.open import open_history
from gradscope.histories.sketching import hashed, sketch
from gradscope.histories.steps import ordered

from .files import crc32c, event, native, tfrecords

RNG = np.random.default_rng(0)
GRADIENTS = [
    {n: RNG.normal(size=(4, 5)) * 10.0 ** (t % 3) for n in ("a.weight", "b.weight")}
    for t in range(6)
]
NORMS = np.array([[np.linalg.norm(g) for g in step.values()] for step in GRADIENTS])


# --- gradients themselves -------------------------------------------------------------------------


def step_slash_name(path: Path) -> Path:
    np.savez(
        path / "g.npz", **{f"{t}/{n}": g for t, s in enumerate(GRADIENTS) for n, g in s.items()}
    )
    return path / "g.npz"


def name_slash_step(path: Path) -> Path:
    keyed = {f"{n}/step_{t:06d}": g for t, s in enumerate(GRADIENTS) for n, g in s.items()}
    np.savez_compressed(path / "g.npz", **keyed)
    return path / "g.npz"


def stacked(path: Path) -> Path:
    from safetensors.numpy import save_file

    save_file(
        {n: np.stack([s[n] for s in GRADIENTS]) for n in GRADIENTS[0]}, path / "g.safetensors"
    )
    return path / "g.safetensors"


def torch_list(path: Path) -> Path:
    import torch

    torch.save([{n: torch.tensor(g) for n, g in s.items()} for s in GRADIENTS], path / "g.pt")
    return path / "g.pt"


def torch_dict(path: Path) -> Path:
    import torch

    torch.save(
        {t: {n: torch.tensor(g) for n, g in s.items()} for t, s in enumerate(GRADIENTS)},
        path / "g.pt",
    )
    return path / "g.pt"


@pytest.mark.parametrize(
    "make", [step_slash_name, name_slash_step, stacked, torch_list, torch_dict]
)
def test_gradients_are_measured_exactly_however_they_are_keyed(
    make: Callable[[Path], Path], tmp_path: Path
) -> None:
    history = open_history(str(make(tmp_path)), as_="vectors")

    assert [layer.name for layer in history.layers] == ["a.weight", "b.weight"]
    assert [layer.numel for layer in history.layers] == [20, 20]
    np.testing.assert_allclose(history.l2, NORMS, rtol=1e-12)
    np.testing.assert_allclose(
        history.max_abs, [[np.abs(g).max() for g in s.values()] for s in GRADIENTS]
    )
    for t in range(1, 6):
        a, b = GRADIENTS[t - 1]["a.weight"].ravel(), GRADIENTS[t]["a.weight"].ravel()
        cosine = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
        assert history.exact is not None
        assert history.exact.cosine[t, 0] == pytest.approx(cosine, abs=1e-12)
        assert history.exact.lag[t, 0] == 1


@pytest.mark.parametrize("scale", [1e-300, 1e-30, 1e30, 1e300])
def test_norms_neither_overflow_nor_vanish_on_the_way(scale: float, tmp_path: Path) -> None:
    np.savez(tmp_path / "g.npz", **{"0/w": np.full(100, scale)})

    assert open_history(str(tmp_path / "g.npz")).l2[0, 0] == pytest.approx(10 * scale, rel=1e-12)


def test_nan_and_infinity_are_counted_and_a_missing_step_is_not_recorded(tmp_path: Path) -> None:
    np.savez(tmp_path / "g.npz", **{
        "0/w": np.array([1.0, np.nan, np.inf]), "0/v": np.array([0.0, 3.0]),
        "1/w": np.array([1.0, 2.0, 2.0]),
    })  # fmt: skip

    history = open_history(str(tmp_path / "g.npz"))

    assert history.n_nan.tolist() == [[1, 0], [0, -1]]
    assert history.n_inf.tolist() == [[1, 0], [0, -1]]
    assert history.zero_fraction[0].tolist() == [0.0, 0.5]
    assert history.status.tolist() == [
        [Status.RECORDED] * 2,
        [Status.RECORDED, Status.NOT_RECORDED],
    ]
    assert history.l2[1, 0] == 3.0


# --- norms ----------------------------------------------------------------------------------------


def test_norms_with_steps_beside_them_need_no_option(tmp_path: Path) -> None:
    np.savez(tmp_path / "n.npz", steps=np.arange(6) * 10, a=NORMS[:, 0], b=NORMS[:, 1])

    history = open_history(str(tmp_path / "n.npz"))

    np.testing.assert_array_equal(history.l2, NORMS)
    assert history.steps.tolist() == [0, 10, 20, 30, 40, 50]


def test_arrays_that_may_be_either_are_refused_with_the_option_that_decides(tmp_path: Path) -> None:
    np.savez(tmp_path / "n.npz", a=NORMS[:, 0], b=NORMS[:, 1])

    with pytest.raises(UsageError, match="--as norms or --as vectors"):
        open_history(str(tmp_path / "n.npz"))
    np.testing.assert_array_equal(open_history(str(tmp_path / "n.npz"), as_="norms").l2, NORMS)
    assert open_history(str(tmp_path / "n.npz"), as_="vectors").shape == (6, 2)


# --- tables ---------------------------------------------------------------------------------------

LONG = "step,epoch,param,layer,grad_norm\n" + "".join(
    f"{t},0,{n},x,{NORMS[t, i]!r}\n" for t in range(6) for i, n in enumerate("ab")
).replace("np.float64(", "").replace(")", "")


@pytest.mark.parametrize(
    "columns",
    [
        "grad_2.0_norm/{}", "grad_2_norm/{}", "l2_norm/grad/{}", "grad/{}.norm", "gradients/{}",
        "grad_norm/{}", "{}/grad_norm",
    ],
)  # fmt: skip
def test_wide_tables_of_known_loggers_are_read(columns: str, tmp_path: Path) -> None:
    path = tmp_path / "w.csv"
    path.write_text(
        f"step,{columns.format('a.weight')},loss,lr\n0,1.5,2.0,0.1\n1,,,\n2,NaN,1.0,0.1\n"
    )

    history = open_history(str(path))

    assert [layer.name for layer in history.layers] == ["a.weight"]
    assert history.status[:, 0].tolist() == [1, 0, 1]
    assert history.l2[0, 0] == 1.5
    assert np.isnan(history.l2[2, 0])
    assert history.loss is not None
    assert history.loss[[0, 2]].tolist() == [2.0, 1.0]


def test_a_long_table_is_read_whatever_its_container(tmp_path: Path) -> None:
    rows = [
        {"step": t, "layer": n, "value": NORMS[t, i]} for t in range(6) for i, n in enumerate("ab")
    ]
    (tmp_path / "l.csv").write_text(LONG)
    (tmp_path / "l.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "l.json").write_text(json.dumps(rows))
    files = ["l.csv", "l.jsonl", "l.json"]
    try:
        from pyarrow import Table, parquet
    except ImportError:
        (tmp_path / "l.parquet").write_bytes(b"PAR1" + bytes(100))
        with pytest.raises(UsageError, match="pip install pyarrow"):
            open_history(str(tmp_path / "l.parquet"))
    else:
        parquet.write_table(Table.from_pylist(rows), tmp_path / "l.parquet")
        files.append("l.parquet")
    for file in files:
        np.testing.assert_allclose(open_history(str(tmp_path / file)).l2, NORMS)


def test_the_trainers_state_gives_the_total_norm_alone_and_says_so(tmp_path: Path) -> None:
    path = tmp_path / "trainer_state.json"
    log = [
        {"step": 10, "grad_norm": 1.0, "loss": 2.0},
        {"step": 20, "grad_norm": float("nan"), "loss": 1.0},
    ]
    path.write_text(json.dumps({"log_history": [*log, {"step": 20, "eval_loss": 1.0}]}))

    history = open_history(str(path))

    assert history.shape == (2, 0)
    assert history.total_l2 is not None
    assert np.isnan(history.total_l2[1])
    assert any("total" in note for note in history.notes)


def test_five_hundred_rows_look_sampled(tmp_path: Path) -> None:
    (tmp_path / "w.csv").write_text("_step,gradients/a\n" + "".join(f"{t},1\n" for t in range(500)))

    assert any("500 rows" in note for note in open_history(str(tmp_path / "w.csv")).notes)


# --- event files ----------------------------------------------------------------------------------


def test_histograms_of_an_event_file_give_the_exact_norm(tmp_path: Path) -> None:
    records = [event(t, f"grad/{n}", g) for t, s in enumerate(GRADIENTS) for n, g in s.items()]
    (tmp_path / "events.out.tfevents.1.host").write_bytes(
        tfrecords([*records, event(2, "loss", 0.5)])
    )

    history = open_history(str(tmp_path))

    assert [(layer.name, layer.numel) for layer in history.layers] == [
        ("a.weight", 20),
        ("b.weight", 20),
    ]
    np.testing.assert_allclose(history.l2, NORMS, rtol=1e-12)
    assert history.loss is not None
    assert history.loss[2] == 0.5


def test_a_restart_of_a_run_wins_step_by_step_and_a_cut_end_is_noted(tmp_path: Path) -> None:
    first = tfrecords([event(t, "grad_norm/a", 1.0) for t in range(6)])
    second = tfrecords([event(t, "grad_norm/a", 2.0) for t in range(4, 8)])
    (tmp_path / "events.out.tfevents.1.host").write_bytes(first)
    (tmp_path / "events.out.tfevents.2.host").write_bytes(second[:-5])

    history = open_history(str(tmp_path))

    assert history.l2[:, 0].tolist() == [1, 1, 1, 1, 2, 2, 2]
    assert any("ends inside a record" in note for note in history.notes)


def test_the_checksum_is_that_of_the_standard() -> None:
    # RFC 3720, B.4: 32 bytes of zeros have CRC-32C 0x8A9136AA.
    masked = crc32c(bytes(32))
    crc = ((masked - 0xA282EAD8) & 0xFFFFFFFF) << 15 & 0xFFFFFFFF | (
        (masked - 0xA282EAD8) & 0xFFFFFFFF
    ) >> 17
    assert crc == 0x8A9136AA


# --- the native format ----------------------------------------------------------------------------


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    extra = {
        "layer/module": np.array(["l0", "l1", "l2"]),
        "layer/kind": np.array(["conv", "norm", "odd"]),
        "grad/status": np.array([[1, 2, 3]] * 6, np.uint8), "loss": np.linspace(1, 0, 6),
        "graph/edges": np.array([[-1, 0], [0, 1], [1, 3]]), "layer/tied_to": np.array([-1, -1, 0]),
    }  # fmt: skip

    history = open_history(str(native(tmp_path / "a.npz", **extra)))

    assert [layer.kind for layer in history.layers] == ["conv", "norm", "other"]
    assert history.layers[2].tied_to == 0
    assert history.status.tolist() == [[1, 2, 3]] * 6
    assert history.edges.tolist() == [[-1, 0], [0, 1], [1, 3]]
    assert history.topology == "given"
    assert history.meta["run_id"] == "test"


def test_the_same_data_are_the_same_bytes(tmp_path: Path) -> None:
    assert native(tmp_path / "a.npz").read_bytes() == native(tmp_path / "b.npz").read_bytes()


FAULTS = {
    "no steps": ({"steps": None}, "has no steps"),
    "a step twice": ({"steps": np.array([0, 1, 2, 2, 3, 4])}, "record 3 has 2 after 2"),
    "norms of the wrong shape": ({"grad/l2": np.zeros((6, 4), np.float32)}, "elsewhere L is 3"),
    "norms of the wrong type": ({"grad/l2": np.zeros((6, 3), int)}, "dtype"),
    "an edge to nowhere": ({"graph/edges": np.array([[0, 9]])}, "outside -1 to 3"),
    "a name twice": ({"layer/name": np.array(["a", "a", "b"])}, "repeats a name"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_file_that_breaks_the_format_is_refused_with_the_place(
    fault: str, tmp_path: Path
) -> None:
    change, said = FAULTS[fault]
    native(tmp_path / "good.npz")
    arrays = {**np.load(tmp_path / "good.npz"), **change}
    np.savez(tmp_path / "bad.npz", **{k: v for k, v in arrays.items() if v is not None})

    with pytest.raises(InputError, match=said) as refused:
        open_history(str(tmp_path / "bad.npz"))
    assert refused.value.kind == "malformed"


def test_another_major_version_is_refused_and_a_minor_one_read(tmp_path: Path) -> None:
    native(tmp_path / "good.npz")
    arrays = dict(np.load(tmp_path / "good.npz"))
    for version, readable in (([2, 0], False), ([1, 7], True)):
        text = json.dumps({"format": "gradscope.grads", "version": version}).encode()
        np.savez(
            tmp_path / "x.npz",
            **arrays | {"meta": np.frombuffer(text, np.uint8), "new/key": np.ones(2)},
        )
        if readable:
            assert any("new/key" in note for note in open_history(str(tmp_path / "x.npz")).notes)
        else:
            with pytest.raises(InputError, match="version 2"):
                open_history(str(tmp_path / "x.npz"))


def test_pickled_objects_are_never_loaded(tmp_path: Path) -> None:
    native(tmp_path / "good.npz")
    arrays: dict[str, Any] = dict(np.load(tmp_path / "good.npz"))
    arrays["loss"] = np.array([{}] * 6, dtype=object)
    np.savez(tmp_path / "bad.npz", **arrays)

    with pytest.raises(InputError) as refused:
        open_history(str(tmp_path / "bad.npz"))
    assert refused.value.kind == "unsafe"


def test_a_bomb_is_not_inflated(tmp_path: Path) -> None:
    native(tmp_path / "good.npz")
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.zeros(10))
    with zipfile.ZipFile(tmp_path / "bad.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, array in np.load(tmp_path / "good.npz").items():
            if name != "loss":
                with archive.open(f"{name}.npy", "w") as file:
                    np.lib.format.write_array(file, array)
        with archive.open("loss.npy", "w", force_zip64=True) as file:
            file.write(buffer.getvalue())
            for _ in range(1100):
                file.write(bytes(1 << 20))

    with pytest.raises(InputError) as refused:
        open_history(str(tmp_path / "bad.npz"))
    assert refused.value.kind == "unsafe"


def test_the_schema_of_meta_is_published_and_every_key_has_a_note() -> None:
    assert meta_schema()["required"] == ["format", "version"]
    assert all(key.note and key.shape for key in KEYS.values())


# --- hostile and odd input ------------------------------------------------------------------------


@given(
    position=st.integers(0, 10**6),
    value=st.integers(0, 255),
    cut=st.booleans(),
    kind=st.sampled_from(["npz", "csv", "jsonl", "events"]),
)
@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_a_damaged_file_gives_a_history_or_an_error_a_person_can_read(
    position: int, value: int, cut: bool, kind: str, tmp_path: Path
) -> None:
    path = tmp_path / f"x.{kind}"
    if kind == "npz":
        native(path)
    elif kind == "events":
        path.write_bytes(tfrecords([event(t, "grad/a", np.ones(3)) for t in range(3)]))
    else:
        path.write_text(LONG if kind == "csv" else '{"step": 1, "layer": "a", "value": 2}\n' * 3)
    data = bytearray(path.read_bytes())
    data[position % len(data)] = value
    path.write_bytes(data[: position % len(data)] if cut else data)

    with suppress(InputError, UsageError):
        history = open_history(str(path))
        assert isinstance(history, History)
        assert bool(np.all(np.diff(history.steps) > 0))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("layer,norm\na,1\n", "no step"),
        ("step,accuracy\n1,2\n", "no column of gradient norms"),
        ("step,layer,value\n1,a,fast\n", "row 2, column 'value': 'fast' is not a number"),
        ("step,layer,value\nnan,a,1\n", "row 2: step is 'nan'"),
        ("step,layer,value\n", "no rows"),
        ("step,layer,value\n1,a,1,9\n", "more cells than the header"),
    ],
)
def test_a_table_that_cannot_be_read_says_which_row(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(text)

    with pytest.raises(InputError, match=said):
        open_history(str(tmp_path / "t.csv"))


def test_unsorted_repeated_and_restarted_steps_are_put_in_order_and_said() -> None:
    chosen, notes = ordered(np.array([3, 1, 2, 2]))
    assert (chosen.tolist(), len(notes)) == ([1, 3, 0], 2)
    restarted = np.array([*range(20), *range(10, 25)])
    chosen, notes = ordered(restarted)
    assert restarted[chosen].tolist() == list(range(25))
    assert chosen.tolist() == [*range(10), *range(20, 35)]
    assert "restarts at 10" in notes[0]


# --- sketches -------------------------------------------------------------------------------------


def murmur3_finaliser(h: int) -> int:
    """From the reference, in Python's integers."""
    h ^= h >> 16
    h = h * 0x85EBCA6B % 2**32
    h ^= h >> 13
    h = h * 0xC2B2AE35 % 2**32
    return h ^ h >> 16


def test_the_hash_is_murmurs_finaliser() -> None:
    index = np.array([0, 1, 12345, 2**31, 2**32 - 1])
    wanted = [murmur3_finaliser((int(i) * 0x9E3779B9 + 42) % 2**32) for i in index]
    assert hashed(index, 42).tolist() == wanted


def test_a_sketch_is_linear() -> None:
    a, b = RNG.normal(size=1000), RNG.normal(size=1000)
    np.testing.assert_allclose(sketch(2 * a - b, seed=1), 2 * sketch(a, seed=1) - sketch(b, seed=1))


@pytest.mark.parametrize("shape", ["rank one", "one column", "heavy tails"])
def test_cosines_from_sketches_are_within_four_errors_also_where_structure_would_fool_a_hash(
    shape: str,
) -> None:
    rng = np.random.default_rng(5)
    rows, columns = 128, 128
    errors = []
    for seed in range(40):
        if shape == "rank one":
            u, v, w = rng.normal(size=(3, rows))
            a, b = np.outer(u, v), np.outer(u, w)
        elif shape == "one column":
            a, b = np.zeros((2, rows, columns))
            a[:, 3], b[:, 3] = rng.normal(size=(2, rows))
        else:
            a, b = rng.standard_t(2.2, (2, rows, columns))
        a, b = a / np.linalg.norm(a), b / np.linalg.norm(b)
        errors.append(sketch(a, seed=seed) @ sketch(b, seed=seed) - (a * b).sum())
    assert np.abs(errors).max() < 4 * np.sqrt(2 / 128)
    assert np.sqrt(np.mean(np.square(errors))) < 1.5 * np.sqrt(1 / 128)
