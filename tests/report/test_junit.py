"""JUnit XML, read back by junitparser."""

from __future__ import annotations

from pathlib import Path

import junitparser
import pytest

from gradscope import analyze_weights
from gradscope.report.formats import renderer
from gradscope.report.model import Input, InputFailure

UNREAD = InputFailure(input="x.pt", kind="missing", message="file not found")


def junit(report) -> junitparser.TestSuite:
    xml = junitparser.JUnitXml.fromstring(renderer("junit")(report).encode())
    (suite,) = xml
    for counted in (xml, suite):
        results = [r for case in suite for r in case.result]
        assert counted.tests == len(list(suite))
        assert counted.failures == sum(isinstance(r, junitparser.Failure) for r in results)
        assert counted.errors == sum(isinstance(r, junitparser.Error) for r in results)
        assert counted.skipped == sum(isinstance(r, junitparser.Skipped) for r in results)
    return suite


def red(suite: junitparser.TestSuite) -> bool:
    return suite.failures + suite.errors > 0


def test_a_finding_that_fails_the_gate_is_a_failure_and_a_lesser_one_passes(
    report_of, finding
) -> None:
    suite = junit(report_of(finding("high"), finding("medium", "b.weight")))

    failed, passed, *_ = suite
    assert (failed.classname, failed.name) == ("gradscope.weights.dead-units", "W105 fc.weight")
    assert failed.result[0].type == "high"
    assert failed.result[0].message == "5 of 10 rows are dead"
    assert "prune them" in failed.result[0].text
    assert passed.is_passed
    assert "medium: 5 of 10" in passed.system_out


def test_a_suite_is_named_by_what_was_looked_at(report_of, finding) -> None:
    given = [Input(path=f"{name}.pt", format="x", bytes=1) for name in ("a]]>", "b\x1b", "c", "d")]

    assert junit(report_of()).name == "gradscope.weights runs/m.safetensors"
    assert junit(report_of(inputs=tuple(given))).name == (
        "gradscope.weights a]]>.pt, b\\x1b.pt, c.pt and 1 more"
    )
    assert junit(report_of(inputs=(), errors=(UNREAD,))).name == "gradscope.weights x.pt"


def test_rules_that_found_nothing_pass_and_those_not_asked_are_skipped(report_of, finding) -> None:
    suite = junit(report_of(finding()))

    cases = {case.classname.rpartition(".")[2]: case for case in suite}
    assert cases["non-finite"].is_passed
    assert cases["skewed"].is_skipped
    assert cases["skewed"].result[0].message == "needs statistics"


@pytest.mark.parametrize("known", [{"state": "unchanged"}, {"state": "unchanged", "allowed": "ok"}])
def test_what_is_known_does_not_fail(report_of, finding, known) -> None:
    assert not red(junit(report_of(finding(**known))))
    assert red(junit(report_of(finding(state="worsened"))))


def test_it_is_red_exactly_when_the_run_fails(report_of, finding) -> None:
    reports = [
        report_of(),
        report_of(finding("medium")),
        report_of(finding("medium"), fail_on="medium"),
        report_of(finding("critical"), fail_on="never"),
        report_of(finding("critical")),
        report_of(errors=(UNREAD,)),
        report_of(analyzed=0),
    ]

    assert [red(junit(r)) for r in reports] == [r.gate.failed for r in reports]
    assert [r.gate.exit_code for r in reports] == [0, 0, 1, 0, 1, 3, 4]


def test_an_unreadable_input_is_an_error(tmp_path: Path) -> None:
    case = next(iter(junit(analyze_weights(tmp_path / "missing.pt"))))

    assert case.name.endswith("missing.pt")
    assert (case.result[0].type, case.result[0].message) == ("missing", "file not found")


@pytest.mark.parametrize("name", ["a\x00b", "\ud800", "<&\">'", "\x1b[31m", "￾", "]]>"])
def test_any_name_is_valid_xml(report_of, finding, name: str) -> None:
    suite = junit(report_of(finding(subject=name, message=name, recommendation=name, input=name)))

    assert suite.failures == 1
