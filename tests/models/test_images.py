"""Pictures of every kind become three upright channels, or an error that says why not."""

from __future__ import annotations

import contextlib
import hashlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from gradscope.errors import InputError
from gradscope.models.images import find_images, open_image

RGB = np.random.default_rng(0).integers(0, 255, (6, 4, 3), dtype=np.uint8)


def saved(tmp_path: Path, image: Image.Image, name: str = "a.png", **options: object) -> str:
    path = tmp_path / name
    image.save(path, **options)
    return str(path)


def test_a_colour_picture_is_read_as_it_is(tmp_path: Path) -> None:
    path = saved(tmp_path, Image.fromarray(RGB))

    found = open_image(path)

    assert (found.pixels == RGB).all()
    assert (found.height, found.width, found.mode, found.format) == (6, 4, "RGB", "PNG")
    assert found.sha256 == hashlib.sha256(Path(path).read_bytes()).hexdigest()


def test_a_grey_picture_has_three_equal_channels(tmp_path: Path) -> None:
    found = open_image(saved(tmp_path, Image.fromarray(RGB[:, :, 0])))

    assert (found.pixels == RGB[:, :, :1]).all()


@pytest.mark.parametrize("mode", ["1", "P", "CMYK", "YCbCr", "LAB"])
def test_every_mode_of_pillow_becomes_colours(tmp_path: Path, mode: str) -> None:
    image = Image.fromarray(RGB)
    if mode == "LAB":
        from PIL import ImageCms

        srgb, lab = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
        image = ImageCms.applyTransform(image, ImageCms.buildTransform(srgb, lab, "RGB", "LAB"))
    else:
        image = image.convert(mode)
    found = open_image(saved(tmp_path, image, "a.tif"))

    assert found.pixels.shape == (6, 4, 3)
    assert found.pixels.dtype == np.uint8


def test_what_is_transparent_lies_over_white(tmp_path: Path) -> None:
    alpha = np.zeros((6, 4, 1), np.uint8)
    alpha[0] = 255
    found = open_image(saved(tmp_path, Image.fromarray(np.concatenate([RGB, alpha], 2))))

    assert (found.pixels[0] == RGB[0]).all()
    assert (found.pixels[1:] == 255).all()


def test_sixteen_bits_keep_their_depth(tmp_path: Path) -> None:
    values = np.array([[0, 1, 32768, 65535]], np.uint16)
    found = open_image(saved(tmp_path, Image.fromarray(values)))

    np.testing.assert_allclose(found.pixels[0, :, 0], values[0] / 65535, rtol=1e-6)
    assert (found.rgb()[0, :, 0] == [0, 0, 128, 255]).all()


def test_floats_beyond_one_are_scaled_by_their_range(tmp_path: Path) -> None:
    values = np.array([[-1.0, 0.0, 3.0]], np.float32)
    found = open_image(saved(tmp_path, Image.fromarray(values), "a.tif"))

    np.testing.assert_allclose(found.pixels[0, :, 1], [0, 0.25, 1], rtol=1e-6)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_is_turned_as_its_camera_says(tmp_path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = saved(tmp_path, Image.fromarray(RGB), exif=exif)

    flips = {1: RGB, 2: RGB[:, ::-1], 3: RGB[::-1, ::-1], 4: RGB[::-1]}
    turned = np.swapaxes(RGB, 0, 1)
    flips |= {5: turned, 6: turned[:, ::-1], 7: turned[::-1, ::-1], 8: turned[::-1]}
    assert (open_image(path).pixels == flips[orientation]).all()


def test_an_animation_gives_its_first_frame(tmp_path: Path) -> None:
    frames = [Image.fromarray(np.full((3, 3), v, np.uint8)) for v in (10, 200)]
    path = saved(tmp_path, frames[0], "a.gif", save_all=True, append_images=frames[1:])

    assert (open_image(path).pixels == 10).all()


@pytest.mark.parametrize(
    ("content", "kind", "said"),
    [
        (None, "missing", "no such file"),
        (b"", "truncated", "empty"),
        (b"<!doctype html><html>", "malformed", "web page"),
        (b"<svg xmlns='http'>", "malformed", "export it as PNG"),
        (b"version https://git-lfs.github.com/spec/v1", "malformed", "git lfs pull"),
        (b"\0\0\0\x20ftypheic" + bytes(40), "malformed", "HEIC"),
        (b"no picture at all", "malformed", "no picture"),
    ],
)
def test_what_is_no_picture_is_named(
    tmp_path: Path, content: bytes | None, kind: str, said: str
) -> None:
    path = tmp_path / "x.png"
    if content is not None:
        path.write_bytes(content)

    with pytest.raises(InputError, match=said) as error:
        open_image(str(path))
    assert error.value.kind == kind


def test_a_picture_that_ends_early_is_truncated(tmp_path: Path) -> None:
    noise = np.random.default_rng(1).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    path = Path(saved(tmp_path, Image.fromarray(noise), "a.jpg"))
    path.write_bytes(path.read_bytes()[:900])

    with pytest.raises(InputError) as error:
        open_image(str(path))
    assert error.value.kind == "truncated"


def test_a_picture_of_a_billion_pixels_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bomb.png"
    Image.new("1", (40_000, 40_000)).save(path)

    with pytest.raises(InputError, match="too large"):
        open_image(str(path))


@settings(
    max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None
)
@given(st.data())
def test_a_damaged_picture_is_an_input_error_or_a_picture(
    tmp_path: Path, data: st.DataObject
) -> None:
    name = data.draw(st.sampled_from(["a.png", "a.jpg", "a.tif", "a.gif", "a.webp"]))
    path = Path(saved(tmp_path, Image.fromarray(RGB), name))
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(1, len(content)))])

    with contextlib.suppress(InputError):
        assert open_image(str(path)).pixels.shape[2] == 3


def test_a_folder_gives_its_pictures_in_the_order_people_count(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / ".hidden").mkdir()
    for name in ("img10.png", "img2.png", "sub/a.JPG", ".hidden/b.png", "notes.txt"):
        (tmp_path / name).write_bytes(b"x")

    (tmp_path / "empty").mkdir()

    found = list(find_images([str(tmp_path), "given.bmp"]))

    names = [str(Path(path).relative_to(tmp_path)) for path in found[:-1]]
    assert names == ["img2.png", "img10.png", "sub/a.JPG"]
    assert found[-1] == "given.bmp"
    with pytest.raises(InputError, match="no picture in this folder"):
        list(find_images([str(tmp_path / "empty")]))
