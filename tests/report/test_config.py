"""The configuration: what it may hold, what wins, and what it changes in a run."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from safetensors.numpy import save_file

from gradscope import analyze_flow, analyze_weights
from gradscope.cli.schema import config_schema
from gradscope.errors import UsageError
from gradscope.report.config import Config, layer, merged, read_config
from gradscope.report.rules import load_rules

FIXTURES = Path(__file__).resolve().parents[2] / "fixtures"
SCHEMA = jsonschema.Draft202012Validator(config_schema())


@pytest.fixture
def dead(tmp_path: Path) -> Path:
    """A fifth of the rows of a matrix are dead: medium by the rule's own limits."""
    weight = np.random.default_rng(0).normal(size=(50, 64)).astype(np.float32)
    weight[:10] = 0
    save_file({"fc.weight": weight}, tmp_path / "dead.safetensors")
    return tmp_path / "dead.safetensors"


def severities(report: Any) -> list[str]:
    return [f.severity for f in report.findings if f.rule == "W105"]


def test_a_threshold_judges_in_the_place_of_the_rules_own(dead: Path) -> None:
    def judged(**limits: float) -> list[str]:
        rules = {"dead-units": limits}
        return severities(analyze_weights(dead, config={"rules": rules}, select=["W105"]))

    assert judged() == ["medium"]
    assert judged(high=0.19) == ["high"]
    assert judged(high=0.21) == ["medium"]


def test_a_limit_of_flow_judges_what_was_measured_anew() -> None:
    config = {"rules": {"vanishing-gradient": {"severe": 20, "critical": 30.0, "faint": 0}}}

    usual = analyze_flow(FIXTURES / "sigmoid", select=["F102"]).findings[0].severity
    changed = analyze_flow(FIXTURES / "sigmoid", select=["F102"], config=config).findings

    assert usual == "critical"
    assert all(f.severity != "critical" for f in changed)


def test_a_severity_is_that_of_all_findings_of_the_rule_and_decides_the_gate(dead: Path) -> None:
    for name in ("dead-units", "W105"):
        report = analyze_weights(dead, config={"rules": {name: {"severity": "critical"}}})
        assert (severities(report), report.gate.exit_code) == (["critical"], 1)


def test_options_win_over_the_configuration_and_ignore_adds_to_it(dead: Path) -> None:
    config = {"select": ["W105", "W110"], "ignore": ["W110"], "fail-on": "medium"}

    def asked(**options: Any) -> tuple[list[str], int]:
        report = analyze_weights(dead, config=config, **options)
        return list(report.coverage.rules), report.gate.exit_code

    assert asked() == (["dead-units"], 1)
    assert asked(fail_on="high") == (["dead-units"], 0)
    assert asked(select=["W106", "W110"]) == (["duplicate-units"], 0)
    with pytest.raises(UsageError, match="no rule of `gradscope weights` is left"):
        asked(ignore=["dead-units"])


def test_a_selection_of_other_commands_rules_selects_nothing_here(dead: Path) -> None:
    config = {"select": ["F102"], "ignore": ["F1", "W105"]}

    assert len(analyze_weights(dead, config=config).coverage.rules) > 10
    assert analyze_flow(FIXTURES / "sigmoid", config=config).coverage.rules == (
        "vanishing-gradient",
    )


@pytest.mark.parametrize(
    ("preset", "more", "code"),
    [
        ("recommended", {}, 0),
        ("strict", {}, 1),
        ("strict", {"fail-on": "high"}, 0),
        ("lenient", {}, 0),
        ("lenient", {"rules": {"dead-units": {"severity": "high"}}}, 0),
        ("recommended", {"rules": {"dead-units": {"severity": "high"}}}, 1),
    ],
)
def test_a_preset_sets_what_the_configuration_does_not(dead, preset, more, code) -> None:
    report = analyze_weights(dead, config={"preset": preset, **more})

    assert report.gate.exit_code == code


def test_an_empty_run_passes_where_that_is_allowed(dead: Path) -> None:
    def code(**config: Any) -> int:
        return analyze_weights(dead, include=["none"], config=config).gate.exit_code

    assert code() == 4
    assert code(**{"allow-empty": True}) == 0


# --- what is wrong --------------------------------------------------------------------------------

WRONG = [
    ({"fail_on": "low"}, "unknown key 'fail_on'; did you mean fail-on?"),
    ({"selcet": []}, "unknown key 'selcet'; did you mean select?"),
    ({"qqq": 1}, "unknown key 'qqq' (there are preset, required-version, select"),
    ({"fail-on": "soon"}, "fail-on is 'soon'; it is one of 'info', 'low'"),
    ({"required-version": "99"}, "it requires gradscope 99, and this is "),
    ({"required-version": ">=99.1", "later": 1}, "it requires gradscope >=99.1, and this is "),
    ({"required-version": "~=0.1"}, "required-version is '~=0.1'; it is a least version, such as"),
    ({"preset": "kind"}, "preset is 'kind'; it is one of"),
    ({"allow-empty": "maybe"}, "allow-empty is 'maybe'; it is true or false"),
    ({"select": 3}, "select is 3; it is a list"),
    ({"select": ["W1", 3]}, "select.1 is 3; it is a text"),
    ({"select": ["dead-unit"]}, "'dead-unit'; did you mean dead-units"),
    ({"ignore": ["Z1"]}, "no rule is called or begins with 'Z1'"),
    ({"ignore": [""]}, "no rule is called or begins with ''"),
    ({"baseline": ""}, "baseline is ''; it is a text that says something"),
    ({"rules": 3}, "rules is 3; it is a table"),
    ({"rules": {"dead-units": 3}}, "rules.dead-units is 3; it is a table"),
    ({"rules": {"W1": {}}}, "no rule is called 'W1'"),
    ({"rules": {"W105": {"high": 1}, "dead-units": {}}}, "rules.W105 and rules.dead-units are one"),
    ({"rules": {"dead-unit": {}}}, "no rule is called 'dead-unit'; did you mean dead-units"),
    ({"rules": {"W105": {"hihg": 1}}}, "unknown key 'rules.dead-units.hihg'; did you mean high?"),
    ({"rules": {"W105": {"high": "x"}}}, "rules.dead-units.high is 'x'; it is a number"),
    ({"rules": {"W105": {"high": True}}}, "rules.dead-units.high is True; it is a number"),
    ({"rules": {"W105": {"high": float("nan")}}}, "rules.dead-units.high is nan; it is a number"),
    ({"rules": {"W104": {"least": 1.5}}}, "rules.constant-tensor.least is 1.5; it is a whole"),
    ({"rules": {"W104": {"least": float("inf")}}}, "is inf; it is a whole number"),
    ({"rules": {"W105": {"severity": "bad"}}}, "severity is 'bad'; it is one of info, low"),
    ({"allow": [{"rules": ["W1"]}]}, "allow.0.reason is missing"),
    ({"allow": [{"rules": ["W1"], "reason": ""}]}, "allow.0.reason is ''; it is a text that says"),
    ({"allow": [{"rules": [], "reason": "x"}]}, "allow.0.rules is []; it is a list with something"),
    ({"allow": [{"rules": ["Z"], "reason": "x"}]}, "begins with 'Z'"),
    ({"allow": [{"rules": "W", "reason": "x", "tensor": []}]}, "unknown key 'allow.0.tensor'"),
    ({"allow": [{"rules": "W", "reason": "x", "expires": "soon"}]}, "it is a date such as"),
    (
        {"allow": [{"rules": "W", "reason": "x", "expires": "2027-01-31T10:00:00"}]},
        "it is a date such as",
    ),
    ({"allow": [{"rules": [""], "reason": "x"}]}, "no rule is called or begins with ''"),
    ({"allow": 3}, "allow is 3; it is a list"),
    ({"allow": ["x"]}, "allow.0 is 'x'; it is a table"),
]


@pytest.mark.parametrize(("document", "why"), WRONG, ids=[why[:40] for _, why in WRONG])
def test_what_a_configuration_cannot_say_names_its_origin_and_the_nearest(document, why) -> None:
    with pytest.raises(UsageError, match=f"^here: .*{re.escape(why)}"):
        layer(document, "here")


def test_the_schema_says_no_where_the_program_does_and_yes_where_it_does() -> None:
    # Patterns, versions and what is said twice are not enumerated.
    prefixes = ("dead-unit'", "Z", "''", ">=99.1, and", "are one")
    for document, why in WRONG:
        if not any(p in why for p in prefixes) and "nan" not in why and "inf;" not in why:
            assert not SCHEMA.is_valid(document), document
    good = {
        "required-version": ">=0.1", "preset": "strict",
        "select": ["W"], "fail-on": "low", "allow-empty": True,
        "baseline": "b.json",
        "rules": {"W105": {"high": 0.2, "severity": "low"}},
        "allow": [{"rules": ["W1"], "subjects": ["*.b"], "reason": "x", "expires": "2027-01-01"}],
    }  # fmt: skip
    SCHEMA.validate(good)
    layer(good, "here")


@pytest.mark.parametrize("rule", load_rules().values(), ids=lambda r: r.name)
def test_every_threshold_of_every_rule_can_be_given(rule) -> None:
    document = {"rules": {rule.name: dict(rule.thresholds)}}

    SCHEMA.validate(document)
    assert layer(document, "here").values == document
    assert "severity" not in rule.thresholds


# --- files and layers -----------------------------------------------------------------------------


def test_a_later_layer_wins_value_by_value() -> None:
    first = layer({"fail-on": "low", "rules": {"W105": {"high": 0.5, "medium": 0.2}}}, "file")
    second = layer({"preset": "strict", "rules": {"dead-units": {"high": 0.4}}}, "option")

    config, origins = merged([first, second])

    assert config == Config(
        preset="strict", fail_on="low", rules={"dead-units": {"high": 0.4, "medium": 0.2}}
    )
    assert origins == {
        ("fail-on",): "file", ("preset",): "option",
        ("rules", "dead-units", "high"): "option", ("rules", "dead-units", "medium"): "file",
    }  # fmt: skip
    assert merged([second])[1]["fail-on",] == "preset strict"


def test_a_file_is_toml_and_its_baseline_lies_beside_it(tmp_path: Path) -> None:
    (tmp_path / "gradscope.toml").write_text('fail-on = "low"\nbaseline = "accepted.json"\n')
    (tmp_path / "pyproject.toml").write_text('[tool.gradscope]\nfail-on = "critical"\n')

    own = read_config(tmp_path / "gradscope.toml").values

    assert own == {"fail-on": "low", "baseline": str(tmp_path / "accepted.json")}
    assert read_config(tmp_path / "pyproject.toml").values == {"fail-on": "critical"}


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("c.toml", b"a = ", "c.toml is not TOML: "),
        ("c.toml", b"\xff", "c.toml is not TOML: "),
        ("c.toml", b"x = 1", "c.toml: unknown key 'x'"),
        ("c.toml", b"\xef\xbb\xbfx = 1", "c.toml: unknown key 'x'"),
        ("pyproject.toml", b"tool = 3", "has no table [tool.gradscope]"),
        ("pyproject.toml", b"[tool]\ngradscope = 3", "tool.gradscope is 3; it is a table"),
        ("pyproject.toml", b"[[tool.gradscope]]", "tool.gradscope is [{}]; it is a table"),
        ("pyproject.toml", b"[project]\nname = 'x'", "has no table [tool.gradscope]"),
        ("none.toml", None, "none.toml: No such file"),
    ],
)
def test_a_file_that_is_none_is_refused_by_name(tmp_path: Path, name, content, why) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)

    with pytest.raises(UsageError, match=re.escape(why)):
        analyze_weights(FIXTURES / "digits.pt", config=tmp_path / name)
