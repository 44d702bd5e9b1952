"""The baseline: known findings fail nothing, worse ones do, and nothing unseen is forgotten."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from gradscope import analyze_flow, analyze_weights
from gradscope.errors import UsageError
from gradscope.report.accepting import created, pruned, updated
from gradscope.report.baseline import (
    Baseline,
    compared,
    measures,
    read_baseline,
    write_baseline,
)
from gradscope.report.model import InputFailure

FIXTURES = Path(__file__).resolve().parents[2] / "fixtures"


def states(report_of, before, *now, **changed: Any) -> list[str]:
    """The states of findings against the baseline of others."""
    baseline = created(report_of(before)).model_copy(update=changed)
    return [f.state for f in compared(now, "weights", baseline).findings]


def test_a_finding_is_known_by_rule_and_subject_whatever_its_values(report_of, finding) -> None:
    found = finding()

    assert states(report_of, found, finding(message="other words", threshold=0.2)) == ["unchanged"]
    assert states(report_of, found, finding(subject="other")) == ["new"]
    assert states(report_of, found, finding(rule="W106", name="duplicate-units")) == ["new"]
    assert states(report_of, found, finding(severity="medium")) == ["unchanged"]
    assert states(report_of, found, found, found) == ["unchanged", "new"]


def test_another_commands_entries_are_not_asked(report_of, finding) -> None:
    baseline = created(report_of(finding(), command="drift"))

    assert compared([finding()], "weights", baseline).findings[0].state == "new"
    assert compared([], "weights", baseline).gone == ()


@pytest.mark.parametrize(
    ("threshold", "then", "now", "worse"),
    [
        (0.3, 0.5, 0.5, False),
        (0.3, 0.5, 0.55, False),
        (0.3, 0.5, 0.56, True),
        (0.3, 0.5, 0.31, False),
        (2.0, 1.0, 0.95, False),  # below its threshold, lower is worse
        (2.0, 1.0, 0.8, True),
        (2.0, 1.0, 1.5, False),
        (0.0, -1.0, -2.0, True),
        (0.0, -2.0, -1.0, False),
        (None, 5.0, 6.0, True),
        (0.3, 100, 109, False),
        (0.3, 100, 111, True),
        (500.0, 100, 111, True),  # a count is worse the greater it is
        (0.3, 0, 1, True),
        (0.3, float("inf"), float("inf"), False),
        (0.3, 1.0, float("inf"), True),
        (0.3, float("inf"), 1.0, False),
        (0.3, 1.0, float("nan"), True),
        (0.3, float("nan"), 1.0, False),
        (0.3, float("nan"), float("nan"), False),
    ],
)
def test_worse_is_farther_from_the_threshold_by_more_than_a_tenth(
    report_of, finding, threshold, then, now, worse
) -> None:
    def measured(value):
        return finding(threshold=threshold, evidence={"why": "text", "measure": value, "other": 1})

    found = states(report_of, measured(then), measured(now))

    assert found == ["worsened" if worse else "unchanged"]


def test_more_severe_is_worse_and_so_is_a_greater_share(report_of, finding) -> None:
    before = finding("medium", evidence={"rows": 5, "affected_fraction": 0.2})

    assert states(report_of, before, finding("high", evidence=before.evidence)) == ["worsened"]
    wider = finding("medium", evidence={"rows": 5, "affected_fraction": 0.4})
    assert states(report_of, before, wider) == ["worsened"]


def test_the_tolerance_can_be_set_for_all_and_for_one(report_of, finding) -> None:
    before, now = (finding(evidence={"measure": value}) for value in (1.0, 1.5))
    baseline = created(report_of(before))
    (entry,) = baseline.findings

    assert states(report_of, before, now, tolerance=0.6) == ["unchanged"]
    own = entry.model_copy(update={"tolerance": 0.6})
    assert states(report_of, before, now, findings=(own,)) == ["unchanged"]
    strict = entry.model_copy(update={"tolerance": 0.0})
    assert states(report_of, before, now, tolerance=0.6, findings=(strict,)) == ["worsened"]


def test_numbers_that_a_saved_report_spells_are_measures(finding) -> None:
    assert measures(finding(evidence={"a": "text", "b": "Infinity"})) == {"b": float("inf")}


# --- what a run says ------------------------------------------------------------------------------


@pytest.fixture
def model(tmp_path: Path):
    """Writes a checkpoint some of whose elements are NaN."""

    def write(name: str, nans: int, other: int = 0) -> Path:
        weight = np.random.default_rng(0).normal(size=(2, 16, 16)).astype(np.float32)
        weight[0].flat[:nans] = np.nan
        weight[1].flat[:other] = np.nan
        save_file({"a.weight": weight[0], "b.weight": weight[1]}, tmp_path / name)
        return tmp_path / name

    return write


def accepted(tmp_path: Path, *reports: Any) -> Path:
    baseline = Baseline()
    for report in reports:
        baseline = updated(baseline, report, accept_new=True)
    path = tmp_path / f"{len(baseline.findings)}.json"
    write_baseline(path, baseline)
    return path


def test_known_findings_pass_also_in_the_runs_next_checkpoint(model, tmp_path: Path) -> None:
    baseline = accepted(tmp_path, analyze_weights(model("step-1000.safetensors", 10)))

    same = analyze_weights(model("step-2000.safetensors", 10), baseline=baseline)
    worse = analyze_weights(model("step-3000.safetensors", 12), baseline=baseline)
    more = analyze_weights(model("step-4000.safetensors", 10, 1), baseline=baseline)

    assert [f.state for f in same.findings] == ["unchanged"]
    assert (same.gate.exit_code, same.gate.notes) == (0, ())
    assert ([f.state for f in worse.findings], worse.gate.exit_code) == (["worsened"], 1)
    # What is new stands before what is known.
    assert ([f.state for f in more.findings], more.gate.exit_code) == (["new", "unchanged"], 1)


def test_a_missing_shard_is_known_in_the_next_folder_too(tmp_path: Path) -> None:
    for step in ("step-1", "step-2"):
        (tmp_path / step).mkdir()
        path = tmp_path / step / "model-00001-of-00002.safetensors"
        save_file({"fc.weight": np.eye(8, dtype=np.float32)}, path)
    first, second = (analyze_weights(tmp_path / step) for step in ("step-1", "step-2"))

    assert [f.fingerprint for f in first.findings] == [f.fingerprint for f in second.findings]


def test_of_two_inputs_that_share_rule_and_subject_each_has_its_entry(model, tmp_path) -> None:
    one, two = model("one.safetensors", 3), model("two.safetensors", 3)
    baseline = accepted(tmp_path, analyze_weights(one, two))
    alone = accepted(tmp_path, analyze_weights(one))

    assert analyze_weights(two, one, baseline=baseline).gate.exit_code == 0
    assert analyze_weights(one, baseline=baseline).gate.exit_code == 0
    both = analyze_weights(one, two, baseline=alone)
    assert [(Path(f.input).name, f.state) for f in both.findings] == [
        ("two.safetensors", "new"), ("one.safetensors", "unchanged")
    ]  # fmt: skip


def test_what_is_gone_is_told_by_a_run_that_would_have_found_it(model, tmp_path: Path) -> None:
    baseline = accepted(tmp_path, analyze_weights(model("m.safetensors", 3, 3)))
    fixed = model("m.safetensors", 3)

    def notes(**options: Any) -> tuple[str, ...]:
        return analyze_weights(fixed, baseline=baseline, **options).gate.notes

    (note,) = notes()
    assert note.startswith("1 accepted finding of ")
    assert "is gone (W101 'b.weight'); `gradscope baseline prune` removes them" in note
    assert notes(exclude=["b*"]) == notes(select=["W105"]) == notes(headers_only=True) == ()
    assert notes(select=["W101"]) == (note,)


# --- changing it ----------------------------------------------------------------------------------


def subjects(baseline: Baseline) -> list[str]:
    return [entry.subject for entry in baseline.findings]


def test_create_accepts_everything_but_what_is_allowed_anyway(report_of, finding) -> None:
    report = report_of(
        finding("info", "b"), finding(subject="a"), finding(subject="c", allowed="x")
    )

    assert subjects(created(report)) == ["a", "b"]


def test_prune_only_drops_and_update_adds_what_is_new_only_when_told(report_of, finding) -> None:
    before = created(report_of(finding(subject="a"), finding(subject="gone")))
    report = report_of(finding(subject="a"), finding(subject="new"))

    assert subjects(pruned(before, report)) == ["a"]
    assert subjects(updated(before, report, accept_new=False)) == ["a"]
    assert subjects(updated(before, report, accept_new=True)) == ["a", "new"]


def test_update_keeps_what_became_better_and_never_drifts(report_of, finding) -> None:
    def measured(value: int):
        return finding(evidence={"rows": value})

    before = created(report_of(measured(100)))

    def after(value: int, accept_new: bool = False) -> float:
        (entry,) = updated(before, report_of(measured(value)), accept_new).findings
        return entry.measures["rows"]

    assert [after(80), after(105), after(200)] == [80, 100, 100]
    assert after(200, accept_new=True) == 200
    assert pruned(before, report_of(measured(80))).findings == before.findings


def test_update_keeps_a_tolerance_that_someone_set(report_of, finding) -> None:
    before = created(report_of(finding()))
    own = before.findings[0].model_copy(update={"tolerance": 0.5})
    before = before.model_copy(update={"findings": (own,)})

    assert updated(before, report_of(finding()), accept_new=False).findings == (own,)


def test_other_commands_entries_are_left_alone(report_of, finding) -> None:
    before = created(report_of(finding(subject="d"), command="drift"))

    both = updated(before, report_of(finding(subject="w")), accept_new=True)

    assert subjects(both) == ["d", "w"]
    assert subjects(pruned(both, report_of())) == ["d"]
    assert set(both.runs) == {"drift", "weights"}


UNREAD = InputFailure(input="x.pt", kind="missing", message="file not found")


def test_a_run_of_less_may_remove_nothing(model, report_of, finding) -> None:
    whole = analyze_weights(model("a.safetensors", 3, 3), model("b.safetensors", 0))
    a, b = (i.path for i in whole.inputs)
    before = created(whole)
    fixed = model("c.safetensors", 0)

    for why, report in {
        "looked at a part only": analyze_weights(a, b, exclude=["b*"]),
        "looked at 1 input of 2": analyze_weights(a),
        "did not evaluate non-finite": analyze_weights(fixed, b, ignore=["W101"]),
        "did not evaluate non-finite, of": analyze_weights(a, b, headers_only=True),
        "not everything could be read": analyze_weights(a, b, "missing.pt"),
    }.items():  # fmt: skip
        for change in (pruned, lambda old, new: updated(old, new, accept_new=True)):
            with pytest.raises(UsageError, match=f"may not remove entries: .*{why}"):
                change(before, report)
    with pytest.raises(UsageError, match="could not read everything"):
        created(report_of(finding(), errors=(UNREAD,)))
    assert pruned(before, whole) == before


def test_a_run_that_is_always_of_a_part_may_prune_by_the_same_part(model) -> None:
    path = model("a.safetensors", 3, 3)
    before = created(analyze_weights(path, include=["a*"]))

    fixed = analyze_weights(model("a.safetensors", 0, 3), include=["a*"])

    assert pruned(before, fixed).findings == ()


def test_flow_has_baselines_as_well() -> None:
    report = analyze_flow(FIXTURES / "sigmoid")
    before = created(report)

    assert all(f.state == "unchanged" for f in compared(report.findings, "flow", before).findings)
    with pytest.raises(UsageError, match="--to 100"):
        pruned(before, analyze_flow(FIXTURES / "sigmoid", to_step=100))


# --- files ----------------------------------------------------------------------------------------


def test_it_reads_back_and_has_a_line_an_entry(report_of, finding, tmp_path: Path) -> None:
    strange = finding(subject="\ud800|\n", evidence={"x": float("nan")})
    before = created(report_of(strange, finding(), finding(subject="b")))
    path = tmp_path / "b.json"

    write_baseline(path, before)

    again = read_baseline(path)
    assert [e.subject for e in again.findings] == [e.subject for e in before.findings]
    write_baseline(tmp_path / "c.json", again)
    assert (tmp_path / "c.json").read_bytes() == path.read_bytes()
    assert sum(line.startswith('  {"command"') for line in path.read_text().splitlines()) == 3


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (None, "does not exist; `gradscope baseline create REPORT.json --baseline"),
        ("", "is not a baseline: "),
        ("[]", "is not a baseline: "),
        ("{", "is not a baseline: "),
        ('{"findings": [{}]}', "'findings.0.command': field required"),
        ('{"tolerance": -1}', "'tolerance': input should be greater"),
        ('{"entries": []}', "'entries': extra inputs are not permitted"),
        ('{"schema_version": "2.0"}', "written by a newer gradscope"),
        ('{"schema_version": "1.1", "later": {}}', r"written by a newer gradscope \(schema 1\.1\)"),
        ('{"schema_version": 1}', "'schema_version': input should be a valid string"),
    ],
)
def test_a_malformed_one_is_a_wrong_request(tmp_path: Path, text, why) -> None:
    if text is not None:
        (tmp_path / "b.json").write_text(text)

    with pytest.raises(UsageError, match=why):
        analyze_weights(FIXTURES / "digits.pt", baseline=tmp_path / "b.json")


def test_a_report_is_no_baseline(tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text((FIXTURES / "report-1.0.json").read_text())

    with pytest.raises(UsageError, match="is not a baseline"):
        read_baseline(tmp_path / "r.json")
    assert json.loads((tmp_path / "r.json").read_text())["gate"]["exit_code"] == 1
