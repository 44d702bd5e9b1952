"""The registry: selection, evaluation, and that every rule is fit to be shown."""

from __future__ import annotations

import re

import pytest

from gradscope.errors import UsageError
from gradscope.report.model import Finding, NotEvaluated, fingerprint
from gradscope.report.rules import RULES, Observation, Unknown, evaluate, load_rules, rule, select
from gradscope.report.severity import Severity

CONTRACT = [
    "index-mismatch",
    "missing-shard",
    "duplicate-tensor-name",
    "empty-tensor",
    "truncated-file",
    "non-finite",
    "extreme-value",
    "all-zero",
    "constant-tensor",
    "dead-units",
    "duplicate-units",
    "heavy-tails",
    "skewed",
    "outliers",
    "high-sparsity",
    "negative-variance",
    "untrained",
    "duplicate-tensors",
    "undertrained-rows",
    "dtype-headroom",
    "redundant-precision",
    "scale-missing",
]


def names(*selected: str, ignore: tuple[str, ...] = ()) -> list[str]:
    return [r.name for r in select(load_rules().values(), selected, ignore)]


@pytest.mark.parametrize("name", CONTRACT)
def test_every_rule_that_scripts_may_select_exists(name: str) -> None:
    assert names(name) == [name]


@pytest.mark.parametrize("known", load_rules().values(), ids=lambda r: r.name)
def test_every_rule_has_a_code_a_name_a_summary_and_numeric_thresholds(known) -> None:
    assert re.fullmatch(r"[CWDFE]\d{3}", known.code)
    assert re.fullmatch(r"[a-z]+(-[a-z]+)*", known.name)
    assert len(known.summary) > 20
    assert all(isinstance(value, int | float) for value in known.thresholds.values())


def test_codes_prefixes_and_names_select_and_the_longest_pattern_wins() -> None:
    assert names("W101") == names("non-finite") == ["non-finite"]
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


@pytest.mark.usefixtures("registry")
def test_a_rule_is_one_function_and_the_registry_adds_its_identity() -> None:
    @rule("W999", "too-big", Severity.LOW, needs="headers")
    def too_big(values, *, limit: float = 3.0):
        """A value is too big."""
        for value in values:
            if value > limit:
                yield Observation(f"v{value}", "big", "shrink it", {"value": value}, limit)

    (found,) = evaluate([RULES["W999"]], [1, 5], frozenset({"headers"}))

    assert isinstance(found, Finding)
    assert (found.rule, found.name, found.severity) == ("W999", "too-big", Severity.LOW)
    assert (found.subject, found.threshold) == ("v5", 3.0)
    assert found.fingerprint == fingerprint("W999", "v5")


@pytest.mark.usefixtures("registry")
def test_a_rule_whose_facts_are_absent_is_not_evaluated_rather_than_passed() -> None:
    @rule("W999", "needs-more", Severity.LOW, needs="spectrum")
    def needs_more(_):
        """A rule that needs spectra."""
        yield Unknown("never asked")

    (absent,) = evaluate([RULES["W999"]], None, frozenset({"headers"}))
    (unknown,) = evaluate([RULES["W999"]], None, frozenset({"spectrum"}))

    assert isinstance(absent, NotEvaluated)
    assert "spectrum" in absent.reason
    assert unknown == NotEvaluated(rule="needs-more", reason="never asked")


@pytest.mark.usefixtures("registry")
def test_a_code_or_name_cannot_be_taken_twice() -> None:
    with pytest.raises(ValueError, match="already registered"):
        rule("W101", "another", Severity.LOW)(lambda _: ())
    with pytest.raises(ValueError, match="already registered"):
        rule("W998", "non-finite", Severity.LOW)(lambda _: ())


def test_a_fingerprint_names_the_rule_the_input_and_the_subject_and_no_value() -> None:
    assert fingerprint("W101", "a") == fingerprint("W101", "a")
    prints = {
        fingerprint("W101", "a"), fingerprint("W102", "a"), fingerprint("W101", "b"),
        fingerprint("W101", "a", "other.safetensors"),
    }  # fmt: skip
    assert len(prints) == 4
