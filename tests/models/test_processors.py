"""Preprocessing as Hugging Face, timm, torchvision and the command line write it down."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gradscope.errors import InputError, UsageError
from gradscope.models.images import Picture
from gradscope.models.preprocessing import IMAGENET, fitted
from gradscope.models.processors import beside, parse


def test_key_value_pairs_are_hugging_faces() -> None:
    found = parse("image_mean=0.5/0.5/0.4,image_std=[0.5,0.6,0.7],size=64x48,resample=bicubic")

    assert found.mean == (0.5, 0.5, 0.4)
    assert found.std == (0.5, 0.6, 0.7)
    assert found.resize == (64, 48)
    assert found.interpolation == "bicubic"
    assert found.crop is None
    plain = parse("do_normalize=false,size=32,crop_size=28,do_rescale=false")
    assert (plain.mean, plain.std, plain.rescale) == ((0, 0, 0), (1, 1, 1), 1.0)
    assert (plain.resize, plain.crop) == (32, (28, 28))


def test_a_processors_file_is_read(tmp_path: Path) -> None:
    keys = {
        "do_resize": True, "size": {"shortest_edge": 256}, "resample": 3, "do_center_crop": True,
        "crop_size": {"height": 224, "width": 200}, "do_rescale": True, "rescale_factor": 1 / 127.5,
        "do_normalize": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
        "image_processor_type": "ViTImageProcessor",
    }  # fmt: skip
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps(keys))

    for found in (parse(str(path)), beside(str(tmp_path / "model.safetensors"))):
        assert found is not None
        assert (found.resize, found.crop, found.interpolation) == (256, (224, 200), "bicubic")
        assert found.rescale == pytest.approx(1 / 127.5)
        assert found.source == str(path)


@pytest.mark.parametrize(
    ("keys", "resize", "crop"),
    [
        # ViT's older files: a number is a square.
        ({"size": 224, "do_resize": True}, (224, 224), None),
        ({"size": {"shortest_edge": 224}}, 224, None),
        # CLIP's: a number and a crop.
        ({"size": 224, "crop_size": 200, "do_center_crop": True}, 224, (200, 200)),
        ({"size": 224, "do_center_crop": True}, 224, (224, 224)),
        # ConvNeXT's crops a share of small images and squashes large ones.
        ({"size": 224, "crop_pct": 0.875}, 256, (224, 224)),
        ({"size": {"shortest_edge": 384}, "crop_pct": 0.875}, (384, 384), (384, 384)),
        # Newer files name what they do not have.
        (
            {"size": {"height": 9, "width": 8}, "crop_size": None, "do_center_crop": None,
             "resample": None, "rescale_factor": None, "size_divisor": None},
            (9, 8), None,
        ),
        ({"do_resize": False, "size": 3, "do_center_crop": False, "crop_size": 2}, None, None),
    ],
)  # fmt: skip
def test_a_processors_sizes_mean_what_they_mean_there(
    tmp_path: Path, keys: dict[str, Any], resize: Any, crop: Any
) -> None:
    path = tmp_path / "preprocessor_config.json"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(keys).encode())

    for found in (parse(str(path)), parse(str(tmp_path)), beside(str(tmp_path))):
        assert found is not None
        assert (found.resize, found.crop) == (resize, crop)
        assert found.rescale == 1 / 255
        assert found.mean == IMAGENET.mean


@pytest.mark.parametrize(
    "content",
    ["{", "[]", '{"sampling_rate": 16000}', '{"pretrained_cfg": null}', '{"id2label": {}}',
     '{"pretrained_cfg": {"input_size": [3, 8, 8]}}'],
)  # fmt: skip
def test_a_file_beside_a_model_that_says_nothing_of_images_says_nothing(
    tmp_path: Path, content: str
) -> None:
    for name in ("config.json", "preprocessor_config.json"):
        (tmp_path / name).write_text(content)

    assert beside(str(tmp_path / "model.pt")) is None
    with pytest.raises(InputError, match="this folder has neither a preprocessor_config"):
        parse(str(tmp_path))


def test_a_processor_beside_the_model_that_cannot_be_right_is_malformed(tmp_path: Path) -> None:
    path = tmp_path / "preprocessor_config.json"
    path.write_text('{"image_mean": [0, 0, 0], "image_std": [0, 0, 0]}')

    with pytest.raises(InputError, match="image_std contains 0") as error:
        beside(str(tmp_path / "model.pt"))
    assert error.value.path == str(path)


def test_one_number_stands_for_three_channels() -> None:
    found = fitted(parse("image_mean=0.5,image_std=0.25,size=8x8"), (None, None), 3)

    assert (found.mean, found.std) == ((0.5,) * 3, (0.25,) * 3)
    nine = Picture("a", "PNG", "RGB", 1, "0", np.zeros((9, 9, 3), np.uint8))
    assert found(nine).inputs.shape == (3, 8, 8)


def test_timms_keys_are_taken_on_the_command_line() -> None:
    text = "input_size=3/224/320,mean=(0.1,0.2,0.3),std=[1,2,3],crop_pct=0.9,crop_mode=squash"

    found = parse(text + ",interpolation=bicubic")

    assert (found.resize, found.crop) == ((248, 355), (224, 320))
    assert (found.mean, found.std) == ((0.1, 0.2, 0.3), (1, 2, 3))
    assert found.interpolation == "bicubic"


def test_timm_says_it_in_its_configuration(tmp_path: Path) -> None:
    config = {
        "input_size": [3, 288, 288], "crop_pct": 0.95, "interpolation": "bicubic",
        "mean": [0.5] * 3, "std": [0.25] * 3,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps({"pretrained_cfg": config}))

    found = beside(str(tmp_path / "m.pt"))

    assert found is not None
    assert (found.resize, found.crop, found.std) == (303, (288, 288), (0.25,) * 3)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("image_meen=0.5", "unknown key 'image_meen'"),
        ("image_mean=0.5/0.5", "image_mean has 2 numbers"),
        ("image_std=0/1/1", "above zero"),
        ("image_std=a/b/c", "finite number"),
        ("size=0", "size is 0; edges"),
        ("size=-3", "size is -3; edges"),
        ("size=20x99999", "size is 20×99999; edges"),
        ("size=224.5", "size is 224.5; pixels are whole"),
        ("crop_size=0", "the crop's size is 0×0"),
        ("crop_size=1/2/3", "crop_size is"),
        ("resample=cubicle", "unknown filter 'cubicle'"),
        ("resample=true", "unknown filter True"),
        ("do_normalize=no", "do_normalize is 'no'; it has to be true or false"),
        ("do_resize=2,size=3", "do_resize is 2"),
        ("rescale_factor=0", "rescale_factor contains 0; it has to be above zero"),
        ("rescale_factor=x", "rescale_factor is 'x', not 1 finite number"),
        ("image_mean=1e400", "image_mean is inf"),
        ("image_mean=[]", "image_mean is"),
        ("size=8,size=9", "size is given twice"),
        ('size={"longest_edge":9}', "neither shortest_edge"),
        ("mean=0.5/0.5/0.5", "unknown key 'mean'.*or timm's"),
        ("input_size=3/8/8,mean=0/0/0,std=1/1", "std is"),
        ("input_size=2/8/8,mean=0/0,std=1/1", "not 2"),
        ("", "--preprocess is imagenet"),
        ("x" * 300 + "=1", "unknown key"),
        ("image_mean=" + "[" * 9999, "image_mean is"),
        ("image_mean=0.5/0.5/0.5,size", "'size' is not key=value"),
    ],
)
def test_a_wrong_request_names_its_key(text: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        parse(text)


@pytest.mark.parametrize(
    ("content", "said"),
    [("{", "not valid JSON"), ("[]", "not a JSON object"), ("{}", "none of the keys"),
     ('{"image_mean": [1], "image_std": "x"}', "image_std"),
     ('{"size": {"w": 3}}', "shortest_edge"),
     ("[" * 99999, "not valid JSON"), ("\0", "not valid JSON"),
     ('{"size": 1' + "0" * 400 + "}", "size is 1"),
     ('{"do_normalize": "false", "size": 4}', "do_normalize is 'false'"),
     ('{"input_size": [3, 8, 8], "mean": [0, 0, 0], "std": null}', "std is None"),
     ('{"input_size": [3, 8, 8], "mean": [0, 0, 0], "std": [1, 1, 1], "crop_pct": "x"}', "pct"),
     ('{"input_size": [3, 8, 8], "mean": [0, 0, 0], "std": [1, 1, 1], "crop_mode": "border"}',
      "crop_mode is 'border'"),
     ('{"input_size": [3, 8, 8], "mean": [0, 0, 0], "std": [1, 1, 1], "crop_pct": 1e-9}', "edges")],
)  # fmt: skip
def test_a_wrong_file_is_malformed(tmp_path: Path, content: str, said: str) -> None:
    path = tmp_path / "p.json"
    path.write_text(content)

    with pytest.raises(InputError, match=said):
        parse(str(path))
    with pytest.raises(InputError, match="file not found"):
        parse(str(tmp_path / "none.json"))
