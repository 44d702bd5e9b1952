"""``gradscope render`` as people and scripts see it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

FIXTURES = Path(__file__).resolve().parents[2] / "fixtures"
SIGMOID = str(FIXTURES / "sigmoid")


def gradscope(*arguments: str, **options) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "gradscope", *arguments],
        capture_output=True, text=True, timeout=120, env=os.environ | {"NO_COLOR": "1"}, **options,
    )  # fmt: skip


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("r") / "flow.json"
    kinds = {"json": path, "sarif": f"{path}.sarif", "table": f"{path}.txt"}
    files = [f"--report={kind}={file}" for kind, file in kinds.items()]
    done = gradscope("flow", SIGMOID, "-q", *files)
    assert done.returncode == 1
    return str(path)


def test_a_saved_report_of_a_failed_run_is_shown_and_that_is_no_failure(report: str) -> None:
    done = gradscope("render", report, "--format", "sarif", "--report", f"table={report}.2")

    assert done.returncode == 0
    assert done.stdout == Path(f"{report}.sarif").read_text()
    assert Path(f"{report}.2").read_text() == Path(f"{report}.txt").read_text()
    assert done.stderr == f"gradscope: wrote {report}.2\n"


def test_it_reads_stdin_and_anchors_annotations(report: str) -> None:
    done = gradscope("render", "-", "-f", "github", "--sarif-anchor", "train.yaml",
                     input=Path(report).read_text())  # fmt: skip

    assert done.stdout.startswith("::error file=train.yaml,line=1,title=F102 ")


@pytest.mark.parametrize(
    ("code", "arguments", "said"),
    [
        (3, ["nowhere.json"], "nowhere.json: file not found"),
        (3, [str(FIXTURES / "digits.pt")], "not JSON"),
        (2, ["REPORT", "--format", "yaml"], "unknown format 'yaml'"),
        (2, ["REPORT", "--report", "csv=REPORT"], "would overwrite an input"),
        (2, ["REPORT", "--fail-on", "low"], "No such option"),
        (2, [], "Missing argument"),
    ],
)
def test_what_cannot_be_shown_is_told(code, arguments: list[str], said: str, report: str) -> None:
    done = gradscope("render", *(a.replace("REPORT", report) for a in arguments))

    assert (done.returncode, done.stdout) == (code, "")
    assert said in done.stderr


def test_without_torch(report: str) -> None:
    program = (
        f"import sys\nfrom gradscope.cli import app\ntry: app(['render', {report!r}])\n"
        "except SystemExit: pass\nprint('torch' in sys.modules, file=sys.stderr)"
    )

    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)

    assert done.stderr.endswith("False\n")
    assert json.loads(Path(report).read_text())["gate"]["exit_code"] == 1
