"""Which tensor is which."""

from __future__ import annotations

from pathlib import Path

import pytest
from pairs import drawn, drift, found, model, only


@pytest.mark.parametrize(
    "wrap",
    ["module.{}", "_orig_mod.{}", "model.{}", "base_model.model.{}", "module._orig_mod.{}",
     "text_encoder.{}", "student.backbone.{}"],
)  # fmt: skip
@pytest.mark.parametrize("turned", [False, True])
def test_wrappers_around_names_are_looked_through_and_told(
    tmp_path: Path, wrap: str, turned: bool
) -> None:
    base, new = model(), {wrap.format(n): t for n, t in model().items()}

    report = drift(tmp_path, new, base) if turned else drift(tmp_path, base, new)

    assert report.result is not None
    assert report.result.counts == {"identical": len(base)}
    assert any("matched without what wrappers" in note for note in report.result.notes)
    assert report.findings == ()


def test_wrappers_inside_names_are_looked_through(tmp_path: Path) -> None:
    new = {n.replace("layers.1.", "layers.1._orig_mod."): t for n, t in model().items()}

    report = drift(tmp_path, model(), new)

    assert report.result is not None
    assert report.result.counts == {"identical": len(new)}
    moved = only(report, "layers.1._orig_mod.mlp.weight")
    assert moved.base_name == "layers.1.mlp.weight"


def test_equal_content_under_another_name_is_renamed(tmp_path: Path) -> None:
    new = {n.replace("mlp", "feed_forward"): t for n, t in model().items()}

    report = drift(tmp_path, model(), new)

    assert report.result is not None
    assert report.result.counts == {"identical": len(new)}
    assert only(report, "layers.0.feed_forward.weight").base_name == "layers.0.mlp.weight"


def test_what_only_one_has_is_a_finding_each(tmp_path: Path) -> None:
    base, new = model() | {"old.weight": drawn(4, 4)}, model() | {"new.weight": drawn(5, 4)}

    report = drift(tmp_path, base, new)

    assert (only(report, "old.weight").status, only(report, "new.weight").status) == (
        "removed", "added"
    )  # fmt: skip
    assert found(report) == {"tensor-set-changed": ["medium", "medium"]}


def test_a_tied_output_layer_is_said_to_be_tied_differently(tmp_path: Path) -> None:
    twice = model() | {"lm_head.weight": model()["embed_tokens.weight"].clone()}

    gone, back = drift(tmp_path, twice, model()), drift(tmp_path, model(), twice)

    for report, once in ((gone, "new checkpoint"), (back, "base")):
        told = only(report, "lm_head.weight")
        assert told.status == "identical"
        assert told.explanation is not None
        assert told.explanation.kind == "tied"
        assert f"the {once} stores it once, as 'embed_tokens.weight'" in told.explanation.text
        assert found(report) == {"tensor-set-changed": ["info"]}
        assert report.result is not None
        assert report.result.counts == {"identical": len(twice)}
    untied = model() | {"lm_head.weight": model()["embed_tokens.weight"] * 2}
    assert found(drift(tmp_path, untied, model())) == {"tensor-set-changed": ["medium"]}
    assert only(drift(tmp_path, untied, model()), "lm_head.weight").status == "removed"


def test_a_tie_is_compared_across_a_cast_and_under_expectations(tmp_path: Path) -> None:
    twice = model() | {"lm_head.weight": model()["embed_tokens.weight"].clone()}
    cast = {n: t.half() for n, t in model().items()}

    report = drift(tmp_path, twice, cast, expect="converted")

    told = only(report, "lm_head.weight")
    assert (told.status, told.explanation and told.explanation.kind) == ("rounding", "rounded")
    assert told.explanation is not None
    assert "tied differently" in told.explanation.text
    assert found(report) == {}


def test_tensors_are_in_the_order_of_the_base_then_what_was_added(tmp_path: Path) -> None:
    report = drift(tmp_path, model() | {"b": drawn(2)}, model() | {"a": drawn(3), "z": drawn(4)})

    assert report.result is not None
    names = [t.name for t in report.result.tensors]
    assert names[-2:] == ["a", "z"]
    assert names[0] == "b"  # safetensors writes names in their order
