"""The program as scripts and CI see it: exit codes, streams, and what it does not import."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from safetensors.numpy import save_file

FIXTURES = Path(__file__).resolve().parents[2] / "fixtures"
DIGITS = str(FIXTURES / "digits.safetensors")


def gradscope(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR")}
    environment |= options.pop("env", {})
    return subprocess.run(
        [sys.executable, "-m", "gradscope", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment,
        **options,
    )


@pytest.fixture
def with_nan(tmp_path: Path) -> str:
    weight = np.random.default_rng(0).normal(size=(16, 16)).astype(np.float32)
    weight[3, 4] = np.nan
    save_file({"fc.weight": weight}, tmp_path / "nan.safetensors")
    return str(tmp_path / "nan.safetensors")


@pytest.mark.parametrize(
    ("code", "arguments"),
    [
        (0, ["weights", DIGITS]),
        (0, ["rules"]),
        (0, ["rules", "dead-units"]),
        (0, ["schema", "report"]),
        (0, ["--version"]),
        (2, ["weights", DIGITS, "--no-such-option"]),
        (2, ["weights"]),
        (2, ["no-such-command"]),
        (2, ["rules", "no-such-rule"]),
        (2, ["weights", DIGITS, "--select", "W999"]),
        (2, ["weights", DIGITS, "--device", "cuda:7"]),
        (2, ["weights", DIGITS, "--fail-on", "sometimes"]),
        (2, ["weights", DIGITS, "--format", "yaml"]),
        (2, ["weights", DIGITS, "--report", "json"]),
        (2, ["weights", DIGITS, "--report", "json=/no/such/folder/r.json"]),
        (2, ["weights", DIGITS, "--jobs", "0"]),
        (3, ["weights", "no-such-file.safetensors"]),
        (3, ["weights", "/dev/null"]),
        (3, ["weights", DIGITS, "no-such-file.safetensors"]),
        (4, ["weights", DIGITS, "--include", "nothing.*"]),
        (0, ["weights", DIGITS, "--include", "nothing.*", "--allow-empty"]),
    ],
)
def test_each_outcome_has_its_exit_code_and_no_traceback(code: int, arguments: list[str]) -> None:
    done = gradscope(*arguments)

    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr + done.stdout


@pytest.mark.parametrize(("fail_on", "code"), [("critical", 1), ("info", 1), ("never", 0)])
def test_findings_fail_the_run_from_the_threshold_on(
    with_nan: str, fail_on: str, code: int
) -> None:
    done = gradscope("weights", with_nan, "--fail-on", fail_on)

    assert done.returncode == code
    assert "non-finite" in done.stdout


def test_an_unreadable_input_outranks_findings_and_the_good_ones_are_reported(
    with_nan: str,
) -> None:
    done = gradscope("weights", with_nan, "missing.safetensors", "--format", "json")

    report = json.loads(done.stdout)
    assert done.returncode == report["gate"]["exit_code"] == 3
    assert [f["name"] for f in report["findings"]] == ["non-finite"]
    assert report["errors"][0]["input"] == "missing.safetensors"


def strict(text: str) -> dict:
    def refuse(token: str) -> None:
        raise AssertionError(f"{token} is not JSON")

    return json.loads(text, parse_constant=refuse)


def test_json_is_valid_by_the_published_schema_also_with_nan(with_nan: str) -> None:
    schema = json.loads(gradscope("schema", "report").stdout)

    report = strict(gradscope("weights", with_nan, "--format", "json").stdout)

    jsonschema.Draft202012Validator(schema).validate(report)
    tensor = report["result"]["tensors"][0]
    assert tensor["statistics"]["nan_count"] == 1
    assert tensor["nonfinite"] == [{"index": [3, 4], "value": "NaN", "score": None}]


def test_the_error_envelope_is_valid_by_the_schema_too() -> None:
    schema = json.loads(gradscope("schema", "report").stdout)

    report = strict(gradscope("weights", "missing", "--format", "json").stdout)

    jsonschema.Draft202012Validator(schema).validate(report)
    assert report["result"] is None


def test_the_report_has_every_key_of_the_contract() -> None:
    report = strict(gradscope("weights", DIGITS, "--format", "json").stdout)

    envelope = {"schema_version", "tool", "command", "inputs", "coverage", "findings"}
    assert set(report) == envelope | {"result", "gate", "errors"}
    tensor = next(t for t in report["result"]["tensors"] if t["name"] == "classifier.weight")
    wanted = {"name", "file", "dtype", "shape", "numel", "role", "statistics", "units"}
    assert wanted | {"outliers", "spectrum", "health"} <= set(tensor)
    assert {
        "count", "nan_count", "posinf_count", "neginf_count", "zero_count", "zero_fraction",
        "subnormal_count", "min", "max", "abs_max", "mean", "std", "rms", "l2_norm", "skewness",
        "kurtosis", "trimmed_kurtosis", "median", "mad", "entropy_bits", "negentropy_bits",
        "quantiles",
    } <= set(tensor["statistics"])  # fmt: skip
    assert list(tensor["statistics"]["quantiles"]) == [
        "0.001", "0.01", "0.05", "0.25", "0.5", "0.75", "0.95", "0.99", "0.999",
    ]  # fmt: skip


def test_stdout_is_the_same_to_the_byte_for_any_number_of_jobs() -> None:
    once = gradscope("weights", DIGITS, "--format", "json", "--jobs", "1").stdout

    assert gradscope("weights", DIGITS, "--format", "json", "--jobs", "3").stdout == once


@pytest.mark.parametrize(
    "arguments",
    [["--version"], ["--help"], ["weights", "--help"], ["rules"], ["rules", "W101"],
     ["weights", "--bogus"], ["weights", DIGITS, "--select", "W999"]],
)  # fmt: skip
def test_help_rules_and_argument_errors_import_no_numerical_library(arguments: list[str]) -> None:
    program = (
        "import sys\nfrom gradscope.cli import app\n"
        f"try: app({arguments!r})\nexcept SystemExit: pass\n"
        "print(sorted({'torch', 'numpy', 'numba', 'scipy'} & set(sys.modules)), file=sys.stderr)"
    )

    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)

    assert done.stderr.rstrip().endswith("[]"), done.stderr


@pytest.mark.parametrize("name", ["digits.safetensors", "digits.pt", "pnet.pt"])
def test_checkpoints_are_read_without_importing_torch(name: str) -> None:
    program = (
        "import sys\nfrom gradscope.cli import app\n"
        f"try: app(['weights', {str(FIXTURES / name)!r}])\nexcept SystemExit: pass\n"
        "print('torch' in sys.modules, file=sys.stderr)"
    )

    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)

    assert done.stderr.rstrip().endswith("False"), done.stderr


@pytest.mark.parametrize("arguments", [
    ["weights", DIGITS],
    ["weights", FIXTURES / "pnet.pt", "--device", "cpu"],
    ["drift", DIGITS, FIXTURES / "digits.pt"],
    ["manifest", DIGITS],
], ids=lambda arguments: arguments[0])  # fmt: skip
def test_a_command_that_was_run_before_does_without_numba(arguments: list[str | Path]) -> None:
    program = (
        "import sys\nfrom gradscope.cli import app\n"
        f"try: app({list(map(str, arguments))!r})\nexcept SystemExit: pass\n"
        "print('numba' in sys.modules, file=sys.stderr)"
    )

    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)

    assert done.stderr.rstrip().endswith("False"), done.stderr


def test_reports_are_written_beside_stdout_and_said_on_stderr(tmp_path: Path) -> None:
    target = tmp_path / "r.json"

    done = gradscope(
        "weights", DIGITS, "--report", f"json={target}", "--report", f"csv={target}.csv"
    )

    assert json.loads(target.read_text())["command"] == "weights"
    assert (tmp_path / "r.json.csv").read_text().startswith("name,input,file,dtype")
    assert "PASSED" in done.stdout
    assert f"wrote {target}" in done.stderr


def test_jsonl_has_one_finding_a_line(with_nan: str) -> None:
    lines = gradscope("weights", with_nan, "--format", "jsonl").stdout.splitlines()

    assert [json.loads(line)["rule"] for line in lines] == ["W101"]


HOSTILE = "a\x1b[31m[bold]\n" + "x" * 10_000 + "‮"


def test_hostile_names_are_escaped_in_the_table_and_verbatim_in_json(tmp_path: Path) -> None:
    weight = np.full((4, 4), np.nan, np.float32)
    save_file({HOSTILE: weight}, tmp_path / "h.safetensors")

    table = gradscope("weights", str(tmp_path / "h.safetensors"), "--color", "never").stdout
    report = json.loads(
        gradscope("weights", str(tmp_path / "h.safetensors"), "--format", "json").stdout
    )

    assert "\x1b" not in table
    assert "‮" not in table
    assert "a\\x1b[31m[bold]\\n" in table
    assert report["result"]["tensors"][0]["name"] == HOSTILE


def test_off_a_terminal_nothing_is_truncated_or_coloured(tmp_path: Path) -> None:
    name = "model.layers.17.block_sparse_moe.experts.63.quite_long_module_name.down_proj.weight"
    save_file({name: np.eye(8, dtype=np.float32)}, tmp_path / "n.safetensors")

    done = gradscope("weights", str(tmp_path / "n.safetensors"), env={"COLUMNS": "40"})

    assert name in done.stdout
    assert "\x1b" not in done.stdout


@pytest.mark.parametrize(
    ("environment", "wish", "coloured"),
    [
        ({}, "always", True),
        ({"FORCE_COLOR": "1"}, "auto", True),
        ({"NO_COLOR": "1"}, "auto", False),
        ({"NO_COLOR": "1", "FORCE_COLOR": "1"}, "auto", False),
        ({"FORCE_COLOR": "1"}, "never", False),
    ],
)
def test_colour_follows_the_option_then_no_color_then_force_color(
    environment: dict[str, str], wish: str, coloured: bool
) -> None:
    done = gradscope("weights", DIGITS, "--color", wish, env=environment)

    assert ("\x1b[" in done.stdout) is coloured


def test_a_closed_pipe_gives_no_traceback() -> None:
    program = f"{sys.executable} -m gradscope weights {DIGITS} -v --format json | head -c 10"

    done = subprocess.run(["bash", "-c", program], capture_output=True, text=True)

    assert done.stderr == ""


def test_an_interrupt_exits_130_without_a_traceback() -> None:
    # A background job of a shell, as CI may be, starts its children with SIGINT ignored.
    slow = (
        "import signal, time, gradscope.weights.analysis as a\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "a.analyze_weights = lambda *p, **o: (print('ready', flush=True), time.sleep(60))\n"
        f"from gradscope.cli import app\napp(['weights', {DIGITS!r}])"
    )
    with subprocess.Popen(
        [sys.executable, "-c", slow], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=90)

    assert process.returncode == 130
    assert "Traceback" not in stderr


def test_a_bug_is_exit_70_in_one_line_and_a_traceback_with_debug() -> None:
    program = (
        "import sys, gradscope.weights.analysis as a\n"
        "def broken(*p, **o): raise RuntimeError('planted')\n"
        "a.analyze_weights = broken\n"
        "from gradscope.cli import app\napp(sys.argv[1:])"
    )

    plain, debug = (
        subprocess.run(
            [sys.executable, "-c", program, "weights", DIGITS, *more],
            capture_output=True,
            text=True,
        )
        for more in ([], ["--debug"])
    )

    assert plain.returncode == debug.returncode == 70
    assert len(plain.stderr.splitlines()) == 1
    assert "planted" in plain.stderr
    assert "Traceback" in debug.stderr


def test_headers_only_says_which_rules_were_not_evaluated() -> None:
    report = json.loads(gradscope("weights", DIGITS, "--headers-only", "--format", "json").stdout)

    assert report["gate"]["exit_code"] == 0
    assert "non-finite" in {n["rule"] for n in report["coverage"]["not_evaluated"]}
    assert report["result"]["tensors"][0]["statistics"] is None
    assert report["result"]["health"] is None


def test_the_kernels_are_cached_elsewhere_when_the_package_cannot_be_written(
    tmp_path: Path,
) -> None:
    import shutil

    import gradscope as package

    shutil.copytree(Path(package.__file__).parent, tmp_path / "lib" / "gradscope",
                    ignore=shutil.ignore_patterns("__pycache__"))  # fmt: skip
    blocked = tmp_path / "lib" / "gradscope" / "statistics" / "__pycache__"
    blocked.write_text("a file where numba wants its folder")
    blocked_home = tmp_path / "home"
    blocked_home.write_text("no home either")

    done = gradscope(
        "weights", DIGITS, "-q",
        env=dict.fromkeys(("HOME", "XDG_CACHE_HOME"), str(blocked_home))
        | {"PYTHONPATH": str(tmp_path / "lib")},
        cwd=tmp_path,
    )  # fmt: skip

    assert done.returncode == 0, done.stderr
