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


@pytest.mark.parametrize(
    ("name", "lines"),
    [
        ("t.jsonl", [f'{{"step": {t}, "grad_norm/a": 1}}' for t in range(9)] + ['{"step": 9, "g']),
        ("t.csv", ["step,loss,grad_norm/a", *(f"{t},2.0,1.0" for t in range(9)), "9,2"]),
    ],
)
def test_half_a_line_at_the_end_is_exit_3_and_the_rest_is_reported(
    name: str, lines: list[str], tmp_path: Path
) -> None:
    (tmp_path / name).write_text("\n".join(lines))

    done = flow(tmp_path / name, "-f", "json")
    report = json.loads(done.stdout)

    assert done.returncode == 3
    assert [error["kind"] for error in report["errors"]] == ["truncated"]
    assert report["result"]["last_step"] == 8

    (tmp_path / name).write_text("\n".join(lines[:-1]))
    assert flow(tmp_path / name).returncode == 0


@pytest.mark.parametrize(("records", "code"), [(40, 0), (4, 4)])
def test_a_run_of_losses_alone_is_analysed_where_there_are_enough(
    records: int, code: int, tmp_path: Path
) -> None:
    rows = "".join(f"{t},{1 / (1 + t)}\n" for t in range(records))
    (tmp_path / "t.csv").write_text("step,loss\n" + rows)

    done = flow(tmp_path / "t.csv", "-f", "json")
    report = json.loads(done.stdout)

    assert done.returncode == code
    skipped = {skip["rule"] for skip in report["coverage"]["not_evaluated"]}
    assert {"non-finite-gradient", "exploding-gradient"} <= skipped
    assert ("diverged" in skipped) == (code == 4)


@pytest.mark.parametrize("records", [1, 2, 100])
def test_the_directions_of_gradients_that_a_file_holds_are_in_the_report(
    records: int, tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)
    gradients = {
        f"step_{t}/{name}": rng.normal(size=(30, 40)) + 1 for t in range(records) for name in "ab"
    }
    np.savez(tmp_path / "v.npz", **gradients)

    report = json.loads(flow(tmp_path / "v.npz", "-f", "json").stdout)

    for layer in report["result"]["layers"]:
        found = layer["gradient_directions"]
        assert [direction["step"] for direction in found] == list(range(records))
        vectors = np.array([direction["direction_vector"] for direction in found])
        assert vectors.shape == (records, 128)
        # The cosine of the gradients themselves, to four standard errors of a sketch.
        for t in range(1, records):
            one, two = (gradients[f"step_{s}/{layer['layer_name']}"].ravel() for s in (t - 1, t))
            cosine = one @ two / np.linalg.norm(one) / np.linalg.norm(two)
            assert found[t]["consistency_score"] == pytest.approx(cosine)
            close = vectors[t - 1] @ vectors[t]
            assert abs(close - cosine) < 4 * np.sqrt((1 + cosine**2) / 128)
        assert found[0]["consistency_score"] is None


def test_against_another_run_the_table_and_the_json_say_what_differs() -> None:
    table = flow(CNN, "--against", SIGMOID)
    report = json.loads(flow(CNN, "--against", SIGMOID, "-f", "json").stdout)

    assert table.returncode == flow(CNN).returncode
    assert f"Against {SIGMOID}, steps 0–" in table.stdout
    assert "vanishing-gradient 0 … 12: none, there critical" in table.stdout
    assert report["result"]["against"]["input"] == str(SIGMOID)
    assert [given["path"] for given in report["inputs"]] == [str(CNN), str(SIGMOID)]
    jsonschema.validate(report, report_schema())
