"""``gradscope baseline`` and ``--baseline``, from the first red run to the last fixed finding."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file


def gradscope(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "gradscope", *arguments],
        capture_output=True, text=True, timeout=120, cwd=folder,
    )  # fmt: skip


def model(folder: Path, *broken: str) -> None:
    """A checkpoint of three layers, some of them with a NaN."""
    generator = np.random.default_rng(0)
    tensors = {}
    for name in ("a", "b", "c"):
        weight = generator.normal(size=(16, 16)).astype(np.float32)
        if name in broken:
            weight[0, 0] = np.nan
        tensors[f"{name}.weight"] = weight
    save_file(tensors, folder / "m.safetensors")


def analysed(folder: Path, *more: str) -> subprocess.CompletedProcess[str]:
    return gradscope(folder, "weights", "m.safetensors", "--report", "json=r.json", *more)


def test_a_baseline_lives_from_the_first_run_to_the_last_fault(tmp_path: Path) -> None:
    model(tmp_path, "a", "b")
    assert analysed(tmp_path).returncode == 1

    made = gradscope(tmp_path, "baseline", "create", "r.json", "--baseline", "ok.json")
    assert (made.returncode, made.stdout) == (0, "ok.json: 2 accepted findings (+2 -0)\n")
    assert analysed(tmp_path, "--baseline", "ok.json").returncode == 0

    model(tmp_path, "a", "c")  # b is fixed, c breaks
    done = analysed(tmp_path, "--baseline", "ok.json", "--format", "json")
    states = {f["subject"]: f["state"] for f in json.loads(done.stdout)["findings"]}
    assert (done.returncode, states) == (1, {"a.weight": "unchanged", "c.weight": "new"})
    assert "note: 1 accepted finding of ok.json is gone (W101 'b.weight')" in done.stderr

    pruned = gradscope(tmp_path, "baseline", "prune", "r.json", "--baseline", "ok.json")
    assert pruned.stdout == (
        "ok.json: 1 accepted finding (+0 -1); not accepted: 1 new (update --accept-new does)\n"
    )
    assert analysed(tmp_path, "--baseline", "ok.json").returncode == 1

    same = gradscope(tmp_path, "baseline", "update", "r.json", "--baseline", "ok.json")
    assert same.stdout == pruned.stdout.replace("-1", "-0")
    new = gradscope(tmp_path, "baseline", "update", "r.json", "--baseline", "ok.json",
                    "--accept-new")  # fmt: skip
    assert new.stdout == "ok.json: 2 accepted findings (+1 -0)\n"
    assert analysed(tmp_path, "--baseline", "ok.json").returncode == 0


def test_the_configuration_names_it_for_every_command(tmp_path: Path) -> None:
    model(tmp_path, "a")
    analysed(tmp_path)
    (tmp_path / "gradscope.toml").write_text('baseline = "ok.json"\n')

    missing = analysed(tmp_path)
    gradscope(tmp_path, "baseline", "create", "r.json")

    assert missing.returncode == 2
    assert "the baseline ok.json does not exist" in missing.stderr
    assert analysed(tmp_path).returncode == 0
    assert analysed(tmp_path, "--isolated").returncode == 1


@pytest.mark.parametrize(
    ("code", "line", "said"),
    [
        (2, "create r.json --baseline ok.json", "ok.json is there already; `gradscope baseline up"),
        (2, "create r.json", "name the file with --baseline FILE"),
        (2, "create r.json --baseline new.json --accept-new", "--accept-new belongs to update"),
        (2, "update r.json --baseline new.json", "the baseline new.json does not exist"),
        (2, "update r.json --baseline r.json", "r.json is not a baseline"),
        (2, "forget r.json --baseline ok.json", "Invalid value"),
        (3, "update nowhere.json --baseline ok.json", "nowhere.json: file not found"),
        (3, "update ok.json --baseline ok.json", "not a report of gradscope"),
        (2, "prune part.json --baseline ok.json", "it looked at a part only (--exclude b*)"),
        (3, "create r.json --baseline no/b.json", "no/b.json cannot be written"),
    ],
)
def test_what_cannot_be_is_told_and_changes_nothing(tmp_path, code, line, said) -> None:
    model(tmp_path, "a", "b")
    analysed(tmp_path)
    gradscope(tmp_path, "baseline", "create", "r.json", "--baseline", "ok.json")
    if "part.json" in line:
        analysed(tmp_path, "--exclude", "b*", "--report", "json=part.json")
    before = (tmp_path / "ok.json").read_bytes()

    done = gradscope(tmp_path, "baseline", *line.split())

    assert (done.returncode, done.stdout) == (code, "")
    assert said in done.stderr
    assert (tmp_path / "ok.json").read_bytes() == before
    assert not (tmp_path / "new.json").exists()


def test_no_report_is_written_over_it(tmp_path: Path) -> None:
    model(tmp_path, "a")
    analysed(tmp_path)
    gradscope(tmp_path, "baseline", "create", "r.json", "--baseline", "ok.json")

    done = analysed(tmp_path, "--baseline", "ok.json", "--report", "json=ok.json")

    assert done.returncode == 2
    assert "would overwrite an input" in done.stderr
