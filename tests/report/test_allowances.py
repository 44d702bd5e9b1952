"""The allow-list: what is meant passes with its reason, until it expires."""

from __future__ import annotations

from datetime import date
from pathlib import Path

import pytest

from gradscope import analyze_weights
from gradscope.report.allowances import allowed, remarks
from gradscope.report.config import Allowance
from gradscope.report.rules import load_rules

TODAY = date(2026, 6, 15)
RULES = list(load_rules().values())


def allowance(**given) -> Allowance:
    return Allowance(**({"rules": ["W105"], "reason": "a constant"} | given))


def said(findings, *allowances: Allowance, whole: bool = True) -> list[str]:
    found = allowed(findings, allowances, TODAY)
    return list(remarks(found, allowances, RULES, whole, TODAY))


@pytest.mark.parametrize(
    ("given", "covered"),
    [
        ({}, True),
        ({"rules": ["dead-units"]}, True),
        ({"rules": ["W101", "W10"]}, True),
        ({"rules": ["ALL"]}, True),
        ({"rules": ["W101"]}, False),
        ({"rules": ["dead"]}, False),
        ({"subjects": ["layers.*.weight"]}, True),
        ({"subjects": ["layers.3.weight"]}, True),
        ({"subjects": ["weight", "*.bias"]}, False),
        ({"subjects": ["LAYERS.*"]}, False),
        ({"expires": date(2026, 6, 16)}, True),
        ({"expires": TODAY}, False),
        ({"expires": date(2025, 1, 1)}, False),
    ],
)
def test_a_finding_is_covered_by_rule_and_subject_until_the_day(finding, given, covered) -> None:
    (found,) = allowed([finding(subject="layers.3.weight")], [allowance(**given)], TODAY)

    assert (found.state, found.allowed) == (
        ("unchanged", "a constant") if covered else ("new", None)
    )


def test_a_name_with_brackets_is_covered_as_it_stands(finding) -> None:
    subject = "layers[feature 3]"

    (found,) = allowed([finding(subject=subject)], [allowance(subjects=[subject])], TODAY)

    assert found.allowed


def test_an_expired_one_that_would_cover_is_told(finding) -> None:
    expired = allowance(expires=date(2026, 1, 1), subjects=["fc.*"])

    assert said([finding(), finding(subject="other")], expired) == [
        "the allowance of W105 for 'fc.*' (a constant) expired on 2026-01-01: "
        "1 finding counts again"
    ]


def test_a_rule_that_could_not_be_asked_leaves_no_allowance_in_vain() -> None:
    digits = Path(__file__).resolve().parents[2] / "fixtures" / "digits.safetensors"
    config = {"allow": [{"rules": ["W101"], "reason": "a constant"}]}

    whole = analyze_weights(digits, config=config)
    headers = analyze_weights(digits, config=config, headers_only=True)

    assert whole.gate.notes == (
        "the allowance of W101 for '*' (a constant) covers no finding of this run",
    )
    assert headers.gate.notes == ()


def test_one_in_vain_is_told_of_a_whole_run_that_asked_its_rules(finding) -> None:
    in_vain = allowance(rules=["W101"])

    assert said([finding()], in_vain) == [
        "the allowance of W101 for '*' (a constant) covers no finding of this run"
    ]
    assert said([finding()], in_vain, whole=False) == []
    others = [r for r in RULES if r.name != "non-finite"]
    assert list(remarks([], [in_vain], others, True, TODAY)) == []
    assert said([finding()], allowance()) == []
