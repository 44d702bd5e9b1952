"""Annotations within GitHub's limits: ten of each level a step, the rest dropped in silence."""

from __future__ import annotations

import re

import pytest

from gradscope.report.formats import FILE, Display, renderer
from gradscope.report.model import InputFailure

COMMAND = re.compile(r"::(error|warning|notice) (?:file=([^,:]*),line=1,)?title=([^,:]*)::(.*)")


def unescaped(text: str) -> str:
    for code, char in (("%0A", "\n"), ("%3A", ":"), ("%2C", ","), ("%25", "%")):
        text = text.replace(code, char)
    return text


def annotated(report, display: Display = FILE) -> list[tuple[str, ...]]:
    """Level, file, title and message, as the runner takes a line apart."""
    lines = renderer("github")(report, display).splitlines()
    found = [COMMAND.fullmatch(line) for line in lines]
    assert all(found), lines
    return [tuple(unescaped(group or "") for group in match.groups()) for match in found]


def test_a_finding_is_an_annotation_of_its_input(report_of, finding) -> None:
    assert annotated(report_of(finding(message="50% of a, b: dead"))) == [
        (
            "error",
            "runs/m.safetensors",
            "W105 dead-units (high)",
            "fc.weight: 50% of a, b: dead\n→ prune them",
        )
    ]


def test_levels_follow_severities_and_the_worst_come_first(report_of, finding) -> None:
    severities = ["critical", "high", "medium", "low", "info"]

    shown = annotated(report_of(*(finding(s, f"{s}.weight") for s in severities)))

    assert [level for level, *_ in shown] == ["error", "error", "warning", "notice", "notice"]


def test_no_more_than_ten_of_a_level_and_the_tenth_counts_the_rest(report_of, finding) -> None:
    names = [f"{chr(97 + i)}.weight" for i in range(20)]

    shown = annotated(report_of(*(finding("medium", name) for name in names)))

    assert len(shown) == 10
    assert shown[-1][3] == "11 more, see the report"


def test_like_findings_share_one(report_of, finding) -> None:
    ((_, _, _, message),) = annotated(
        report_of(*(finding(subject=f"layers.{i}.weight") for i in range(32)))
    )

    assert message.startswith("layers.0.weight (and 31 like it): ")


def test_what_is_known_is_left_out_and_notes_are_warnings(report_of, finding) -> None:
    shown = annotated(report_of(finding(state="unchanged"), notes=["1 entry is stale"]))

    assert shown == [("warning", "", "baseline and allow-list", "1 entry is stale")]


def test_a_run_that_fails_without_findings_is_annotated(report_of) -> None:
    unread = InputFailure(input="x.pt", kind="missing", message="file not found")

    assert annotated(report_of(errors=(unread,)))[0][:2] == ("error", "x.pt")
    assert annotated(report_of(analyzed=0)) == [
        ("error", "", "nothing was analysed", "nothing was analysed: 0 of 3 tensors")
    ]
    assert annotated(report_of()) == []


@pytest.mark.parametrize(
    "name", ["a\n::error::b", "a\r::warning::b", "a%0A::error::b", "::error::x"]
)
def test_no_name_starts_a_command_of_its_own(report_of, finding, name: str) -> None:
    text = renderer("github")(report_of(finding(subject=name, input=name, message=name)))

    assert len(text.splitlines()) == 1
    assert text.startswith("::error file=")
    assert text.isprintable() or text[:-1].isprintable()


def test_the_anchor_is_where_it_is_shown(report_of, finding) -> None:
    ((_, file, *_),) = annotated(report_of(finding()), Display(anchor="model.dvc"))

    assert file == "model.dvc"
