"""Reports as runs of TensorBoard and W&B, read back by what those read them with."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from gradscope.cli import app
from gradscope.errors import OutputError, UsageError
from gradscope.histories.tfrecords import logged_values
from gradscope.report import trackers
from gradscope.report.formats import TRACKERS
from gradscope.report.model import AnyReport, Input

SAVED = str(Path(__file__).resolve().parents[2] / "fixtures" / "report-1.0.json")


def rendered(*reports: str) -> str:
    """What stdout carries beside the runs."""
    options = [word for report in reports for word in ("--report", report)]
    done = CliRunner().invoke(app, ["render", SAVED, "-f", "json", "-q", *options])
    assert json.loads(done.stdout)["command"] == "weights"
    assert done.stderr == ""
    assert done.exit_code == 0
    return done.stdout


@pytest.mark.parametrize(
    ("path", "step"),
    [
        ("m.safetensors", 0),
        ("runs/checkpoint-500/model.safetensors", 500),
        ("ckpt_001000.pt", 1000),
        ("step-7/iter=20.pt", 20),
        ("a2b/model-3.pt", 0),
    ],
)
def test_the_step_is_the_one_that_the_path_names(report_of: Callable, path: str, step: int) -> None:
    given = Input(path=path, format="torch", bytes=1)

    assert trackers.step(report_of(inputs=(given,))) == step


def test_the_numbers_tell_how_bad_it_is(report_of: Callable, finding: Callable) -> None:
    made: AnyReport = report_of(finding("critical"), finding("low", "a"), finding("low", "b"))

    assert dict(trackers.numbers(made)) == {
        "findings/critical": 1, "findings/high": 0, "findings/medium": 0, "findings/low": 2,
        "findings/info": 0, "failed": 1, "analysed": 1.0,
    }  # fmt: skip


def test_tensorboard_gets_curves_and_the_report(tmp_path: Path) -> None:
    pytest.importorskip("tensorboardX", reason="of the test extra: run `make test`")

    rendered(f"tensorboard={tmp_path / 'runs' / 'a'}")

    (file,) = (tmp_path / "runs" / "a").iterdir()
    values = {tag: value for _, tag, value in logged_values(str(file), [])}
    assert values["gradscope/weights/findings/critical"] == 1
    assert values["gradscope/weights/findings/high"] == 3
    assert values["gradscope/weights/failed"] == 1
    assert values["gradscope/weights/health"] == 20
    assert b"W101 non-finite" in file.read_bytes()


def test_tensorboard_reads_them(tmp_path: Path) -> None:
    pytest.importorskip("tensorboardX", reason="of the test extra: run `make test`")
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="needs tensorboard"
    )
    rendered(f"tensorboard={tmp_path}")

    read = accumulator.EventAccumulator(str(tmp_path)).Reload()

    assert [e.value for e in read.Scalars("gradscope/weights/findings/high")] == [3]
    (text,) = read.Tensors("gradscope/weights/text_summary")
    assert text.tensor_proto.string_val[0].decode().startswith("## gradscope weights: FAILED")


def test_wandb_gets_an_offline_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="of the extra wandb")
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "data"))

    report = rendered(f"wandb={tmp_path}")

    (run,) = tmp_path.glob("wandb/offline-run-*")
    log = next(run.glob("*.wandb")).read_bytes()
    for name in (b"findings/critical", b"failed", b"health", b"gradscope-weights"):
        assert name in log
    (table,) = run.glob("files/media/table/gradscope/weights/*.json")
    rows = json.loads(table.read_text())
    assert rows["columns"][:3] == ["severity", "rule", "name"]
    assert [row[1] for row in rows["data"]] == ["W101", "W102", "W105", "W111"]
    staged = [file.read_text() for file in tmp_path.glob("data/artifacts/staging/*")]
    assert report in staged


@pytest.mark.parametrize("name", TRACKERS)
def test_a_library_that_is_missing_is_named_with_its_extra(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trackers, "find_spec", lambda _: None)

    with pytest.raises(UsageError, match=rf"{TRACKERS[name]}: pip install .*\[{name}\]"):
        trackers.tracker(name)
    assert CliRunner().invoke(app, ["render", SAVED, "--report", f"{name}=x"]).exit_code == 2


@pytest.mark.parametrize("name", TRACKERS)
def test_a_file_is_no_folder_and_stdout_no_run(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trackers, "find_spec", lambda _: True)
    (tmp_path / "f").write_text("")

    file = CliRunner().invoke(app, ["render", SAVED, "--report", f"{name}={tmp_path / 'f'}"])
    stdout = CliRunner().invoke(app, ["render", SAVED, "--format", name])

    assert (file.exit_code, stdout.exit_code) == (2, 2)
    assert "is a file; name a folder" in file.stderr
    assert f"goes into a folder: --report {name}=DIR" in stdout.stderr


@pytest.mark.parametrize("name", TRACKERS)
def test_a_folder_that_cannot_be_written_is_told(
    name: str, tmp_path: Path, report_of: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trackers, "find_spec", lambda _: True)
    (tmp_path / "f").write_text("")

    with pytest.raises(OutputError, match="cannot be written"):
        trackers.tracker(name)(report_of(), tmp_path / "f" / "below")
