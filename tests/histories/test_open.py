"""What a path may be: a file, a folder, a glob, and what is no history at all."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gradscope.errors import InputError, UsageError
from gradscope.histories.history import History
from gradscope.histories.open import open_history

from .files import event, native, tfrecords


def npz(path: Path, record: dict[str, Any]) -> None:
    np.savez(path.with_suffix(".npz"), **record)


def safetensors(path: Path, record: dict[str, Any]) -> None:
    from safetensors.numpy import save_file

    save_file(record, path.with_suffix(".safetensors"))


def torch_file(path: Path, record: dict[str, Any]) -> None:
    import torch

    torch.save({n: torch.tensor(g) for n, g in record.items()}, path.with_suffix(".pt"))


@pytest.mark.parametrize("save", [npz, safetensors, torch_file])
def test_a_folder_with_a_file_for_each_step_is_a_history(
    save: Callable[[Path, dict[str, Any]], None], tmp_path: Path
) -> None:
    for step in (100, 20, 3):
        save(tmp_path / f"step_{step}", {"fc.weight": np.full((2, 2), float(step))})

    history = open_history(str(tmp_path))

    assert history.steps.tolist() == [3, 20, 100]
    assert history.l2[:, 0].tolist() == [6.0, 40.0, 200.0]


def test_a_damaged_file_among_those_of_steps_costs_its_step(tmp_path: Path) -> None:
    for step in range(3):
        npz(tmp_path / str(step), {"w": np.ones(4)})
    (tmp_path / "1.npz").write_bytes((tmp_path / "1.npz").read_bytes()[:100])

    history = open_history(str(tmp_path))

    assert history.steps.tolist() == [0, 2]
    assert "1.npz" in history.failures[0].message


def test_a_glob_may_match_event_files(tmp_path: Path) -> None:
    for number in (1, 2):
        path = tmp_path / f"events.out.tfevents.{number}.host"
        path.write_bytes(tfrecords([event(number, "grad/a", 1.0)]))

    assert open_history(str(tmp_path / "*.host")).steps.tolist() == [1, 2]
    assert open_history(str(tmp_path / "*.1.host")).steps.tolist() == [1]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"<!doctype html><html>, sign in</html>", "HTML page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 12\n", "git lfs pull"),
        (b"\x1f\x8b\x08\x00" + bytes(40), "gzip"),
        (b"just a few words\n", "is not a known history"),
        (b"", "empty"),
    ],
)
def test_what_is_no_history_is_named(content: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_bytes(content)

    with pytest.raises(InputError, match=said):
        open_history(str(tmp_path / "x.csv"))


def test_a_pipe_in_a_folder_of_shards_is_not_waited_for(tmp_path: Path) -> None:
    native(tmp_path / "00000.npz")
    os.mkfifo(tmp_path / "00001.npz")

    history = open_history(str(tmp_path))

    assert history.shape == (6, 3)
    assert "FIFO" in history.failures[0].message


def test_nothing_there_is_said_to_be_missing(tmp_path: Path) -> None:
    for path in (tmp_path / "no.npz", tmp_path):
        with pytest.raises(InputError) as refused:
            open_history(str(path))
        assert refused.value.kind == "missing"


def broken(_: str) -> History:
    raise KeyError("oops")


def readable(path: str) -> History | None:
    good = native(Path(path).parent / "good.npz")
    return open_history(str(good)) if path.endswith(".mine") else None


@pytest.mark.parametrize(("reader", "said"), [(broken, "plugin .* failed"), (readable, None)])
def test_readers_of_others_are_asked_last(
    reader: Callable[[str], Any], said: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    point = EntryPoint("mine", f"{__name__}:{reader.__name__}", "gradscope.histories")
    monkeypatch.setattr(EntryPoint, "load", lambda _: reader)
    monkeypatch.setattr("gradscope.plugins.plugins", lambda _: [point])
    (tmp_path / "x.mine").write_bytes(b"\x01\x02 my own format")

    if said is None:
        assert open_history(str(tmp_path / "x.mine")).shape == (6, 3)
    else:
        with pytest.raises(UsageError, match=said):
            open_history(str(tmp_path / "x.mine"))


METRICS = (
    "epoch,step,train_loss_step,grad_2.0_norm_total,lr-Adam\n0,9,2.0,1.5,0.1\n0,19,1.0,1.25,0.1\n"
)


@pytest.mark.parametrize("inside", ["", "version_0", "lightning_logs/version_0"])
def test_the_folder_of_a_csv_logger_is_the_table_in_it(inside: str, tmp_path: Path) -> None:
    folder = tmp_path / inside
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.csv").write_text(METRICS)
    (folder / "hparams.yaml").write_text("a: 1\n")

    history = open_history(str(tmp_path))

    assert history.steps.tolist() == [9, 19]
    assert history.loss is not None
    assert history.total_l2 is not None
    assert history.lr is not None
    assert (history.loss[1], history.total_l2[1], history.lr[1, 0]) == (1.0, 1.25, 0.1)


def test_a_folder_of_several_versions_is_of_several_runs(tmp_path: Path) -> None:
    for version in ("version_2", "version_10"):
        (tmp_path / version).mkdir()
        (tmp_path / version / "metrics.csv").write_text(METRICS)

    with pytest.raises(UsageError, match="several runs: 'version_2' and 'version_10'"):
        open_history(str(tmp_path))


def test_the_last_checkpoint_of_a_trainers_folder_knows_the_run(tmp_path: Path) -> None:
    for steps in (500, 1000):
        folder = tmp_path / f"checkpoint-{steps}"
        folder.mkdir()
        log = [{"step": step, "loss": 1.0, "grad_norm": 2.0} for step in range(100, steps + 1, 100)]
        (folder / "trainer_state.json").write_text(json.dumps({"log_history": log}))

    assert open_history(str(tmp_path)).steps[-1] == 1000


def test_a_stored_run_of_wandb_says_how_to_export_it(tmp_path: Path) -> None:
    (tmp_path / "run-abc.wandb").write_bytes(b":W&B\xe1\xbe\x00" + bytes(200))

    with pytest.raises(InputError, match=r"wandb sync FOLDER.*scan_history"):
        open_history(str(tmp_path / "run-abc.wandb"))
