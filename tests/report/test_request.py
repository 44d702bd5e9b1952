"""The one ending of every command: what findings are about, and what the run comes to."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from gradscope import analyze_weights
from gradscope.errors import InputError, UsageError
from gradscope.report.formats import renderer
from gradscope.report.model import Coverage, Report, fingerprint
from gradscope.report.request import Failures, Judged, Request, requested
from gradscope.weights.result import Examined

FIXTURES = Path(__file__).resolve().parents[2] / "fixtures"


@pytest.fixture
def with_nan(tmp_path: Path) -> Path:
    weight = np.random.default_rng(0).normal(size=(16, 16)).astype(np.float32)
    weight[3, 4] = np.nan
    save_file({"fc.weight": weight}, tmp_path / "nan.safetensors")
    return tmp_path / "nan.safetensors"


def test_each_finding_names_the_input_it_is_about_in_every_format(with_nan: Path) -> None:
    healthy = [FIXTURES / "digits.safetensors", FIXTURES / "digits.pt", FIXTURES / "pnet.pt"]

    report = analyze_weights(*healthy, with_nan)

    assert [f.input for f in report.findings if f.name == "non-finite"] == [str(with_nan)]
    table = next(line for line in renderer("table")(report).splitlines() if "non-finite" in line)
    assert table.endswith(f"in {with_nan}")
    (line,) = [r for r in renderer("csv")(report).splitlines() if "W101 non-finite" in r]
    assert line.startswith(f"fc.weight,{with_nan},")
    assert f'"input": "{with_nan}"' in renderer("jsonl")(report)


def test_a_finding_about_a_whole_checkpoint_has_a_row_of_its_own_in_csv(tmp_path: Path) -> None:
    save_file({}, tmp_path / "empty.safetensors")
    (tmp_path / "half").mkdir()
    path = tmp_path / "half" / "model-00001-of-00002.safetensors"
    save_file({"fc.weight": np.eye(8, dtype=np.float32)}, path)

    report = analyze_weights(tmp_path / "half")

    assert "missing-shard" in {f.name for f in report.findings}
    rows = renderer("csv")(report).splitlines()
    assert any(row.endswith("missing-shard") and str(tmp_path / "half") in row for row in rows)


def test_a_fingerprint_names_the_input_only_where_inputs_share_rule_and_subject(
    with_nan: Path, tmp_path: Path
) -> None:
    copy = shutil.copy(with_nan, tmp_path / "copy.safetensors")
    plain = fingerprint("W101", "fc.weight")

    alone = analyze_weights(with_nan)
    beside = analyze_weights(with_nan, FIXTURES / "digits.pt")
    twice = analyze_weights(with_nan, copy)

    assert [f.fingerprint for f in alone.findings if f.rule == "W101"] == [plain]
    assert [f.fingerprint for f in beside.findings if f.rule == "W101"] == [plain]
    assert [f.fingerprint for f in twice.findings if f.rule == "W101"] == [
        fingerprint("W101", "fc.weight", "nan.safetensors"),
        fingerprint("W101", "fc.weight", "copy.safetensors"),
    ]


def test_a_fault_of_whole_inputs_is_told_apart_by_their_names_and_not_their_folders(
    finding,
) -> None:
    paths = ("runs/1/a.pt", "runs/1/b.pt")
    faults = tuple(
        finding(subject=path, input=path, fingerprint=fingerprint("W105", "")) for path in paths
    )
    nothing = Coverage(analyzed=2, total=2, unit="tensors", bytes=0)

    report = Request("weights").report(
        Report, None, inputs=(), coverage=nothing, judged=[Judged(faults)]
    )

    assert [f.fingerprint for f in report.findings] == [
        fingerprint("W105", "", "a.pt"), fingerprint("W105", "", "b.pt")
    ]  # fmt: skip


def test_inputs_of_one_name_in_two_folders_have_two_fingerprints(
    with_nan: Path, tmp_path: Path
) -> None:
    (tmp_path / "b").mkdir()
    other = shutil.copy(with_nan, tmp_path / "b" / with_nan.name)

    report = analyze_weights(with_nan, other, select=["W101"])

    assert len({f.fingerprint for f in report.findings}) == 2


def test_findings_are_sorted_worst_first_across_inputs(with_nan: Path, tmp_path: Path) -> None:
    variance = np.array([1, 2, -1, 3], dtype=np.float32)
    save_file({"bn.running_var": variance, "bn.running_mean": variance}, tmp_path / "v.safetensors")

    report = analyze_weights(tmp_path / "v.safetensors", with_nan)

    ranks = [f.severity.rank for f in report.findings]
    assert len(set(ranks)) > 1
    assert ranks == sorted(ranks, reverse=True)


def test_an_unknown_severity_or_rule_is_refused_before_any_work() -> None:
    with pytest.raises(UsageError, match="fail_on is 'sometimes'; it is one of info, low"):
        requested(Examined, fail_on="sometimes")
    with pytest.raises(UsageError, match="no rule is called or begins with 'Z9'"):
        requested(Examined, select=["Z9"])


def test_a_failure_keeps_what_the_error_says_and_other_errors_pass() -> None:
    failures = Failures()

    with failures.caught():
        raise InputError("a.pt", "truncated", "ends early")
    with pytest.raises(UsageError), failures.caught():
        raise UsageError("wrong option")

    assert [(f.input, f.kind, f.message) for f in failures] == [("a.pt", "truncated", "ends early")]
