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

from gradscope import analyze_flow
from gradscope.errors import InputError, UsageError
from gradscope.histories.history import History, Status
from gradscope.histories.names import gradient_of, in_depth, is_loss, is_rate, is_total, step_column
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
        ("norms/grad_norm/fc.weight", "fc.weight"), ("gnorm/fc.weight", "fc.weight"),
        ("fc.weight/gnorm", "fc.weight"), ("debug/gradients/fc.weight", "fc.weight"),
        ("gradients/fc/norm", "fc"), ("fc/grad/norm", "fc"), ("fc/grad/max", None),
        ("gnorm", None), ("norms/grad_norm", None), ("weights/fc.weight", None),
        ("grad/fc.weight.max", None), ("grad_2.0_norm_total", None), ("l2_norm/grad/global", None),
        ("optim/total_grad_norm", None), ("train/grad_norm", None), ("optim/grad_clip", None),
        ("grad_scale", None), ("grad_inf_norm/fc.weight", None), ("gradient_penalty", None),
    ],
)  # fmt: skip
def test_columns_are_known_by_the_names_that_loggers_give(column: str, name: str | None) -> None:
    assert gradient_of(column) == name


def test_totals_losses_and_rates_are_told_from_their_neighbours() -> None:
    totals = ["grad_norm", "optim/total_grad_norm", "l2_norm/grad/global", "gnorm", "train_gnorm"]
    totals += ["grad norm", "train/grad_norm_step", "gradient_norm", "total_grad_norm"]
    assert all(map(is_total, totals))
    losses = ["loss", "train_loss", "train/loss", "train_loss_step", "lm loss"]
    assert all(map(is_loss, [*losses, "reduced_train_loss", "loss_metrics/global_avg_loss"]))
    assert not any(map(is_loss, ["val_loss", "eval/loss", "loss_scale", "aux_loss", "loss_cls"]))
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
    assert [f.kind for f in history.failures] == ["truncated"]

    (tmp_path / "t.jsonl").write_text('{"step": 1, "grad_norm/a": 2}\n{"step": 2, "grad_no')
    history = open_history(str(tmp_path / "t.jsonl"))
    assert history.steps.tolist() == [1]
    assert [f.kind for f in history.failures] == ["truncated"]


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


@pytest.mark.parametrize(
    "name",
    [
        "step", "Step", "_step", "global_step", "train/global_step", "num_updates", "iteration",
        "train_num_updates", "episode", "update", "optimizer_step", "time/total_timesteps", "iter",
    ],
)  # fmt: skip
def test_steps_are_counted_under_many_names(name: str, tmp_path: Path) -> None:
    history = table(tmp_path, f"epoch,{name},gnorm,loss\n0,7,1.5,2.0\n0,9,1.25,1.0\n")

    assert history.steps.tolist() == [7, 9]
    assert history.total_l2 is not None
    assert history.total_l2.tolist() == [1.5, 1.25]


def test_the_likeliest_column_counts_the_steps() -> None:
    assert step_column(["update", "num_updates", "epoch"]) == "num_updates"
    assert step_column(["train/step", "step"]) == "step"
    others = [
        "train_loss_step",
        "sec_per_step",
        "max_steps",
        "time_step",
        "grad_norm_step",
        "epoch",
    ]
    assert step_column(others) is None


def test_rows_without_steps_are_numbered_and_that_is_said(tmp_path: Path) -> None:
    history = lines(tmp_path, [{"epoch": t / 8, "loss": 2.0, "grad_norm": 1.0} for t in range(3)])

    assert history.steps.tolist() == [0, 1, 2]
    assert any("numbered from 0" in note for note in history.notes)


CHART = """"Step","run - 1 - train/grad_norm","run - 1 - train/grad_norm__MIN",\
"run - 1 - train/grad_norm__MAX"
"1","1.5","0.5","9"
"2","1.25","0.5","9"
"""


def test_a_chart_of_wandb_is_the_total_norm_of_one_run(tmp_path: Path) -> None:
    history = table(tmp_path, CHART)

    assert history.layers == ()
    assert history.total_l2 is not None
    assert history.total_l2.tolist() == [1.5, 1.25]

    with pytest.raises(UsageError, match="several runs: 'a', 'b'"):
        table(tmp_path, "Step,a - loss,b - loss\n1,2,3\n")


@pytest.mark.parametrize(
    ("file", "layers", "field"),
    [
        ("run-v1-tag-train_grad_norm.csv", [], "total_l2"),
        ("run-.-tag-grad_norm_fc1.weight.csv", ["fc1.weight"], None),
        ("run-.-tag-train_loss.csv", [], "loss"), ("gnorm.csv", [], "total_l2"),
        ("run-.-tag-train_grad_norm.json", [], "total_l2"),
    ],
)  # fmt: skip
def test_what_tensorboard_lets_download_is_named_by_its_file(
    file: str, layers: list[str], field: str | None, tmp_path: Path
) -> None:
    rows = [[1700000000.5, 10, 1.5], [1700000001.5, 20, 1.25]]
    text = "Wall time,Step,Value\n" + "".join(",".join(map(str, row)) + "\n" for row in rows)
    (tmp_path / file).write_text(json.dumps(rows) if file.endswith("json") else text)

    history = open_history(str(tmp_path / file))

    assert history.steps.tolist() == [10, 20]
    assert [layer.name for layer in history.layers] == layers
    values = history.l2[:, 0] if field is None else getattr(history, field)
    assert values.tolist() == [1.5, 1.25]


def downloaded(folder: Path, tags: dict[str, list[tuple[int, float]]]) -> None:
    for tag, rows in tags.items():
        lines = "".join(f"1700000000.5,{step},{value}\n" for step, value in rows)
        (folder / f"run-.-tag-{tag}.csv").write_text("Wall time,Step,Value\n" + lines)


@pytest.mark.parametrize("glob", ["", "*.csv"])
def test_tags_that_were_downloaded_one_by_one_are_joined_by_step(glob: str, tmp_path: Path) -> None:
    steps = range(10, 60, 10)
    downloaded(
        tmp_path,
        {
            "grad_norm_fc1.weight": [(s, s / 10) for s in steps],
            "grad_norm_fc2.weight": [(s, s / 100) for s in steps][1:],
            "train_loss": [(s, 5.0) for s in steps],
        },
    )

    history = open_history(str(tmp_path / glob))

    assert history.steps.tolist() == list(steps)
    assert [layer.name for layer in history.layers] == ["fc1.weight", "fc2.weight"]
    np.testing.assert_allclose(history.l2[1:].T, [[2, 3, 4, 5], [0.2, 0.3, 0.4, 0.5]])
    assert history.status[0].tolist() == [Status.RECORDED, Status.NOT_RECORDED]
    assert history.loss is not None
    assert history.loss.tolist() == [5.0] * 5
    assert history.notes == ()


def test_downloads_of_two_runs_are_not_mixed(tmp_path: Path) -> None:
    downloaded(tmp_path, {"train_loss": [(1, 1.0)]})
    (tmp_path / "other-tag-train_loss.csv").write_text("Wall time,Step,Value\n1,1,2\n")

    with pytest.raises(InputError, match="both of train_loss"):
        open_history(str(tmp_path))


def test_a_download_that_does_not_say_of_which_tag_it_is_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="name it grad_norm"):
        table(tmp_path, "Wall time,Step,Value\n1,2,3\n")


@pytest.mark.parametrize(
    ("columns", "layers"),
    [
        ("step,fc1.weight,fc1.bias", ["fc1.weight", "fc1.bias"]),
        ("step,loss,fc1,fc2", ["fc1", "fc2"]), ("step,a,b", ["a", "b"]),
        ("step,loss,lr,epoch,a,b", ["a", "b"]),
        ("step,loss,val_loss,accuracy,conv1,fc2", ["conv1", "fc2"]),
        ("step,loss,grad_norm,fc1.weight,beta", ["fc1.weight"]),
        ("step,loss,accuracy,beta", []), ("step,loss,perplexity,time", []),
        ("step,loss,weights/fc1.weight,val/fc1", []),
        ("step,grad_norm/a,b,fc1.weight", ["a"]), ("step,loss,fc1.weight.max", []),
    ],
)  # fmt: skip
def test_columns_that_are_called_as_layers_are_layers_where_nothing_else_is(
    columns: str, layers: list[str], tmp_path: Path
) -> None:
    count = columns.count(",")
    for delimiter in ",\t":
        text = columns.replace(",", delimiter) + "\n"
        history = table(tmp_path, text + delimiter.join(["1"] * (count + 1)) + "\n")
        assert [layer.name for layer in history.layers] == layers
    names = columns.split(",")
    history = lines(tmp_path, [dict.fromkeys(names, t) for t in (1, 2)])
    assert [layer.name for layer in history.layers] == layers


def test_what_is_negative_or_a_word_is_no_norm_of_a_layer(tmp_path: Path) -> None:
    history = table(tmp_path, "step,loss,fc1,fc2,fc3\n1,2,3,-1,yes\n2,2,3,1,yes\n")

    assert [layer.name for layer in history.layers] == ["fc1"]
    assert any("taken as gradient norms" in note for note in history.notes)


@pytest.mark.parametrize(
    "row",
    [
        {"layers": {"fc": {"weight": {"grad_norm": 1.5, "weight_norm": 9}}}},
        {"grad_norm": {"fc": {"weight": 1.5}}}, {"grads": {"fc/weight": {"norm": 1.5, "max": 9}}},
        {"train": {"norms": {"grad_norm": {"fc/weight": 1.5}}}},
        {"layers": [{"name": "fc/weight", "grad_norm": 1.5}]}, {"layers": {"fc": {"weight": 1.5}}},
    ],
)  # fmt: skip
def test_layers_are_found_inside_the_objects_of_a_row(row: dict[str, Any], tmp_path: Path) -> None:
    history = lines(tmp_path, [{"step": t, "loss": 2.0, **row} for t in (1, 2)])

    assert [layer.name for layer in history.layers] == ["fc/weight"]
    assert history.l2[:, 0].tolist() == [1.5, 1.5]
    assert history.loss is not None
    assert history.loss.tolist() == [2.0, 2.0]


@pytest.mark.parametrize(
    "whole",
    [
        {"run": "a", "history": [{"step": t, "grad_norm": {"a": t}} for t in (3, 4)]},
        {str(t): {"grad_norm/a": t} for t in (3, 4)},
    ],
)
def test_rows_are_found_inside_one_object(whole: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text(json.dumps(whole, indent=1))
    history = open_history(str(tmp_path / "t.json"))

    assert history.steps.tolist() == history.l2[:, 0].tolist() == [3, 4]


def test_tags_in_rows_are_what_they_are_called(tmp_path: Path) -> None:
    values = {"loss": 2.0, "grad_norm/a.weight": 1.5, "lr": 0.1, "val/acc": 0.5, "grad_norm": 3.0}
    rows = [f"{t},{tag},{value}\n" for tag, value in values.items() for t in range(10)]

    history = table(tmp_path, "step,tag,value\n" + "".join(rows))

    assert [layer.name for layer in history.layers] == ["a.weight"]
    assert history.loss is not None
    assert history.total_l2 is not None
    assert (history.loss[3], history.total_l2[3]) == (2.0, 3.0)


def test_what_is_logged_more_often_than_gradients_belongs_to_the_record_that_follows(
    tmp_path: Path,
) -> None:
    rows = [
        {"step": t, "loss": float(t)} | ({"grad_norm/a": 1.0} if t % 10 == 0 else {})
        for t in range(1, 104)
    ]

    history = lines(tmp_path, rows)

    assert history.steps.tolist() == list(range(10, 101, 10))
    assert history.loss is not None
    assert history.loss.tolist() == list(range(10, 101, 10))
    assert any("after it, up to step 103" in note for note in history.notes)


def test_names_that_the_alphabet_sorted_come_in_the_order_of_the_network() -> None:
    named = ["embed", *(f"layers.{i}.weight" for i in range(12)), "head.weight"]

    assert in_depth(sorted(named)) == named
    assert in_depth(sorted(["encoder.0", "encoder.10", "encoder.2", "decoder.0"])) == [
        "encoder.0", "encoder.2", "encoder.10", "decoder.0",
    ]  # fmt: skip
    assert in_depth(["z", "layers.10", "layers.2"]) == ["z", "layers.10", "layers.2"]


# --- what programs write --------------------------------------------------------------------------


def yolo(rows: list[dict[str, float]]) -> str:
    """``save_metrics`` of ultralytics/engine/trainer.py before version 8.3: padded, by epoch."""
    head = ",".join(f"{name:>23s}" for name in rows[0])
    return "\n".join([head, *(",".join(f"{v:23.5g}" for v in row.values()) for row in rows)]) + "\n"


def epochs(box: float) -> list[dict[str, float]]:
    rows = [
        {
            "epoch": e + 1, "train/box_loss": 2 / (1 + e), "train/cls_loss": 1,
            "train/dfl_loss": 0.5, "metrics/precision(B)": 0.5, "val/box_loss": 9, "lr/pg0": 0.01,
        }
        for e in range(60)
    ]  # fmt: skip
    for row in rows[40:]:
        row["train/box_loss"] = box
    return rows


@pytest.mark.parametrize(("box", "code"), [(0.03, 0), (90.0, 1), (float("nan"), 1)])
def test_the_losses_of_a_detector_are_judged_by_their_sum(
    box: float, code: int, tmp_path: Path
) -> None:
    (tmp_path / "results.csv").write_text(yolo(epochs(box)))

    history = open_history(str(tmp_path / "results.csv"))

    assert history.loss is not None
    assert history.loss[0] == pytest.approx(3.5)
    assert history.loss[50] == pytest.approx(1.5 + box, nan_ok=True)
    assert any("the loss is the sum of" in note for note in history.notes)
    assert analyze_flow(tmp_path / "results.csv").gate.exit_code == code


def test_losses_that_do_not_add_up_are_no_loss(tmp_path: Path) -> None:
    """A generator and a discriminator, an actor and a critic."""
    rows = "".join(f"{t},{1 + t},{2 + t}\n" for t in range(20))
    (tmp_path / "a.csv").write_text("step,train/g_loss,train/d_loss\n" + rows)

    with pytest.raises(InputError, match="no column of gradient norms"):
        open_history(str(tmp_path / "a.csv"))
