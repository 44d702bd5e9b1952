"""Tables as loggers and people write them, and as runs that died leave them."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gradscope.errors import InputError, UsageError
from gradscope.histories.history import History, Status
from gradscope.histories.names import gradient_of, is_loss, is_rate, is_total
from gradscope.histories.open import open_history


def table(path: Path, text: str) -> History:
    (path / "t.csv").write_text(text)
    return open_history(str(path / "t.csv"))


def lines(path: Path, rows: list[dict[str, Any]], end: str = "\n") -> History:
    (path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)) + end)
    return open_history(str(path / "t.jsonl"))


@pytest.mark.parametrize(
    ("column", "name"),
    [
        ("grad_2.0_norm/fc.weight", "fc.weight"), ("grad_2.0_norm_fc.weight", "fc.weight"),
        ("l2_norm/grad/fc.weight", "fc.weight"), ("grad/fc.weight.norm", "fc.weight"),
        ("gradients/fc.weight", "fc.weight"), ("train/grad_norm/fc.weight", "fc.weight"),
        ("fc.weight.grad", "fc.weight"), ("fc.weight/grad_norm", "fc.weight"),
        ("grad/fc.weight.max", None), ("grad_2.0_norm_total", None), ("l2_norm/grad/global", None),
        ("optim/total_grad_norm", None), ("train/grad_norm", None), ("optim/grad_clip", None),
        ("grad_scale", None), ("grad_inf_norm/fc.weight", None), ("gradient_penalty", None),
    ],
)  # fmt: skip
def test_columns_are_known_by_the_names_that_loggers_give(column: str, name: str | None) -> None:
    assert gradient_of(column) == name


def test_totals_losses_and_rates_are_told_from_their_neighbours() -> None:
    assert all(map(is_total, ["grad_norm", "optim/total_grad_norm", "l2_norm/grad/global"]))
    assert all(map(is_loss, ["loss", "train_loss", "train/loss", "train_loss_step"]))
    assert not any(map(is_loss, ["val_loss", "eval/loss", "loss_scale"]))
    assert all(map(is_rate, ["lr", "lr-AdamW/pg1", "train/learning_rate"]))
    assert not is_rate("lr_scheduler_steps")


@pytest.mark.parametrize("lengths", [(30, 30), (30, 12), (12, 30)])
def test_a_long_table_may_come_layer_by_layer(lengths: tuple[int, int], tmp_path: Path) -> None:
    rows = [
        f"{t},{n},{t + 1}" for n, count in zip("ab", lengths, strict=True) for t in range(count)
    ]

    history = table(tmp_path, "step,layer,value\n" + "\n".join(rows) + "\n")

    assert history.steps.tolist() == list(range(30))
    assert (history.status == Status.RECORDED).sum(0).tolist() == list(lengths)
    assert history.notes == ()


@pytest.mark.parametrize("by_layer", [True, False])
def test_a_restart_in_a_long_table_supersedes_what_came_after_it(
    by_layer: bool, tmp_path: Path
) -> None:
    run = [*((t, 1.0) for t in range(30)), *((t, 2.0) for t in range(15, 25))]
    rows = (
        [(t, n, v) for n in "ab" for t, v in run] if by_layer
        else [(t, n, v) for t, v in run for n in "ab"]
    )  # fmt: skip

    history = table(tmp_path, "step,layer,value\n" + "".join(f"{t},{n},{v}\n" for t, n, v in rows))

    assert history.steps.tolist() == list(range(25))
    assert history.l2[:, 1].tolist() == [1.0] * 15 + [2.0] * 10
    assert "restarts at 15" in history.notes[0]


def test_the_loss_and_the_rates_of_every_group_stand_beside_the_norms(tmp_path: Path) -> None:
    history = table(tmp_path, "step,layer,grad_norm,loss\n1,a,2,0.5\n1,b,3,0.5\n2,a,4,0.25\n")
    assert history.loss is not None
    assert history.loss.tolist() == [0.5, 0.25]

    history = table(tmp_path, "step,grad/a.norm,lr-Adam/pg1,lr-Adam/pg2\n1,2,0.1,0.2\n2,3,0.1,\n")
    assert history.lr is not None
    np.testing.assert_array_equal(history.lr, [[0.1, 0.2], [0.1, np.nan]])


def test_sparse_rows_of_one_step_are_one_record(tmp_path: Path) -> None:
    history = table(
        tmp_path, "epoch,grad_2.0_norm/a,grad_2.0_norm_total,step,train_loss\n"
        "0,1.5,,9,\n0,,2.5,9,\n0,,,9,0.75\n0,1.0,,19,\n",
    )  # fmt: skip

    assert history.steps.tolist() == [9, 19]
    assert history.l2[:, 0].tolist() == [1.5, 1.0]
    assert history.total_l2 is not None
    assert history.loss is not None
    assert (history.total_l2[0], history.loss[0]) == (2.5, 0.75)


def test_histograms_of_wandb_give_a_norm_that_is_said_to_be_approximate(tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=4096)
    counts, edges = np.histogram(values, 64)
    packed = {"min": edges[0], "size": edges[1] - edges[0], "count": 64}
    cells: list[dict[str, Any]] = [
        {"_type": "histogram", "values": counts.tolist(), "bins": edges.tolist()},
        {"_type": "histogram", "values": counts.tolist(), "packedBins": packed},
    ]

    history = lines(tmp_path, [{"_step": t, "gradients/w": c} for t, c in enumerate(cells)])

    np.testing.assert_allclose(history.l2[:, 0], np.linalg.norm(values), rtol=0.01)
    assert history.layers[0].numel == 4096
    assert history.approximate == {"l2": "from histogram bins"}


def test_objects_in_objects_and_lists_by_name_are_read_too(tmp_path: Path) -> None:
    nested = lines(
        tmp_path, [{"step": t, "loss": 1, "grad_norm": {"a": 1.5, "b": 2}} for t in (1, 2)]
    )
    assert [layer.name for layer in nested.layers] == ["a", "b"]

    (tmp_path / "c.json").write_text(json.dumps({"a": [1, "NaN"], "b": [3, 4], "loss": [1, 2]}))
    columns = open_history(str(tmp_path / "c.json"))
    np.testing.assert_array_equal(columns.l2, [[1, 3], [np.nan, 4]])
    assert any("numbered from 0" in note for note in columns.notes)


@pytest.mark.parametrize("text", ["", "null", "None", "NA", " "])
def test_empty_cells_are_not_recorded_and_no_numbers_are_data(text: str, tmp_path: Path) -> None:
    history = table(tmp_path, f"step,grad/a.norm\n1,{text}\n2,nan\n3,-0.0\n4,Infinity\n")

    assert history.status[:, 0].tolist() == [0, 1, 1, 1]


def test_the_cut_off_end_of_a_run_that_died_is_left_out(tmp_path: Path) -> None:
    history = table(tmp_path, "step,grad/a.norm,grad/b.norm\n1,2,3\n2,0.")
    assert history.steps.tolist() == [1]
    assert any("cut off" in note for note in history.notes)

    (tmp_path / "t.jsonl").write_text('{"step": 1, "grad_norm/a": 2}\n{"step": 2, "grad_no')
    history = open_history(str(tmp_path / "t.jsonl"))
    assert history.steps.tolist() == [1]
    assert any("cut off" in note for note in history.notes)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("step,grad/a.norm\n1,-2\n", "norm of 'a' at step 1 is -2"),
        ("step,grad/a.norm\n0.5,2\n", "step is '0.5', which is not a whole number"),
        ("step,layer,value\n1,,2\n", "layer is empty"),
        ("step,grad/a.norm,grad_norm/a\n1,2,2\n", "two columns for 'a'"),
    ],
)
def test_what_no_norm_can_be_is_refused_with_its_place(
    text: str, said: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=said):
        table(tmp_path, text)


def test_a_name_that_is_no_text_can_still_be_written(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text('{"step": 1, "layer": "\\ud800x", "value": 2}\n')

    open_history(str(tmp_path / "t.jsonl")).layers[0].name.encode()


def test_a_few_values_never_take_a_table_of_gigabytes(tmp_path: Path) -> None:
    rows = "".join(f"{t},layer{t},1\n" for t in range(20_000))

    with pytest.raises(InputError, match="too sparse"):
        table(tmp_path, "step,layer,value\n" + rows)


@given(
    data=st.lists(
        st.tuples(st.integers(0, 40), st.sampled_from("abc"), st.floats(0, 1e9)), max_size=60
    )
)
@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_every_step_of_a_long_table_that_does_not_restart_has_its_last_value(
    data: list[tuple[int, str, float]], tmp_path: Path
) -> None:
    data = sorted(data, key=lambda row: row[0])
    text = "step,layer,value\n" + "".join(f"{t},{n},{v!r}\n" for t, n, v in data)
    if not data:
        return
    history = table(tmp_path, text)

    names = [layer.name for layer in history.layers]
    for (t, n), v in {(t, n): v for t, n, v in data}.items():
        assert history.l2[history.steps.tolist().index(t), names.index(n)] == v
    assert (history.status == 1).sum() == len({(t, n) for t, n, _ in data})


@given(text=st.text(alphabet="step,layrvu;\t\n\r\"'0123456789.-eNanif[]{}:\\", max_size=120))
@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_any_text_is_a_history_or_an_error_a_person_can_read(text: str, tmp_path: Path) -> None:
    for name, start in (("t.csv", "step,layer,value\n"), ("t.jsonl", '{"step": 1, "grad/a": 2}\n')):
        (tmp_path / name).write_text(start + text)
        with suppress(InputError, UsageError):
            history = open_history(str(tmp_path / name))
            assert history.l2.shape == history.status.shape == history.shape


def test_a_damaged_parquet_file_is_an_error_a_person_can_read(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "t.parquet"
    rows = [{"_step": t, "gradients/a": {"values": [t], "bins": [0.0, 2.0]}} for t in range(9999)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    np.testing.assert_allclose(open_history(str(path)).l2[:, 0], np.sqrt(np.arange(9999)))
    whole = path.read_bytes()
    for place in range(4, len(whole), max(1, len(whole) // 100)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 255]) + whole[place + 1 :])
        with suppress(InputError, UsageError):
            open_history(str(path))
