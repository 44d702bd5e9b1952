"""Inputs as torchvision makes them, to the bit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from gradscope.errors import InputError
from gradscope.models.images import Picture
from gradscope.models.preprocessing import IMAGENET, Preprocessing, fitted


def picture(height: int, width: int) -> Picture:
    pixels = np.random.default_rng(height * width).integers(0, 255, (height, width, 3), np.uint8)
    return Picture("a.png", "PNG", "RGB", 1, "0", pixels)


def by_torchvision(given: Picture, resize: int, crop: int) -> np.ndarray:
    """``ImageClassification``, written down from its documentation."""
    image = Image.fromarray(given.pixels)
    width, height = image.size
    short, long = min(image.size), max(image.size)
    other = int(resize * long / short)
    size = (other, resize) if width > height else (resize, other)
    image = image.resize(size, Image.Resampling.BILINEAR)
    if min(image.size) < crop:
        left, top = ((max(0, crop - s)) // 2 for s in image.size)
        canvas = Image.new("RGB", tuple(max(crop, s) for s in image.size))
        canvas.paste(image, (left, top))
        image = canvas
    left, top = (round((s - crop) / 2.0) for s in image.size)
    pixels = np.asarray(image.crop((left, top, left + crop, top + crop)), np.float32) / 255
    mean, std = (np.array(v, np.float32) for v in (IMAGENET.mean, IMAGENET.std))
    return ((pixels - mean) / std).transpose(2, 0, 1)


@pytest.mark.parametrize("size", [(300, 451), (451, 300), (256, 256), (100, 999), (17, 23)])
@pytest.mark.parametrize(("resize", "crop"), [(256, 224), (232, 224), (40, 64), (41, 64)])
def test_inputs_are_torchvisions(size: tuple[int, int], resize: int, crop: int) -> None:
    given = picture(*size)
    steps = Preprocessing(resize, (crop, crop), IMAGENET.mean, IMAGENET.std)

    found = steps(given).inputs

    np.testing.assert_array_equal(found, by_torchvision(given, resize, crop))


def test_bytes_are_rescaled_as_hugging_face_does() -> None:
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, 2)
    steps = Preprocessing(None, None, (0.0,) * 3, (1.0,) * 3, rescale=1 / 127.5)

    found = steps(Picture("a.png", "PNG", "RGB", 1, "0", ramp)).inputs

    # NumPy multiplies bytes by a Python float in double.
    wanted = (np.arange(256, dtype=np.uint8) * (1 / 127.5)).astype(np.float32)
    np.testing.assert_array_equal(found[0].flatten(), wanted)


def test_a_strip_that_would_be_enlarged_beyond_memory_is_refused() -> None:
    with pytest.raises(InputError, match="resized to 256×15360000 pixels; crop it") as error:
        IMAGENET(picture(1, 60_000))
    assert error.value.kind == "unsupported"


@pytest.mark.parametrize("name", ["nearest", "box", "bilinear", "hamming", "bicubic", "lanczos"])
def test_a_deep_picture_is_resized_as_its_bytes_are(name: str) -> None:
    edge = np.zeros((20, 20, 3), np.uint8)
    edge[:, 10:] = 255
    steps = Preprocessing((33, 47), None, (0.0,) * 3, (1.0,) * 3, interpolation=name)

    shallow = steps(Picture("a", "PNG", "RGB", 1, "0", edge)).inputs
    deep = steps(Picture("a", "TIFF", "F", 1, "0", edge.astype(np.float32) / 255)).inputs

    filters = {f.name.lower(): f for f in Image.Resampling}
    wanted = np.asarray(Image.fromarray(edge).resize((47, 33), filters[name])) / 255
    np.testing.assert_allclose(shallow.permute(1, 2, 0), wanted, atol=1e-7)
    # Pillow rounds to bytes after each of two passes.
    np.testing.assert_allclose(deep, shallow, atol=1.01 / 255)


def test_a_grey_model_takes_one_channel() -> None:
    steps = replace(fitted(replace(IMAGENET, assumed=True), (8, 8), 1), resize=(8, 8))
    given = picture(16, 16)

    made = steps(given).inputs

    assert made.shape == (1, 8, 8)
    grey = Image.fromarray(given.pixels).convert("L").resize((8, 8), Image.Resampling.BILINEAR)
    wanted = (np.asarray(grey) / 255 - sum(IMAGENET.mean) / 3) / (sum(IMAGENET.std) / 3)
    np.testing.assert_allclose(made[0], wanted, atol=1e-5)


def test_deep_pictures_keep_what_bytes_would_lose() -> None:
    pixels = np.full((8, 8, 3), 0.1234567, np.float32)

    made = fitted(replace(IMAGENET, assumed=True), (8, 8), 3)(
        Picture("a", "TIFF", "I;16", 1, "0", pixels)
    ).inputs

    wanted = (0.1234567 - IMAGENET.mean[0]) / IMAGENET.std[0]
    assert float(made[0, 2, 2]) == pytest.approx(wanted, rel=1e-6)


def test_the_steps_in_words() -> None:
    assert IMAGENET.steps() == (
        "resize the shorter edge to 256 (bilinear)",
        "crop the centre 224×224",
        "subtract 0.485/0.456/0.406, divide by 0.229/0.224/0.225",
    )
    plain = Preprocessing((9, 8), None, (0.5,), (0.25,), "bicubic", rescale=1.0)
    assert plain.steps() == (
        "resize to 9×8 (bicubic)", "multiply bytes by 1", "subtract 0.5, divide by 0.25",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("resize", "size", "wanted"),
    [(None, 64, 64), (256, 224, 256), (224, 224, 224), (200, 224, 224), (256, 28, 28)],
)
def test_what_was_written_keeps_its_resize_where_the_models_size_fits_in_it(
    resize: int | None, size: int, wanted: int
) -> None:
    written = Preprocessing(resize, None, (0.5,) * 3, (0.5,) * 3)

    found = fitted(written, (size, size), 3)

    assert (found.resize, found.crop) == (wanted, (size, size))


@pytest.mark.parametrize(
    ("size", "resize"),
    [((224, 224), 256), ((384, 384), 439), ((28, 28), 32), ((32, 48), (32, 48))],
)
def test_a_guess_keeps_imagenets_ratio(size: tuple[int, int], resize: Any) -> None:
    found = fitted(replace(IMAGENET, assumed=True), size, 3)

    assert (found.resize, found.crop, found.assumed) == (resize, size, True)
