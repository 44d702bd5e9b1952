"""The gate's precedence."""

from __future__ import annotations

import pytest

from gradscope.report.gate import gate
from gradscope.report.model import Coverage, Finding, InputFailure
from gradscope.report.severity import Severity


def finding(severity: str, state: str = "new") -> Finding:
    return Finding(
        rule="W101", name="non-finite", severity=Severity(severity), subject="w", input="m.pt",
        message="", evidence={}, threshold=None, recommendation="", fingerprint="", state=state,
    )  # fmt: skip


ERROR = InputFailure(input="x", kind="missing", message="no such file")


def coverage(analyzed: int) -> Coverage:
    return Coverage(analyzed=analyzed, total=3, unit="tensors", bytes=0)


@pytest.mark.parametrize(
    ("findings", "errors", "analyzed", "options", "code"),
    [
        ([], [], 3, {}, 0),
        (["medium"], [], 3, {}, 0),
        (["high"], [], 3, {}, 1),
        (["critical"], [], 3, {}, 1),
        (["medium"], [], 3, {"fail_on": "medium"}, 1),
        (["info"], [], 3, {"fail_on": "info"}, 1),
        (["critical"], [], 3, {"fail_on": "never"}, 0),
        ([], [], 0, {}, 4),
        ([], [], 0, {"allow_empty": True}, 0),
        (["high"], [], 0, {}, 4),
        (["high"], [], 0, {"allow_empty": True}, 1),
        ([], [ERROR], 3, {}, 3),
        (["critical"], [ERROR], 3, {}, 3),
        ([], [ERROR], 0, {"allow_empty": True}, 3),
        ([], [ERROR], 3, {"fail_on": "never"}, 3),
    ],
)
def test_an_unreadable_input_outranks_an_empty_run_and_that_outranks_findings(
    findings: list[str], errors: list, analyzed: int, options: dict, code: int
) -> None:
    decided = gate([finding(s) for s in findings], errors, coverage(analyzed), **options)

    assert decided.exit_code == code
    assert decided.failed is (code != 0)
    assert bool(decided.reasons) is (code != 0 or bool(analyzed == 0))


def test_accepted_findings_do_not_fail_the_run_but_worsened_ones_do() -> None:
    accepted = gate([finding("high", "unchanged")], [], coverage(3))
    worsened = gate([finding("high", "worsened")], [], coverage(3))

    assert (accepted.exit_code, worsened.exit_code) == (0, 1)
