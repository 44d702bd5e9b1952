"""Maps on annotated objects, by loops and by quantus; which objects are the target's."""

from __future__ import annotations

import importlib.util
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import gradscope
from gradscope.attribution.evaluation.localisation import located

from .networks import scenes, trained
from .test_evaluation import PLAIN, saved


def box() -> np.ndarray:
    region = np.zeros((6, 8), bool)
    region[1:4, 2:5] = True
    return region


def test_a_map_is_measured_as_a_loop_over_its_pixels_does() -> None:
    values = torch.randn((6, 8), generator=torch.Generator().manual_seed(3)).double()
    pairs = sorted(
        (
            (max(v, 0), i)
            for v, i in zip(values.flatten().tolist(), box().ravel().tolist(), strict=True)
        ),
        reverse=True,
    )

    found = located(values, box())

    assert found is not None
    assert found.area == 9 / 48
    assert found.pointing_game == pairs[0][1]
    assert found.relevance_mass == pytest.approx(
        sum(v for v, i in pairs if i) / sum(v for v, _ in pairs)
    )
    assert found.relevance_rank == pytest.approx(sum(i for _, i in pairs[:9]) / 9)


def test_a_constant_map_has_what_chance_gives() -> None:
    found = located(torch.ones(6, 8), box())

    assert found is not None
    for value in (found.pointing_game, found.relevance_mass, found.relevance_rank):
        assert value == pytest.approx(9 / 48)


def test_a_map_on_its_box_has_everything_and_one_beside_it_nothing() -> None:
    region = torch.from_numpy(box()).float()

    on, off = located(region, box()), located(1 - region, box())

    assert on is not None
    assert off is not None
    assert (on.pointing_game, on.relevance_mass, on.relevance_rank) == (1, 1, 1)
    assert (off.pointing_game, off.relevance_mass, off.relevance_rank) == (0, 0, 0)
    assert located(-region, box()) is None
    assert located(region, np.zeros((6, 8), bool)) is None


@pytest.mark.skipif(
    importlib.util.find_spec("quantus") is None, reason="quantus is not installed (extra: quantus)"
)
def test_the_measures_are_those_of_quantus() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import quantus

        options: dict[str, Any] = {"abs": False, "normalise": False, "disable_warnings": True}
        values = torch.rand((6, 8), generator=torch.Generator().manual_seed(3)).double()
        batch: dict[str, Any] = {
            "model": trained(), "x_batch": np.zeros((1, 1, 6, 8)), "y_batch": np.array([0]),
            "a_batch": values.numpy()[None, None], "s_batch": box()[None, None], "device": "cpu",
        }  # fmt: skip
        theirs = [
            metric(**options)(**batch)[0]
            for metric in (
                quantus.PointingGame,
                quantus.RelevanceMassAccuracy,
                quantus.RelevanceRankAccuracy,
            )
        ]
    found = located(values, box())

    assert found is not None
    ours = [found.pointing_game, found.relevance_mass, found.relevance_rank]
    assert ours == pytest.approx([float(value) for value in theirs])


def annotated(folder: Path, names: dict[int, str], **changed: Any) -> tuple[Path, str]:
    """Pictures of digits and a COCO file of where they are."""
    pictures, classes, places = scenes(5, 9)
    (folder / "photos").mkdir()
    saved(pictures, folder / "photos")
    document = {
        "images": [{"id": i, "file_name": f"{i}.png", "width": 32, "height": 32} | changed
                   for i in range(5)],
        "categories": [{"id": i, "name": names.get(i, str(i))} for i in range(10)],
        "annotations": [
            {"image_id": i, "category_id": int(classes[i]), "bbox": [left, top, side, side]}
            for i, (top, left, side) in enumerate(places)
        ],
    }  # fmt: skip
    (folder / "boxes.json").write_text(json.dumps(document))
    return folder / "photos", str(folder / "boxes.json")


def explained(photos: Path, boxes: str, **options: Any) -> Any:
    return gradscope.explain(
        trained(),
        photos,
        ["gradcam", "saliency"],
        preprocess=PLAIN.format(32),
        boxes=boxes,
        **options,
    )


def test_maps_of_a_trained_network_lie_on_its_digits(tmp_path: Path) -> None:
    result = explained(*annotated(tmp_path, {})).result

    summary = {(s.method, s.metric): s for s in result.summary}
    mass = summary["saliency", "relevance mass"]
    assert mass.pictures == 5
    assert mass.low > mass.control + 0.1
    assert summary["gradcam", "pointing game"].mean > 0.6
    own = [e.diagnostics.ground_truth.relevance_mass for e in result.explanations
           if e.method == "saliency"]  # fmt: skip
    assert mass.mean == pytest.approx(np.mean(own))
    assert result.notes == ()


def test_with_evaluate_the_table_has_every_metric(tmp_path: Path) -> None:
    result = explained(*annotated(tmp_path, {}), evaluated=True).result

    rows = {s.metric: s for s in result.summary if s.method == "gradcam"}
    assert list(rows) == [
        "pointing game", "relevance mass", "relevance rank", "insertion", "deletion", "ROAD",
        "faithfulness", "infidelity", "max sensitivity", "randomised", "sparseness",
    ]  # fmt: skip
    assert rows["faithfulness"].mean > rows["faithfulness"].control
    assert rows["infidelity"].mean < rows["infidelity"].control
    assert rows["ROAD"].mean > rows["ROAD"].control == 0


def test_names_that_are_classes_are_those_of_the_target(tmp_path: Path) -> None:
    labels = {i: f"{i}, digit {i}" for i in range(10)}

    result = explained(*annotated(tmp_path, {}), labels=labels, target=3).result

    _, classes, _ = scenes(5, 9)
    known = [e.diagnostics.ground_truth is not None for e in result.explanations[::2]]
    assert known == [c == 3 for c in classes.tolist()]
    lacking = [note for note in result.notes if "has no 3, digit 3 in" in note]
    assert len(lacking) == sum(c != 3 for c in classes.tolist())


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"width": 64}, "of 64×32 pixels, not 32×32"),
        ({"file_name": "other.png"}, "does not have"),
    ],
)
def test_what_does_not_belong_to_a_picture_is_said(
    changed: dict[str, Any], said: str, tmp_path: Path
) -> None:
    result = explained(*annotated(tmp_path, {}, **changed)).result

    assert len([note for note in result.notes if said in note]) == 5
    assert result.summary == ()
