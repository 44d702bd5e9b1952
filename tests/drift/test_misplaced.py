"""Tensors that hold what the base has under another name."""

from __future__ import annotations

from pathlib import Path

import pytest
from pairs import drift, found, model, of_layers, only

A, B = "layers.0.mlp.weight", "layers.2.mlp.weight"


def test_two_that_were_swapped_name_each_other(tmp_path: Path) -> None:
    new = model() | {A: model()[B], B: model()[A]}

    report = drift(tmp_path, model(), new)

    assert found(report) == {"weight-drift": ["high"]}
    for name, place in ((A, B), (B, A)):
        told = only(report, name).explanation
        assert told is not None
        assert (told.kind, told.residual, told.facts) == ("misplaced", 0.0, {"place": place})


@pytest.mark.parametrize(("sources", "severity"), [((0, 2), "medium"), ((0, 0, 1, 2), None),
                                                   ((2, 0, 1), "high")])  # fmt: skip
def test_layers_that_were_removed_or_reordered_are_one_finding(
    tmp_path: Path, sources: tuple[int, ...], severity: str | None
) -> None:
    report = drift(tmp_path, model(), of_layers(*sources))

    told = found(report)
    assert "reinitialized" not in told
    assert told["weight-drift"] == [severity or "medium"]
    assert only(report, "layers.1.norm.weight").explanation.kind == "misplaced"
    assert "unexpected-change" in found(
        drift(tmp_path, model(), of_layers(*sources), expect="converted")
    )


def test_a_matrix_that_only_begins_like_another_is_unrelated(tmp_path: Path) -> None:
    other = model(seed=5)[A]
    other.view(-1)[:100] = model()[B].view(-1)[:100]

    report = drift(tmp_path, model(), model() | {A: other})

    assert found(report) == {"reinitialized": ["high"]}


def test_equal_gains_are_no_finding_where_no_matrix_moved(tmp_path: Path) -> None:
    new = {n: t + 1e-3 for n, t in model().items()}
    gain = "layers.1.norm.weight"

    report = drift(tmp_path, model(), new | {gain: model()["layers.0.norm.weight"]})

    assert only(report, gain).explanation is None
