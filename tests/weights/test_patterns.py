"""A pattern that matches no tensor says why, and what would have matched."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from gradscope.weights.analysis import analyze_weights

NAMES = ("model.layers.0.mlp.up.weight", "model.layers.1.mlp.up.weight", "lm_head.weight")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    save_file({name: np.ones(2, np.float32) for name in NAMES}, path)
    return path


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        (r".*\.weight$", "not regular expressions: try '*.weight'"),
        ("^model", "not regular expressions: try 'model*'"),
        (r"layers\.\d+", "not regular expressions: try '*layers.*'"),
        ("lm_head.(weight|bias)", "not regular expressions: try '*lm_head.*'"),
        ("lm_head", "must match the whole name: try 'lm_head*'"),
        ("weight", "must match the whole name: try '*weight'"),
        ("layers.0", "must match the whole name: try '*layers.0*'"),
        ("zzz", "the names are like 'lm_head.weight'"),
        ("(", "the names are like"),
    ],
)
@pytest.mark.parametrize("option", ["include", "exclude"])
def test_a_pattern_without_a_match_is_explained(
    model: Path, option: str, pattern: str, words: str
) -> None:
    report = analyze_weights(model, headers_only=True, **{option: [pattern]})
    (note,) = report.result.notes
    assert note.startswith(f"--{option} ")
    assert words in note
    assert report.gate.exit_code == (4 if option == "include" else 0)


def test_what_is_offered_matches(model: Path) -> None:
    for pattern in (r".*\.weight$", "^model", r"layers\.\d+", "lm_head", "layers.0"):
        note = analyze_weights(model, headers_only=True, include=[pattern]).result.notes[0]
        offered = note.rpartition("try '")[2].rstrip("'")
        again = analyze_weights(model, headers_only=True, include=[offered])
        assert again.coverage.analyzed > 0
        assert not again.result.notes


@pytest.mark.parametrize("pattern", ["*.weight", "lm_head.weight", "model.layers.[01].*", "*"])
def test_a_pattern_that_matches_is_not_remarked_on(model: Path, pattern: str) -> None:
    assert not analyze_weights(model, headers_only=True, include=[pattern]).result.notes
