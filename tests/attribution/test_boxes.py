"""Annotations as they are found: COCO, Pascal VOC, masks; and what is no annotation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from gradscope.attribution.evaluation.boxes import Boxes, read_boxes
from gradscope.errors import InputError

VOC = """<annotation><filename>cat.jpg</filename><size><width>{w}</width><height>8</height></size>
<object><name>cat</name><part><bndbox><xmin>1</xmin></bndbox></part>
<bndbox><xmin>2</xmin><ymin>3</ymin><xmax>4</xmax><ymax>6</ymax></bndbox></object></annotation>"""
COCO: dict[str, Any] = {
    "images": [{"id": 7, "file_name": "cat.jpg", "width": 10, "height": 8},
               {"id": 8, "file_name": "empty.jpg"}],
    "categories": [{"id": 1, "name": "Cat"}],
    "annotations": [{"image_id": 7, "category_id": 1, "bbox": [1, 2, 3, 4]}],
}  # fmt: skip
PASCAL = {"annotation": {"filename": "cat.jpg", "size": {"width": "10", "height": "8"},
                         "object": {"name": "cat", "bndbox": {"xmin": "2", "ymin": "3", "xmax": "4",
                                                              "ymax": "6"}}}}  # fmt: skip


def written(folder: Path, name: str, text: str) -> str:
    (folder / name).write_text(text)
    return str(folder / name)


def inside(boxes: Boxes, path: str = "photos/cat.jpg") -> np.ndarray:
    known = boxes.of(path)
    assert known is not None
    (one,) = known.objects
    return one.covers(8, 10)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.json", json.dumps(COCO)),
        ("a.xml", VOC.format(w=10)),
        ("a.json", json.dumps(PASCAL)),
        ("a.json", json.dumps([PASCAL])),
    ],
)
def test_a_box_covers_three_columns_and_four_rows_in_every_format(
    name: str, text: str, tmp_path: Path
) -> None:
    boxes = read_boxes(written(tmp_path, name, text))

    wanted = np.zeros((8, 10), bool)
    wanted[2:6, 1:4] = True
    np.testing.assert_array_equal(inside(boxes), wanted)
    assert boxes.names() == {"cat"}
    known = boxes.of("cat.jpg")
    assert known is not None
    assert known.size == (10, 8)


def test_a_pascal_file_that_does_not_know_the_size_is_read(tmp_path: Path) -> None:
    known = read_boxes(written(tmp_path, "a.xml", VOC.format(w=0))).of("cat.jpg")

    assert known is not None
    assert known.size is None


def test_a_folder_of_pascal_files_and_polygons_of_coco_are_read(tmp_path: Path) -> None:
    (tmp_path / "voc").mkdir()
    written(tmp_path / "voc", "1.xml", VOC.format(w=10))
    outline = COCO | {
        "annotations": [{"image_id": 7, "category_id": 1, "bbox": [],
                         "segmentation": [[1, 2, 3, 2, 3, 5, 1, 5]]}]
    }  # fmt: skip

    from_folder = inside(read_boxes(str(tmp_path / "voc")))
    from_outline = inside(read_boxes(written(tmp_path, "a.json", json.dumps(outline))))

    np.testing.assert_array_equal(from_folder, from_outline)


@pytest.mark.parametrize("mode", ["L", "P", "1"])
def test_masks_bear_the_names_of_their_pictures(mode: str, tmp_path: Path) -> None:
    pixels = np.zeros((8, 10), np.uint8)
    pixels[2:6, 1:4] = 3
    if mode == "P":
        pixels[0] = 255  # the border between objects
        image = Image.fromarray(pixels, "L")
        image.putpalette([v for v in range(256) for _ in range(3)])
    else:
        image = Image.fromarray(pixels * 80).convert(mode)
    image.save(tmp_path / "cat.png")

    for boxes in (read_boxes(str(tmp_path)), read_boxes(str(tmp_path / "cat.png"))):
        wanted = np.zeros((8, 10), bool)
        wanted[2:6, 1:4] = True
        np.testing.assert_array_equal(inside(boxes), wanted)
        assert boxes.of("photos/dog.jpg") is None


def test_of_two_pictures_of_one_name_the_one_in_the_same_folder_is_taken(tmp_path: Path) -> None:
    twice = COCO | {
        "images": [{"id": 7, "file_name": "a/cat.jpg"}, {"id": 8, "file_name": "b/cat.jpg"}],
        "annotations": [{"image_id": 8, "category_id": 1, "bbox": [0, 0, 1, 1]}],
    }
    boxes = read_boxes(written(tmp_path, "a.json", json.dumps(twice)))

    found = [boxes.of(f"photos/{folder}/cat.jpg") for folder in "ab"]

    assert [known.picture for known in found if known] == ["a/cat.jpg", "b/cat.jpg"]
    assert boxes.of("photos/a/dog.jpg") is None


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.json", "{"),
        ("a.json", "[]"),
        ("a.json", "3"),
        ("a.json", '{"images": []}'),
        ("a.json", json.dumps(COCO | {"annotations": [{"image_id": 7}]})),
        ("a.json", json.dumps(COCO | {"annotations": []})),
        ("a.json", json.dumps(COCO | {"annotations": [{"image_id": 7, "bbox": [1, 2]}]})),
        ("a.xml", "<annotation>"),
        ("a.xml", "<!DOCTYPE a [<!ENTITY b 'c'>]><annotation/>"),
        ("a.txt", "cat 1 2 3 4"),
    ],
)
def test_what_is_no_annotation_is_malformed(name: str, text: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        read_boxes(written(tmp_path, name, text))
    assert caught.value.kind == "malformed"
    with pytest.raises(InputError, match="file not found"):
        read_boxes(str(tmp_path / "nothing.json"))
