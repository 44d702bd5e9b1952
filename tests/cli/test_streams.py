"""Streams and files that fail: nothing is lost in silence, and no input is ever overwritten."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from gradscope.report.formats import BUILT_IN

FIXTURES = Path(__file__).resolve().parents[2] / "fixtures"
DIGITS = FIXTURES / "digits.safetensors"
SIGMOID = FIXTURES / "sigmoid"


def shell(line: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = line.replace("gradscope", f"{sys.executable} -m gradscope")
    return subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, timeout=120,
        env=os.environ | environment,
    )  # fmt: skip


LINES = [
    f"gradscope weights {DIGITS}",
    "gradscope --help",
    "gradscope --version",
    "gradscope rules",
]


@pytest.mark.parametrize("line", LINES)
def test_a_full_disk_behind_stdout_is_said_and_ends_with_3(line: str) -> None:
    done = shell(f"{line} > /dev/full")

    assert done.returncode == 3
    assert done.stderr == "gradscope: error: stdout cannot be written: No space left on device\n"


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-", "<&-", "2>/dev/full"])
@pytest.mark.parametrize("line", LINES)
def test_closed_streams_change_neither_the_exit_code_nor_give_a_traceback(
    line: str, closed: str
) -> None:
    done = shell(f"{line} {closed}")

    assert done.returncode == 0
    assert "Traceback" not in done.stdout + done.stderr


def test_an_interpreter_without_stdout_does_not_write_the_report_into_an_opened_file(
    tmp_path: Path,
) -> None:
    done = shell(f"gradscope weights {DIGITS} --report json={tmp_path}/r.json >&- 2>&- <&-")

    assert done.returncode == 0
    assert json.loads((tmp_path / "r.json").read_text())["command"] == "weights"


@pytest.mark.parametrize("columns", ["abc", "-5", "0", "9" * 30, "１２"])
def test_a_senseless_number_of_columns_is_no_bug(columns: str) -> None:
    done = shell(
        f"script -qc '{sys.executable} -m gradscope weights {DIGITS}' /dev/null", COLUMNS=columns
    )

    assert done.returncode == 0
    assert "Traceback" not in done.stdout
    assert "bug" not in done.stdout


@pytest.mark.parametrize("format_", BUILT_IN)
@pytest.mark.parametrize("command", ["weights", "flow"])
def test_a_bad_input_is_said_on_stderr_whatever_the_format(command: str, format_: str) -> None:
    done = shell(f"gradscope {command} nowhere.npz --format {format_}")

    assert done.returncode == 3
    assert done.stderr == "gradscope: error: nowhere.npz: file not found\n"


# --- reports --------------------------------------------------------------------------------------


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return Path(shutil.copy(DIGITS, tmp_path / "model.safetensors"))


def refused(done: subprocess.CompletedProcess[str], why: str) -> bool:
    return done.returncode == 2 and why in done.stderr and done.stdout == ""


def test_a_report_never_takes_the_place_of_an_input(model: Path, tmp_path: Path) -> None:
    before = model.read_bytes()
    (tmp_path / "link.json").symlink_to(model)
    os.link(model, tmp_path / "hard.json")

    for target in (model, tmp_path / "link.json", tmp_path / "hard.json"):
        done = shell(f"gradscope weights {model} --report json={target}")
        assert refused(done, "would overwrite an input")
    assert model.read_bytes() == before


def test_nor_of_a_shard_of_a_folder_or_of_what_stands_beside(model: Path, tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"num_hidden_layers": 2}))

    shard = shell(f"gradscope weights {tmp_path} --report json={model}")
    beside = shell(f"gradscope weights {model} --report json={config}")
    inside = shell(f"gradscope weights {tmp_path} --report csv={config}")

    assert refused(shard, "would overwrite 'model.safetensors', which is not")
    assert refused(beside, "would overwrite a file of the input that is not a report")
    assert refused(inside, "would overwrite a file of the input that is not a report")
    assert json.loads(config.read_text()) == {"num_hidden_layers": 2}


@pytest.mark.parametrize(
    ("kept", "line"),
    [
        ("net.py", "explain {0}/m.pt {0}/i.png --arch {0}/net.py:factory --report json={0}/net.py"),
        (
            "base.txt",
            "explain {0}/m.pt {0}/i.png -O reference={0}/base.txt --report csv={0}/base.txt",
        ),
        (
            "names.txt",
            "explain {0}/m.pt {0}/i.png --labels {0}/names.txt --report table={0}/names.txt",
        ),
        ("log.csv", "flow '{0}/lo*.csv' --report csv={0}/log.csv"),
        ("events.out.tfevents.1.host", "flow {0} --report json={0}/events.out.tfevents.1.host"),
        ("run.parquet", "flow {0}/log.csv --report json={0}/run.parquet"),
        ("i.PNG", "weights {0} --report json={0}/i.PNG"),
    ],
)
def test_nor_of_an_input_that_is_spelled_in_another_way(
    kept: str, line: str, tmp_path: Path
) -> None:
    for name in {kept, "log.csv"}:
        (tmp_path / name).write_bytes(b"what was there")

    done = shell(f"gradscope {line.format(tmp_path)}")

    assert refused(done, "would overwrite")
    assert (tmp_path / kept).read_bytes() == b"what was there"


def test_but_of_an_earlier_report_it_does_wherever_it_lies(model: Path, tmp_path: Path) -> None:
    line = f"gradscope weights {tmp_path} --report json={tmp_path}/report.json"

    assert shell(line).returncode == shell(line).returncode == 0


def test_a_pattern_of_tensors_is_not_one_of_files(model: Path, tmp_path: Path) -> None:
    line = f"cd {tmp_path}; gradscope weights {model} --include '*w*' --report csv=weights.csv"

    assert shell(line).returncode == shell(line).returncode == 0


def test_two_reports_cannot_have_one_path(tmp_path: Path) -> None:
    both = f"--report json={tmp_path}/r --report csv={tmp_path}/r"

    assert refused(shell(f"gradscope weights {DIGITS} {both}"), "two reports cannot have the same")


@pytest.mark.parametrize(
    ("path", "why"), [("/no/such/folder/r.json", "folder not found"), ("/tmp", "is a folder")]
)
def test_a_report_that_cannot_be_written_is_refused_before_the_work(path: str, why: str) -> None:
    assert refused(shell(f"gradscope weights {DIGITS} --report json={path}"), why)


def test_paths_that_cannot_be_are_no_bug(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")

    loop = shell(f"gradscope weights {DIGITS} -q --report json={tmp_path}/loop")
    long = shell(f"gradscope weights {DIGITS} -q --report json={tmp_path}/{'a' * 300}")
    pattern = shell(f"gradscope weights {DIGITS} -q --include {'a' * 5000} --allow-empty")

    assert (loop.returncode, long.returncode) == (0, 3)
    assert "File name too long" in long.stderr
    assert pattern.returncode == 0


@pytest.mark.parametrize("command", [f"weights {DIGITS}", f"flow {SIGMOID} --fail-on never"])
def test_a_full_disk_leaves_the_old_report_as_it_was_and_ends_with_3(
    command: str, tmp_path: Path
) -> None:
    report = tmp_path / "r.json"
    line = f"gradscope {command} -q --report json={report}"
    assert shell(line).returncode == 0
    before = report.read_bytes()

    done = shell(f"ulimit -f 1; trap '' XFSZ; {line}")

    assert done.returncode == 3
    assert f"error: {report} cannot be written: File too large" in done.stderr
    assert "exit 0" in done.stdout
    assert report.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["r.json"]


def test_a_report_keeps_the_permissions_of_the_one_before_and_follows_links(
    tmp_path: Path,
) -> None:
    real = tmp_path / "real.json"
    real.write_text("")
    real.chmod(0o640)
    (tmp_path / "link.json").symlink_to(real)

    shell(f"umask 027; gradscope weights {DIGITS} --report json={tmp_path}/link.json "
          f"--report csv={tmp_path}/new.csv")  # fmt: skip

    assert (tmp_path / "link.json").is_symlink()
    assert real.stat().st_mode & 0o777 == 0o640
    assert (tmp_path / "new.csv").stat().st_mode & 0o777 == 0o640
    assert json.loads(real.read_text())["command"] == "weights"


def test_a_report_may_be_written_to_a_pipe(tmp_path: Path) -> None:
    done = shell(f"gradscope weights {DIGITS} -q --report json=>(cat > {tmp_path}/copy); sleep 0.3")
    device = shell(f"gradscope weights {DIGITS} -q --report json=/dev/null")

    assert done.returncode == device.returncode == 0
    assert Path("/dev/null").is_char_device()


# --- options that would do nothing ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "option"),
    [
        (f"flow {SIGMOID}", "--keep-going"),
        (f"flow {SIGMOID}", "--jobs 2"),
        (f"flow {SIGMOID}", "--seed 1"),
        (f"flow {SIGMOID}", "--device cpu"),
        (f"weights {DIGITS}", "--seed 1"),
        ("explain m.pt i.png", "--keep-going"),
        ("visualize m.pt", "--fail-on low"),
    ],
)
def test_a_command_has_no_option_that_it_cannot_honour(command: str, option: str) -> None:
    done = shell(f"gradscope {command} {option}")

    assert done.returncode == 2
    assert "No such option" in done.stderr


@pytest.mark.parametrize("encoding", ["ascii", "iso-8859-1", "cp437"])
@pytest.mark.parametrize("line", [*LINES, f"gradscope flow {SIGMOID}", "gradscope methods lrp"])
def test_a_stream_of_another_encoding_shows_as_much_in_the_same_columns(
    line: str, encoding: str
) -> None:
    """The sparklines' signs are told apart in ASCII too, so they may differ."""
    whole = shell(line, PYTHONIOENCODING="utf-8", COLUMNS="100")
    done = shell(f"{line} | iconv -f {encoding} -t utf-8", PYTHONIOENCODING=encoding, COLUMNS="100")

    assert "Traceback" not in done.stderr
    assert "\\u" not in done.stdout
    assert [*map(len, done.stdout.splitlines())] == [*map(len, whole.stdout.splitlines())]


def test_a_name_that_an_encoding_lacks_is_escaped_and_json_stays_json(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"große.weight": np.zeros((3, 3), np.float32)}, path)

    table = shell(f"gradscope weights {path}", PYTHONIOENCODING="ascii").stdout
    report = shell(f"gradscope weights {path} --format json", PYTHONIOENCODING="ascii").stdout

    assert "gro\\xdfe.weight" in table
    assert json.loads(report)["result"]["tensors"][0]["name"] == "große.weight"
