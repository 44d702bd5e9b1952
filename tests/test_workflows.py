"""The GitHub Action and the pre-commit hooks: their own commands, on healthy and faulty files."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from shutil import copyfile

import numpy as np
import pytest
from safetensors.numpy import save_file

pytest.importorskip("yaml", reason="PyYAML is of the test extra: run `make test`")

import yaml

from .workflows import ACTION, HOOKS, INSTALL, RUN, run_action

ROOT = Path(__file__).resolve().parents[1]
HEALTHY = str(ROOT / "fixtures" / "digits.safetensors")


@pytest.fixture
def faulty(tmp_path: Path) -> str:
    path = tmp_path / "with a space.safetensors"
    weight = np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32)
    weight[3, 4] = np.nan
    save_file({"fc.weight": weight}, path)
    return str(path)


@pytest.fixture
def program(tmp_path: Path) -> dict[str, str]:
    """An environment in which the command `gradscope` is this checkout."""
    path = tmp_path / "bin" / "gradscope"
    path.parent.mkdir()
    path.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m gradscope "$@"\n')
    path.chmod(0o755)
    found = os.environ.get("PYTHONPATH")
    plain = {k: v for k, v in os.environ.items() if not k.startswith("GRADSCOPE_")}
    return plain | {
        "PATH": f"{path.parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT) + (os.pathsep + found if found else ""),
    }


@dataclass(frozen=True)
class Ran:
    code: int
    log: str
    summary: str
    outputs: dict[str, str]

    @property
    def commands(self) -> list[str]:
        """What the runner takes for a command: lines that begin so, outside of stopped parts."""
        token = re.search(r"^::stop-commands::(\S+)$", self.log, re.MULTILINE)
        assert token
        before, _, rest = self.log.partition(token[0])
        _, _, after = rest.partition(f"::{token[1]}::")
        return [line for line in (before + after).splitlines() if line.lstrip().startswith("::")]


@pytest.fixture
def action(tmp_path: Path, program: dict[str, str]) -> Callable[..., Ran]:
    def run(files: str, **given: str) -> Ran:
        done = run_action(tmp_path, program, files=files, **given)
        output, summary = ((tmp_path / name).read_text() for name in ("output", "summary"))
        pairs = (line.split("=", 1) for line in output.splitlines())
        return Ran(done.returncode, done.stdout, summary, dict(pairs))

    return run


# --- the action ---------------------------------------------------------------------------------


def test_a_healthy_checkpoint_passes_the_action(action) -> None:
    ran = action(HEALTHY)

    assert ran.code == 0
    assert ran.outputs["exit-code"] == ran.outputs["findings"] == "0"
    assert ran.summary.startswith("## gradscope weights: PASSED")
    assert ran.commands == []


def test_a_faulty_one_fails_it_with_annotation_summary_and_report(action, faulty: str) -> None:
    ran = action(f"{HEALTHY}\n{faulty}\n")

    assert ran.code == 1
    assert ran.summary.startswith("## gradscope weights: FAILED")
    assert any(line.startswith("::error file=with a space.safetensors") for line in ran.commands)
    report = json.loads(Path(ran.outputs["report"]).read_text())
    assert [given["path"] for given in report["inputs"]] == [HEALTHY, faulty]
    assert ran.outputs["exit-code"] == str(report["gate"]["exit_code"]) == "1"
    assert ran.outputs["findings"] == str(len(report["findings"]))
    assert "FAILED" in ran.log


@pytest.mark.parametrize(
    ("given", "code"),
    [
        ({"fail_on": "never"}, 0),
        ({"args": "--select dead-units\n  --quiet"}, 0),
        ({"args": "--select nothing-of-the-kind"}, 2),
        ({"command": "wieghts"}, 2),
        ({"config": "lenient.toml"}, 0),
        ({"baseline": "missing.json"}, 2),
        ({"files": "missing.safetensors"}, 3),
        ({"args": "--include nothing"}, 4),
    ],
    ids=str,
)
def test_the_action_ends_as_the_command_does(
    action, faulty: str, tmp_path: Path, given: dict[str, str], code: int
) -> None:
    (tmp_path / "lenient.toml").write_text('[rules.non-finite]\nseverity = "low"\n')

    ran = action(**{"files": faulty, **given})

    assert ran.code == code
    assert ran.outputs["exit-code"] == str(code)
    assert ("report" in ran.outputs) == (code != 2)
    if code in (3, 4):
        assert ran.commands[0].startswith("::error ")


def test_patterns_are_expanded_and_order_is_kept(action, faulty: str, tmp_path: Path) -> None:
    copyfile(HEALTHY, tmp_path / "a.safetensors")

    ran = action("*.safetensors")
    compared = action(f"{HEALTHY}\na.safetensors", command="drift", fail_on="never")

    report = json.loads(Path(ran.outputs["report"]).read_text())
    assert [i["path"] for i in report["inputs"]] == ["a.safetensors", "with a space.safetensors"]
    assert compared.code == 0
    assert f"{HEALTHY}" in compared.summary.split("a.safetensors")[0]


def test_it_writes_sarif_where_it_is_asked_to(action, faulty: str, tmp_path: Path) -> None:
    action(faulty, sarif="weights.sarif")

    assert json.loads((tmp_path / "weights.sarif").read_text())["runs"][0]["results"]


def test_an_accepted_finding_passes(action, faulty: str, program, tmp_path: Path) -> None:
    report = action(faulty).outputs["report"]
    accepted = str(tmp_path / "accepted.json")
    create = ["gradscope", "baseline", "create", report, "--baseline", accepted]
    subprocess.run(create, env=program, check=True, capture_output=True)

    assert action(faulty, baseline=accepted).code == 0


@pytest.mark.parametrize("name", ["::error::x", "##[error]x", "$(touch it)", "`touch it`", "a\nb"])
def test_no_name_is_a_command(action, tmp_path: Path, name: str) -> None:
    save_file({name: np.full((8, 8), np.nan, np.float32)}, tmp_path / "m.safetensors")

    ran = action("m.safetensors")

    assert ran.code == 1
    assert [line[: line.index(" ")] for line in ran.commands] == ["::error"]
    assert not (tmp_path / "it").exists()


def test_an_input_is_a_word_and_never_a_command(action, faulty: str, tmp_path: Path) -> None:
    for name in ("command", "fail_on", "config", "args"):
        assert action(faulty, **{name: "x; touch it; $(touch it)"}).code in (2, 3)
    assert not (tmp_path / "it").exists()


def test_no_script_holds_an_expression_and_no_other_action_is_used() -> None:
    for step in ACTION["runs"]["steps"]:
        assert "${{" not in step["run"]
        assert "uses" not in step


def test_every_input_is_handed_on_and_every_output_is_written(action, faulty: str) -> None:
    conditions = " ".join((*RUN["env"].values(), INSTALL["if"]))
    assert all(f"inputs.{name}" in conditions for name in ACTION["inputs"])

    written = action(faulty).outputs
    for name, spec in ACTION["outputs"].items():
        assert spec["value"] == f"${{{{ steps.{RUN['id']}.outputs.{name} }}}}"
        assert written[name]


def test_it_installs_the_checkout_that_it_came_with(tmp_path: Path) -> None:
    """The commands alone: a python that writes down what it is asked to do."""
    for place in (tmp_path / "python3", tmp_path / "gradscope" / "bin" / "python"):
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text('#!/bin/sh\necho "$@" >> asked\n')
        place.chmod(0o755)
    env = os.environ | {
        "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}",
        "RUNNER_TEMP": str(tmp_path), "GITHUB_ACTION_PATH": "/the/action",
    }  # fmt: skip

    subprocess.run(
        ["bash", "-eo", "pipefail", "-c", INSTALL["run"]], cwd=tmp_path, env=env, check=True
    )

    asked = (tmp_path / "asked").read_text().splitlines()
    assert asked == [f"-m venv {tmp_path}/gradscope", "-m pip install --quiet /the/action"]


# --- what the guide shows -----------------------------------------------------------------------

GUIDE = (ROOT / "docs" / "gate.md").read_text()


def examples(language: str) -> Iterator[str]:
    return (found[1] for found in re.finditer(rf"```{language}\n(.*?)```", GUIDE, re.DOTALL))


def scripts() -> dict[str, str]:
    """The commands of the jobs that the guide shows, by where they run."""
    documents = [yaml.safe_load(text) for text in examples("yaml")]
    (gitlab,) = [job for text in documents if isinstance(text, dict) for job in text.values()
                 if isinstance(job, dict) and "script" in job]  # fmt: skip
    github = [step["run"] for steps in documents if isinstance(steps, list) for step in steps
              if "gradscope weights" in step.get("run", "")]  # fmt: skip
    (jenkins,) = examples("groovy")
    (said,) = re.findall(r"sh '([^']+)'", jenkins)
    assert gitlab["artifacts"]["reports"]["junit"] in gitlab["script"]
    assert re.findall(r"junit '([^']+)'", jenkins)[0] in said
    return {"gitlab": gitlab["script"], "jenkins": said, "github": "\n".join(github)}


@pytest.mark.parametrize("where", ["gitlab", "jenkins", "github"])
def test_a_job_of_the_guide_fails_on_a_faulty_checkpoint_alone(
    program, faulty: str, tmp_path: Path, where: str
) -> None:
    model = tmp_path / "model.safetensors"
    for source, code in ((HEALTHY, 0), (faulty, 1)):
        copyfile(source, model)
        done = subprocess.run(
            ["sh", "-c", scripts()[where]], cwd=tmp_path, env=program, capture_output=True
        )
        assert done.returncode == code, done.stderr
    for written in tmp_path.glob("weights.*"):
        assert b"model.safetensors" in written.read_bytes()
    assert list(tmp_path.glob("weights.*"))


# --- the hooks ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gradscope", "gradscope-system"])
def test_a_hook_fails_a_commit_of_a_faulty_checkpoint_alone(
    program, faulty: str, tmp_path: Path, name: str
) -> None:
    def commit(*files: str) -> int:
        words = [*shlex.split(HOOKS[name]["entry"]), *files]
        return subprocess.run(words, env=program, cwd=tmp_path, capture_output=True).returncode

    assert commit(HEALTHY) == 0
    assert commit(HEALTHY, faulty) == 1


def test_a_hook_names_a_pointer_of_git_lfs(program, tmp_path: Path) -> None:
    (tmp_path / "m.safetensors").write_text(
        f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 12345\n"
    )
    words = [*shlex.split(HOOKS["gradscope"]["entry"]), "m.safetensors"]

    done = subprocess.run(words, env=program, cwd=tmp_path, capture_output=True, text=True)

    assert done.returncode == 3
    assert "git lfs pull" in done.stderr


@pytest.mark.parametrize(
    ("path", "hooks"),
    [
        ("a/m.safetensors", {"gradscope", "gradscope-system"}),
        ("m.pt", {"gradscope-system"}),
        ("m.pt2", {"gradscope-system"}),
        ("m.pth", {"gradscope-system"}),
        ("last.ckpt", {"gradscope-system"}),
        ("a/pytorch_model-00001-of-00002.bin", {"gradscope-system"}),
        ("firmware.bin", set()),
        ("runs/a/00000.npz", set()),
        ("model.safetensors.index.json", set()),
        ("a.pt.py", set()),
    ],
)
def test_hooks_look_at_checkpoints(path: str, hooks: set[str]) -> None:
    assert {n for n, hook in HOOKS.items() if re.search(hook["files"], path)} == hooks


def test_hooks_have_what_pre_commit_requires() -> None:
    for hook in HOOKS.values():
        assert {"id", "name", "entry", "language"} <= set(hook)
        assert hook["language"] in ("python", "system")
