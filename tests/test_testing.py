"""``assert_healthy``: what it takes, what it says, and that nothing unread or unasked passes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from gradscope import analyze_weights
from gradscope.errors import UsageError
from gradscope.report.formats import renderer
from gradscope.testing import assert_healthy

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"
HEALTHY = FIXTURES / "digits.safetensors"


@pytest.fixture
def faulty(tmp_path: Path) -> Path:
    weight = np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32)
    weight[3, 4] = np.nan
    save_file({"fc.weight": weight}, tmp_path / "m.safetensors")
    return tmp_path / "m.safetensors"


def saved(checkpoint: Path, folder: Path) -> Path:
    path = folder / "report.json"
    path.write_text(renderer("json")(analyze_weights(checkpoint)))
    return path


def test_a_healthy_checkpoint_passes_in_every_way_that_it_can_be_given(tmp_path: Path) -> None:
    for subject in (HEALTHY, str(HEALTHY), analyze_weights(HEALTHY), saved(HEALTHY, tmp_path)):
        assert_healthy(subject)


def test_a_faulty_one_fails_in_every_way_and_says_where(faulty: Path, tmp_path: Path) -> None:
    for subject in (faulty, str(faulty), analyze_weights(faulty), saved(faulty, tmp_path)):
        with pytest.raises(AssertionError, match=r"(?s)1 finding at or above high\n.*fc\.weight"):
            assert_healthy(subject)


@pytest.mark.parametrize("shape", ["folder", "file"])
def test_a_history_is_told_by_its_content(shape: str) -> None:
    path = FIXTURES / "sigmoid"

    with pytest.raises(AssertionError, match="vanishing-gradient"):
        assert_healthy(path if shape == "folder" else next(path.glob("*.npz")))


def test_other_logs_are_histories_and_plain_arrays_are_a_checkpoint(tmp_path: Path) -> None:
    rows = [{"step": s, **{f"l{i}.weight": 1.0 for i in range(3)}} for s in range(20)]
    (tmp_path / "norms.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    np.savez(tmp_path / "m.npz", w=np.random.default_rng(0).normal(size=(8, 8)))

    with pytest.raises(UsageError, match="no rule that 'W101' names was asked"):
        assert_healthy(tmp_path / "norms.jsonl", select=["W101"])
    assert_healthy(tmp_path / "m.npz", select=["W101"])


def test_rules_and_severity_can_be_chosen(faulty: Path) -> None:
    assert_healthy(faulty, select=["dead-units"])
    assert_healthy(faulty, ignore=["W101"])
    assert_healthy(faulty, fail_on="never")
    with pytest.raises(AssertionError):
        assert_healthy(faulty, select=["W1"], fail_on="critical")
    report = analyze_weights(faulty, fail_on="never")
    assert_healthy(report)
    with pytest.raises(AssertionError):
        assert_healthy(report, fail_on="high")


@pytest.mark.parametrize(
    ("chosen", "said"),
    [
        ({"select": ["W999"]}, "W999"),
        ({"select": ["dead-unit"]}, "did you mean dead-units"),
        ({"select": ["F102"]}, "no rule that 'F102' names was asked"),
        ({"fail_on": "hgih"}, "fail_on is 'hgih'"),
    ],
)
def test_a_wrong_choice_is_no_pass(chosen: dict[str, object], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        assert_healthy(HEALTHY, **chosen)


def test_what_was_not_read_fails_whatever_was_chosen(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="file not found"):
        assert_healthy(tmp_path / "missing.safetensors", fail_on="never")


def test_nothing_analysed_fails_unless_the_report_allowed_it(tmp_path: Path) -> None:
    empty = tmp_path / "empty.safetensors"
    save_file({"w": np.zeros((0, 4), np.float32)}, empty)

    with pytest.raises(AssertionError, match="nothing was analysed"):
        assert_healthy(empty, ignore=["empty-tensor"])
    assert_healthy(analyze_weights(empty, allow_empty=True), ignore=["empty-tensor"])


def test_rules_of_which_none_could_be_evaluated_fail() -> None:
    with pytest.raises(AssertionError, match="none of the 1 rule could be evaluated"):
        assert_healthy(HEALTHY, select=["rank-collapse"])


def test_an_accepted_finding_passes(faulty: Path) -> None:
    allow = [{"rules": ["W101"], "reason": "known"}]

    assert_healthy(analyze_weights(faulty, config={"allow": allow}))
