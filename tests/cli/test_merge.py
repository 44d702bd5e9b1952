"""Shares of a run through the command line: parts in every format, and the guide's scripts."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jsonschema
import numpy as np
import pytest
from typer.testing import CliRunner, Result

from gradscope.cli import app
from gradscope.cli.schema import report_schema

from ..weights.checkpoints import transformer, write

GUIDE = (Path(__file__).resolve().parents[2] / "docs" / "shards.md").read_text()


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, [*arguments, "--isolated"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, its report, and those of three jobs."""
    made = tmp_path_factory.mktemp("parts")
    tensors = transformer(layers=2)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    model = str(write(made / "m.safetensors", tensors))
    run("weights", model, "--report", f"json={made / 'whole.json'}")
    for job in range(3):
        run("weights", model, "--shard", f"{job}/3", "--report", f"json={made / f'{job}.json'}")
    return made


def paths(folder: Path) -> list[str]:
    return [str(folder / f"{job}.json") for job in (2, 0, 1)]


def test_merge_writes_the_bytes_of_one_run_in_every_format(folder: Path) -> None:
    for format_ in ("json", "table", "csv", "sarif", "markdown", "junit"):
        merged = run("merge", *paths(folder), "-f", format_)
        rendered = CliRunner().invoke(app, ["render", str(folder / "whole.json"), "-f", format_])
        assert (merged.exit_code, merged.stdout) == (0, rendered.stdout), merged.stderr


def test_partial_and_merged_reports_are_what_the_schema_says(folder: Path) -> None:
    schema = jsonschema.Draft202012Validator(report_schema())
    for path in paths(folder):
        schema.validate(json.loads(Path(path).read_text()))
    merged = json.loads(run("merge", *paths(folder), "-f", "json").stdout)
    schema.validate(merged)
    assert "partial" not in merged


@pytest.mark.parametrize(
    ("format_", "said"),
    [
        ("table", "\nPART 0/3  "),
        ("markdown", "## gradscope weights: PART 0/3\n"),
        ("html", "Part 0/3"),
        ("model-card", "This is part 0/3 of a run, and no verdict."),
        ("github", "title=part 0/3"),
        ("sarif", '"id": "gradscope/weights/0/3/"'),
        ("junit", "waits for `gradscope merge`"),
    ],
)
def test_no_format_takes_a_part_for_the_whole(format_: str, said: str, folder: Path) -> None:
    if format_ == "html":
        pytest.importorskip("jinja2", reason="of the extra html")
    shown = CliRunner().invoke(app, ["render", str(folder / "0.json"), "-f", format_])
    assert shown.exit_code == 0, shown.output
    assert said in shown.stdout
    assert not re.search(
        r"\bpassed\b", re.sub(r"<style>.*?</style>", "", shown.stdout, flags=re.S), re.I
    )


def test_a_part_of_a_folder_of_another_machine_needs_no_file(folder, tmp_path, monkeypatch) -> None:
    for job in range(3):
        (tmp_path / f"{job}.json").write_bytes((folder / f"{job}.json").read_bytes())
    (folder / "m.safetensors").rename(folder / "gone")
    try:
        assert (
            run("merge", *paths(tmp_path), "-f", "json").stdout
            == (folder / "whole.json").read_text()
        )
    finally:
        (folder / "gone").rename(folder / "m.safetensors")


# -- the guide ------------------------------------------------------------------------------------


def scripts() -> dict[str, list[tuple[str, dict[str, str]]]]:
    """What each way of the guide runs: lines of bash, with the variables of each job."""
    console = re.findall(r"^\$ (.*)$", GUIDE, re.M)
    measure, judge = re.findall(r"- run: (.*)$", GUIDE, re.M)
    measured = [measure.replace("${{ matrix.part }}", str(part)) for part in range(4)]
    share, merge = re.findall(r"```bash\n(.*?)```", GUIDE, re.S)
    first, last = re.findall(r"--array=(\d+)-(\d+)", share)[0]
    return {
        "console": [(line, {}) for line in console],
        "matrix": [*((line, {}) for line in measured), (judge, {"GITHUB_STEP_SUMMARY": "s.md"})],
        "slurm": [*((share, {"SLURM_ARRAY_TASK_ID": n}) for n in (first, last)), (merge, {})],
    }


@pytest.mark.parametrize("way", scripts())
def test_the_scripts_of_the_guide_run(way: str, tmp_path: Path) -> None:
    write(tmp_path / "MODEL", {"a.weight": np.eye(8, dtype=np.float32)} | transformer(layers=1))
    program = tmp_path / "bin" / "gradscope"
    program.parent.mkdir()
    starter = "import sys; from gradscope.cli import main; sys.argv[0] = 'gradscope'; main()"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{starter}" "$@"\n')
    program.chmod(0o755)
    path = f"{program.parent}{os.pathsep}{os.environ['PATH']}"
    *jobs, judge = scripts()[way]
    for line, given in jobs:
        done = _bash(line, tmp_path, {"PATH": path} | given)
        assert done.returncode == 0, done.stderr
    done = _bash(judge[0], tmp_path, {"PATH": path} | judge[1])
    if way == "slurm":  # of sixteen jobs the first and the last
        assert done.returncode == 3
        assert "14 parts are missing" in done.stderr
    else:
        assert done.returncode == 0, done.stderr
        assert "PASSED" in done.stdout


def _bash(line: str, folder: Path, given: dict[str, str]) -> subprocess.CompletedProcess[str]:
    shell = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", line]
    env = os.environ | given
    return subprocess.run(shell, cwd=folder, env=env, capture_output=True, text=True)


def test_a_comparison_is_shared_out_and_judged_by_merge(folder: Path, tmp_path: Path) -> None:
    base, new = str(folder / "m.safetensors"), str(tmp_path / "new.safetensors")
    write(Path(new), {name: 2 * tensor for name, tensor in transformer(layers=2).items()})
    asked = ["drift", base, new, "--expect", "identical"]
    whole = run(*asked, "-f", "json")
    parts = [str(tmp_path / f"{job}.json") for job in range(3)]
    for job, path in enumerate(parts):
        done = run(*asked, "--shard", f"{job}/3", "--report", f"json={path}")
        assert done.exit_code == 0
        assert f"PART {job}/3" in done.stdout

    merged = run("merge", *reversed(parts), "-f", "json")

    assert (merged.exit_code, merged.stdout) == (1, whole.stdout)
    jsonschema.Draft202012Validator(report_schema()).validate(
        json.loads(Path(parts[0]).read_text())
    )
