"""The registry: selection, evaluation, and that every rule is fit to be shown."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import ClassVar

import pytest

from gradscope import analyze_weights
from gradscope.errors import UsageError
from gradscope.flow.result import FlowResult
from gradscope.report.model import Finding, NotEvaluated, fingerprint
from gradscope.report.rules import (
    RULES,
    Observation,
    Unknown,
    evaluate,
    load_rules,
    rule,
    select,
    select_for,
)
from gradscope.report.severity import Severity
from gradscope.weights.result import Examined

FIXTURES = Path(__file__).resolve().parents[2] / "fixtures"


def names(*selected: str, ignore: tuple[str, ...] = ()) -> list[str]:
    return [r.name for r in select(load_rules().values(), selected, ignore)]


@pytest.mark.parametrize("known", load_rules().values(), ids=lambda r: r.name)
def test_every_rule_has_a_code_a_name_a_summary_and_numeric_thresholds(known) -> None:
    assert re.fullmatch(r"[CWDFE]\d{3}", known.code)
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", known.name)
    assert len(known.summary) > 20
    assert all(isinstance(value, int | float) for value in known.thresholds.values())


def test_codes_prefixes_and_names_select_and_the_longest_pattern_wins() -> None:
    assert names("W101") == names("non-finite") == ["non-finite"]
    assert names("W101", "W102", ignore=("ALL",)) == ["non-finite", "extreme-value"]
    assert names("W", ignore=("ALL",)) == names("W")
    assert set(names("C")) == {r.name for r in load_rules().values() if r.code[0] == "C"}
    assert names("W101", ignore=("W",)) == ["non-finite"]
    assert "non-finite" not in names(ignore=("W101",))
    assert names("W1", ignore=("W101",)) == [n for n in names("W1") if n != "non-finite"]


def test_an_unknown_rule_is_refused_with_what_is_near() -> None:
    with pytest.raises(UsageError, match="did you mean dead-units"):
        names("dead-unit")


@pytest.fixture
def registry():
    before = dict(RULES)
    yield
    RULES.clear()
    RULES.update(before)


class Fact(StrEnum):
    """What can be known of ``Values``."""

    HEADERS = "headers"
    SPECTRUM = "spectrum"


@dataclass(frozen=True)
class Values:
    """A result that rules of these tests read."""

    command: ClassVar[str] = "values"
    Needs: ClassVar[type[StrEnum]] = Fact

    values: tuple[float, ...] = ()
    measured: frozenset[Fact] = frozenset({Fact.HEADERS})


@pytest.mark.usefixtures("registry")
def test_a_rule_is_one_function_and_the_registry_adds_its_identity() -> None:
    @rule("W999", "too-big", Severity.LOW, reads=Values, needs=Fact.HEADERS)
    def too_big(subject, *, limit: float = 3.0):
        """A value is too big."""
        for value in subject.values:
            if value > limit:
                yield Observation(f"v{value}", "big", "shrink it", {"value": value}, limit)

    (found,) = evaluate([RULES["W999"]], Values((1, 5)), "a.npz")

    assert isinstance(found, Finding)
    assert (found.rule, found.name, found.severity) == ("W999", "too-big", Severity.LOW)
    assert (found.subject, found.input, found.threshold) == ("v5", "a.npz", 3.0)
    assert found.fingerprint == fingerprint("W999", "v5")


@pytest.mark.usefixtures("registry")
def test_a_rule_whose_facts_are_absent_is_not_evaluated_rather_than_passed() -> None:
    @rule("W999", "needs-more", Severity.LOW, reads=Values, needs=Fact.SPECTRUM)
    def needs_more(_):
        """A rule that needs spectra."""
        yield Unknown("never asked")

    (absent,) = evaluate([RULES["W999"]], Values(), "a.npz")
    (unknown,) = evaluate([RULES["W999"]], Values(measured=frozenset(Fact)), "a.npz")

    assert isinstance(absent, NotEvaluated)
    assert "spectrum" in absent.reason
    assert unknown == NotEvaluated(rule="needs-more", reason="never asked")


@pytest.mark.usefixtures("registry")
def test_a_finding_about_a_whole_input_is_the_same_one_whatever_the_path() -> None:
    @rule("W999", "about-all", Severity.LOW, reads=Values, needs=Fact.HEADERS)
    def about_all(_):
        """A rule about a whole file."""
        yield Observation("runs/a.npz", "", "")

    (one,) = evaluate([RULES["W999"]], Values(), "runs/a.npz")
    (part,) = evaluate([RULES["W999"]], Values(), "runs")

    assert one.fingerprint == fingerprint("W999", "")
    assert part.fingerprint == fingerprint("W999", "runs/a.npz")


@pytest.mark.usefixtures("registry")
def test_a_rule_of_any_code_is_asked_by_the_command_whose_result_it_reads() -> None:
    @rule("ACME1", "acme", Severity.HIGH, reads=Examined, needs="headers")
    def acme(examined):
        """Every checkpoint is suspicious."""
        yield Observation("everything", "suspicious", "look at it")

    report = analyze_weights(FIXTURES / "digits.safetensors", select=["ACME1"])
    by_prefix = select_for(Examined, ["ACME"])

    assert [f.rule for f in report.findings] == ["ACME1"]
    assert [r.name for r in by_prefix] == ["acme"]
    assert "acme" not in [r.name for r in select_for(FlowResult)]
    with pytest.raises(UsageError, match="names a rule of `gradscope weights`, which `gradscope"):
        select_for(FlowResult, ["acme"])


@pytest.mark.usefixtures("registry")
@pytest.mark.parametrize(
    ("code", "name", "needs", "said"),
    [
        ("W999", "typo", "header", "needs 'header'; Values has 'headers', 'spectrum'"),
        ("w999", "small", Fact.HEADERS, "a code looks like"),
        ("W999", "Not kebab", Fact.HEADERS, "a name like"),
    ],
)
def test_a_malformed_rule_is_refused_where_it_is_defined(code, name, needs, said) -> None:
    with pytest.raises(ValueError, match=said):
        rule(code, name, Severity.LOW, reads=Values, needs=needs)


@pytest.mark.usefixtures("registry")
def test_a_code_or_name_cannot_be_taken_twice() -> None:
    with pytest.raises(ValueError, match="already registered"):
        rule("W101", "another", Severity.LOW, reads=Values, needs=Fact.HEADERS)(lambda _: ())
    with pytest.raises(ValueError, match="already registered"):
        rule("W998", "non-finite", Severity.LOW, reads=Values, needs=Fact.HEADERS)(lambda _: ())


def test_a_fingerprint_names_the_rule_the_input_and_the_subject_and_no_value() -> None:
    assert fingerprint("W101", "a") == fingerprint("W101", "a")
    prints = {
        fingerprint("W101", "a"), fingerprint("W102", "a"), fingerprint("W101", "b"),
        fingerprint("W101", "a", "other.safetensors"),
    }  # fmt: skip
    assert len(prints) == 4
