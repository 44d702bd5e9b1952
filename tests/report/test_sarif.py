"""SARIF: valid by OASIS's schema, and by what GitHub's code scanning asks beyond it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradscope import analyze_flow, analyze_weights
from gradscope.report.formats import FILE, Display, renderer
from gradscope.report.model import AnyReport, Finding, InputFailure, Report
from gradscope.report.severity import Severity

FIXTURES = Path(__file__).resolve().parents[2] / "fixtures"
SCHEMA = jsonschema.Draft4Validator(json.loads((FIXTURES / "sarif-2.1.0.json").read_text()))


def sarif(report, display: Display = FILE) -> dict:
    """The only run of a log, after schema and GitHub were asked."""
    text = renderer("sarif")(report, display)
    assert ": null" not in text
    log = json.loads(text)
    SCHEMA.validate(log)
    (run,) = log["runs"]
    for result in run["results"]:
        accepted_by_github(result, run["tool"]["driver"]["rules"])
    assert run["automationDetails"]["id"].endswith("/")
    assert len(run["results"]) <= 5_000
    return run


def accepted_by_github(result: dict, rules: list[dict]) -> None:
    (location,) = result["locations"]
    uri = location["physicalLocation"]["artifactLocation"]["uri"]
    assert re.fullmatch(r"(?!/|\.\./)[A-Za-z0-9_.~/%-]+", uri), uri
    assert location["physicalLocation"]["region"] == {
        "startLine": 1, "startColumn": 1, "endLine": 1, "endColumn": 1
    }  # fmt: skip
    assert result["message"]["text"].strip()
    assert re.fullmatch(
        r"[0-9a-f]{32}:\d+", result["partialFingerprints"]["primaryLocationLineHash"]
    )
    rule = rules[result["ruleIndex"]]
    assert rule["id"] == result["ruleId"]
    assert all(
        rule[text]["text"].strip() for text in ("shortDescription", "fullDescription", "help")
    )


def test_the_schema_can_say_no(report_of, finding) -> None:
    log = json.loads(renderer("sarif")(report_of(finding())))
    log["runs"][0]["results"][0]["level"] = "fatal"

    with pytest.raises(jsonschema.ValidationError):
        SCHEMA.validate(log)


def test_reports_of_real_inputs_are_valid(tmp_path: Path) -> None:
    run = sarif(analyze_flow(FIXTURES / "sigmoid"))

    assert [r["ruleId"] for r in run["results"]][:1] == ["F102"]
    assert run["results"][0]["locations"][0]["logicalLocations"][0]["kind"] == "layer"
    assert sarif(analyze_weights(FIXTURES / "digits.safetensors"))["results"] == []
    missing = sarif(analyze_weights(tmp_path / "missing.pt"))["invocations"][0]
    assert (missing["executionSuccessful"], missing["exitCode"]) == (False, 3)
    assert "file not found" in missing["toolExecutionNotifications"][0]["message"]["text"]


def test_severities_map_onto_three_levels(report_of, finding) -> None:
    run = sarif(report_of(*(finding(s) for s in reversed(Severity))))

    assert [r["level"] for r in run["results"]] == ["error", "error", "warning", "note", "note"]


def test_a_known_finding_is_suppressed_with_the_reason_and_the_others_say_their_state(
    report_of, finding
) -> None:
    run = sarif(
        report_of(
            finding(state="worsened"),
            finding(state="unchanged", subject="b"),
            finding(state="unchanged", subject="c", allowed="a constant"),
        )
    )

    assert [r["baselineState"] for r in run["results"]] == ["updated", "unchanged", "unchanged"]
    assert [r.get("suppressions", [{}])[0].get("justification") for r in run["results"]] == [
        None, "in the baseline", "a constant"
    ]  # fmt: skip
    assert "baselineState" not in sarif(report_of(finding()))["results"][0]


def test_two_findings_of_one_place_have_two_hashes(report_of, finding) -> None:
    first, second = sarif(report_of(finding(), finding()))["results"]

    assert (
        first["partialFingerprints"]["gradscope/v1"]
        == second["partialFingerprints"]["gradscope/v1"]
    )
    assert second["partialFingerprints"]["primaryLocationLineHash"].endswith(":2")


@pytest.mark.parametrize(
    ("input_", "root", "uri"),
    [
        ("runs/m.pt", "/repo", "runs/m.pt"),
        ("/repo/runs/m.pt", "/repo", "runs/m.pt"),
        ("../data/m.pt", "/repo", "data/m.pt"),
        ("../../repo/m.pt", "/home/repo", "repo/m.pt"),
        ("/data/m.pt", "/repo", "data/m.pt"),
        ("/repository/m.pt", "/repo", "repository/m.pt"),
        ("C:\\models\\m.pt", "", "models/m.pt"),
        ("a b/é.pt", "/repo", "a%20b/%C3%A9.pt"),
    ],
)
def test_a_place_is_relative_to_the_checkout(report_of, finding, input_, root, uri) -> None:
    run = sarif(report_of(finding(input=input_)), Display(root=root))

    place = run["results"][0]["locations"][0]["physicalLocation"]["artifactLocation"]
    assert place == {"uri": uri, "uriBaseId": "%SRCROOT%"}


def test_the_anchor_takes_the_place_of_a_model_that_is_not_in_the_repository(
    report_of, finding
) -> None:
    run = sarif(report_of(finding()), Display(anchor="model.dvc"))

    location = run["results"][0]["locations"][0]
    assert location["physicalLocation"]["artifactLocation"]["uri"] == "model.dvc"
    assert run["results"][0]["properties"]["input"] == "runs/m.safetensors"


def test_of_more_than_github_keeps_the_worst_are_shown_and_the_rest_is_counted(
    report_of, finding
) -> None:
    many = [finding("high", f"t.{i}") for i in range(4_999)]

    run = sarif(report_of(*many, *(finding("low", f"u.{i}") for i in range(12))))

    assert len(run["results"]) == 5_000
    assert "11 findings left out, the least severe or known" in json.dumps(run["invocations"])


def test_a_rule_that_is_not_installed_is_described_by_its_finding(report_of, finding) -> None:
    run = sarif(report_of(finding(rule="ACME1", name="acme-policy", threshold=None)))

    assert run["tool"]["driver"]["rules"][0]["name"] == "AcmePolicy"


def test_an_unreadable_input_and_an_empty_run_are_no_success(report_of, finding) -> None:
    unread = InputFailure(input="x.pt", kind="missing", message="file not found")

    for report in (report_of(finding(), errors=(unread,)), report_of(analyzed=0)):
        assert sarif(report)["invocations"][0]["executionSuccessful"] is False
    assert sarif(report_of(finding()))["invocations"][0]["executionSuccessful"] is True


@settings(deadline=None, max_examples=60)
@given(name=st.text(alphabet=st.characters(), min_size=1, max_size=40))
def test_no_name_makes_it_invalid(name: str) -> None:
    report: AnyReport = Report.model_validate(json.loads(_BASE[0]))
    strange = Finding.model_validate(
        report.findings[0].model_dump() | {"subject": name, "input": name, "message": name}
    )

    sarif(report.model_copy(update={"findings": (strange,)}), Display(root="/repo"))


_BASE: list[str] = []


@pytest.fixture(autouse=True)
def _base(report_of, finding) -> None:
    _BASE[:] = [renderer("json")(report_of(finding()))]
