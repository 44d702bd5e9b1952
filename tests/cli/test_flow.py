"""``gradscope flow`` as people and scripts see it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import jsonschema
import numpy as np
import pytest

from gradscope.cli.schema import report_schema

FIXTURES = Path(__file__).parents[2] / "fixtures"
SIGMOID = FIXTURES / "sigmoid"
CNN = FIXTURES / "recorded" / "cnn"

pytestmark = pytest.mark.usefixtures("histories")


def flow(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "gradscope", "flow", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_table_names_the_stack_and_draws_every_layer() -> None:
    done = flow(SIGMOID)

    assert done.returncode == 1
    assert "CRITICAL F102 vanishing-gradient  0 … 12" in done.stdout
    assert "×0.14 towards the input" in done.stdout
    assert all(f"\n{layer} " in done.stdout for layer in range(0, 24, 2))
    assert done.stderr == ""


@pytest.mark.parametrize("path", [SIGMOID, CNN])
def test_the_json_report_matches_its_schema_and_is_the_same_every_time(path: Path) -> None:
    first, second = flow(path, "-f", "json"), flow(path, "-f", "json")

    assert first.stdout == second.stdout
    jsonschema.validate(json.loads(first.stdout), report_schema())


def test_gate_severity_window_and_steps_are_options() -> None:
    assert flow(SIGMOID, "--fail-on", "never").returncode == 0
    assert flow(SIGMOID, "--ignore", "vanishing-gradient").returncode == 0
    part = json.loads(flow(CNN, "-f", "json", "--from", 50, "--to", 99).stdout)["result"]
    assert (part["first_step"], part["last_step"], part["steps"]) == (50, 99, 50)
    params = json.loads(flow(CNN, "-f", "json", "--by", "param").stdout)["result"]
    assert "conv1.weight" in {layer["layer_name"] for layer in params["layers"]}


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["missing.npz"], 3, "missing.npz"),
        ([SIGMOID, "--window", 3], 2, "8"),
        ([SIGMOID, "--select", "nonsense"], 2, "nonsense"),
        ([SIGMOID, "--device", "cpu"], 2, "No such option: --device"),
        ([SIGMOID, "--from", 10**6], 4, "nothing was analysed"),
        ([SIGMOID, "--from", 10**6, "--allow-empty"], 0, ""),
        ([FIXTURES / "README.md"], 3, "README.md"),
    ],
)
def test_a_wrong_request_or_input_has_its_exit_code(
    arguments: list[object], code: int, said: str
) -> None:
    done = flow(*arguments)

    assert done.returncode == code, done.stdout + done.stderr
    assert said in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


def test_ambiguous_arrays_are_a_wrong_request_that_names_the_option(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", a=np.ones(20), b=np.ones(20))

    assert flow(tmp_path / "x.npz").returncode == 2
    assert "--as norms" in flow(tmp_path / "x.npz").stderr
    assert flow(tmp_path / "x.npz", "--as", "norms", "--ignore", "stagnation").returncode == 0


def test_a_norm_below_zero_is_malformed_and_located(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("step,layer,value\n1,a,0.5\n2,a,-0.5\n")

    done = flow(tmp_path / "x.csv")

    assert done.returncode == 3
    assert "'a' at step 2 is -0.5" in done.stdout


def test_a_damaged_shard_is_exit_3_and_the_rest_is_reported(tmp_path: Path) -> None:
    (tmp_path / "00000.npz").write_bytes((SIGMOID / "00000.npz").read_bytes())
    (tmp_path / "00001.npz").write_bytes((SIGMOID / "00000.npz").read_bytes()[:5000])

    done = flow(tmp_path)

    assert done.returncode == 3
    assert "vanishing-gradient" in done.stdout
    assert "00001.npz" in done.stdout


def test_beyond_a_hundred_thousand_rows_the_last_are_shown_and_coverage_says_so(
    tmp_path: Path,
) -> None:
    norms = {f"l{i}": np.exp(np.random.default_rng(i).normal(0, 0.1, 3000)) for i in range(50)}
    np.savez(tmp_path / "x.npz", steps=np.arange(3000), **norms)

    recent = json.loads(flow(tmp_path / "x.npz", "-f", "json").stdout)
    every = json.loads(flow(tmp_path / "x.npz", "-f", "json", "--series", "all").stdout)

    assert len(recent["result"]["temporal"]) == 100_000
    assert len(every["result"]["temporal"]) == 150_000
    assert any("50,000 rows" in skip["subject"] for skip in recent["coverage"]["skipped"])


def test_names_from_strangers_are_harmless(tmp_path: Path) -> None:
    np.savez(
        tmp_path / "x.npz", steps=np.arange(10), **{"a[red]\x1b[31m": np.ones(10), "b": np.ones(10)}
    )

    done = flow(tmp_path / "x.npz", "--color", "always")

    assert "a[red]\\x1b[31m" in done.stdout


def test_torch_is_not_imported(tmp_path: Path) -> None:
    code = (
        "import sys; from gradscope import analyze_flow; analyze_flow(sys.argv[1]); "
        "print('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, SIGMOID], capture_output=True, text=True, check=True
    )

    assert done.stdout.strip() == "False"
