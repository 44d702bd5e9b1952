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
from gradscope.models.images import open_image
from gradscope.models.picture_files import _natural, find_images

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
    image: Image.Image | None = Image.fromarray(RGB)
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


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        ([0.1, 0.5, 0.7], [0.1, 0.5, 0.7]),
        ([0.0, 51.0, 102.0], [0.0, 0.2, 0.4]),
        ([-1.0, 0.0, 3.0], [0.0, 0.25, 1.0]),
        ([0.0, 100.0, 400.0], [0.0, 0.25, 1.0]),
        ([7e8, 7e8, 7e8], [0.0, 0.0, 0.0]),
        ([np.nan, 0.5, np.inf], [0.0, 0.5, 1.0]),
    ],
)
def test_floats_are_of_one_of_255_or_of_their_own_range(
    tmp_path: Path, values: list[float], wanted: list[float]
) -> None:
    image = Image.fromarray(np.array([values], np.float32))

    found = open_image(saved(tmp_path, image, "a.tif"))

    np.testing.assert_allclose(found.pixels[0, :, 1], wanted, rtol=1e-6)


@pytest.mark.parametrize(
    ("values", "wanted"),
    [([0, 13107, 65535], [0, 0.2, 1]), ([0, 13107], [0, 0.2]), ([-5, 0, 95], [0, 0.05, 1])],
)
def test_integers_of_32_bits_are_taken_for_16_where_they_fit(
    tmp_path: Path, values: list[int], wanted: list[float]
) -> None:
    found = open_image(saved(tmp_path, Image.fromarray(np.array([values], np.int32)), "a.tif"))

    assert found.mode == "I"
    np.testing.assert_allclose(found.pixels[0, :, 0], wanted, rtol=1e-6)


def test_a_picture_without_one_finite_pixel_is_malformed(tmp_path: Path) -> None:
    path = saved(tmp_path, Image.fromarray(np.full((2, 2), np.nan, np.float32)), "a.tif")

    with pytest.raises(InputError, match="no pixel is finite") as error:
        open_image(path)
    assert error.value.kind == "malformed"


@pytest.mark.parametrize("suffix", ["png", "webp", "jpg"])
def test_damaged_metadata_leaves_the_pixels(tmp_path: Path, suffix: str) -> None:
    image = Image.fromarray(np.full((8, 8, 3), 90, np.uint8))
    path = saved(tmp_path, image, f"a.{suffix}", exif=b"Exif\0\0no tags")

    found = open_image(path)

    assert (abs(found.pixels.astype(int) - 90) <= 1).all()


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
        (None, "missing", "file not found"),
        (b"", "truncated", "empty"),
        (b"<!doctype html><html>", "malformed", "web page"),
        (b"<svg xmlns='http'>", "malformed", "export it as PNG"),
        (b"version https://git-lfs.github.com/spec/v1", "malformed", "git lfs pull"),
        (b"\0\0\0\x20ftypheic" + bytes(40), "malformed", "HEIC"),
        (b"\0\0\0\x20ftypavis" + bytes(40), "malformed", "AVIF"),
        (b"\xef\xbb\xbf<?xml version='1.0'?>", "malformed", "export it as PNG"),
        (b"%PDF-1.4", "malformed", "document"),
        (
            b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments",
            "malformed",
            "document",
        ),
        (b"no picture at all", "malformed", "not a picture"),
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


@pytest.mark.parametrize("suffix", ["png", "tif", "gif", "webp", "bmp", "jp2", "ppm", "tga"])
def test_no_format_that_ends_early_is_half_a_picture(tmp_path: Path, suffix: str) -> None:
    noise = np.random.default_rng(1).integers(0, 255, (60, 60, 3), dtype=np.uint8)
    path = Path(saved(tmp_path, Image.fromarray(noise), f"a.{suffix}"))
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 2 // 3])

    with pytest.raises(InputError):
        open_image(str(path))


@pytest.mark.parametrize(
    ("name", "said"), [("a\0b", "not a valid file name"), ("", "folder"), ("a" * 5000, "read")]
)
def test_a_name_that_no_file_has_is_missing(name: str, said: str) -> None:
    with pytest.raises(InputError, match=said) as error:
        open_image(name)
    assert error.value.kind == "missing"


def test_a_picture_of_a_billion_pixels_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bomb.pgm"
    path.write_bytes(b"P5 40000 40000 255\n" + bytes(100))

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
    names = ("Img10.png", "img2.png", "img²3.png", "sub/a.JPG", ".hidden/b.png", "notes.txt")
    for name in names:
        (tmp_path / name).write_bytes(b"x")

    found = list(find_images([str(tmp_path), "given.bmp"]))

    below = [str(Path(path).relative_to(tmp_path)) for path in found[:-1]]
    assert below == ["img2.png", "Img10.png", "img²3.png", "sub/a.JPG"]
    assert found[-1] == "given.bmp"


@given(st.lists(st.integers(0, 10**30), min_size=2, max_size=6, unique=True))
def test_numbers_in_names_are_ordered_as_numbers(numbers: list[int]) -> None:
    found = sorted((Path(f"img{n}.png") for n in numbers), key=_natural)

    assert found == [Path(f"img{n}.png") for n in sorted(numbers)]


def test_a_picture_without_a_suffix_is_found_by_how_it_begins(tmp_path: Path) -> None:
    for name, kind in (("a", "PNG"), ("b", "JPEG"), ("c", "GIF"), ("d.dat", "WEBP")):
        Image.fromarray(RGB).save(tmp_path / name, kind)
    (tmp_path / "e").write_bytes(b"RIFF1234WAVE")
    (tmp_path / "f.eps").write_bytes(b"%!PS")

    assert [Path(path).name for path in find_images([str(tmp_path)])] == ["a", "b", "c", "d.dat"]


def test_a_folder_without_a_picture_is_missing(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_bytes(b"x")

    with pytest.raises(InputError, match="no pictures found in this folder") as error:
        list(find_images([str(tmp_path)]))
    assert error.value.kind == "missing"


# --- frames, bands, twelve bits -------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["gif", "tif", "webp"])
def test_a_frame_can_be_named_and_the_first_is_told(tmp_path: Path, suffix: str) -> None:
    frames = [Image.fromarray(np.full((3, 4, 3), v, np.uint8)) for v in (10, 90, 200)]
    more = {"lossless": True} if suffix == "webp" else {}
    path = saved(
        tmp_path, frames[0], f"a.{suffix}", save_all=True, append_images=frames[1:], **more
    )

    first = open_image(path)
    assert (first.pixels == 10).all()
    assert first.notes == (f"the first of 3 frames is read; {path}#2 names the last",)
    for number, value in enumerate((10, 90, 200)):
        found = open_image(f"{path}#{number}")
        assert (found.pixels == value).all()
        assert found.notes == ()
        assert found.path == f"{path}#{number}"
    with pytest.raises(InputError, match=r"no such frame; it has 3 frames, #0 to #2") as error:
        open_image(f"{path}#3")
    assert error.value.kind == "missing"


def test_a_picture_of_one_frame_has_a_first_and_no_note(tmp_path: Path) -> None:
    path = saved(tmp_path, Image.fromarray(RGB))

    assert open_image(path).notes == ()
    assert (open_image(f"{path}#0").pixels == RGB).all()
    with pytest.raises(InputError, match="it has 1 frame, #0"):
        open_image(f"{path}#1")
    with pytest.raises(InputError, match="file not found"):
        open_image(f"{path}.gif#1")


def test_a_name_with_a_number_sign_is_a_name(tmp_path: Path) -> None:
    path = str(tmp_path / "shot#2")
    Image.fromarray(RGB).save(path, format="png")

    assert (open_image(path).pixels == RGB).all()


@pytest.mark.parametrize(
    ("greatest", "white"), [(255, 65535), (256, 4095), (4095, 4095), (4096, 65535)]
)
@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.npy"])
def test_twelve_bits_in_sixteen_are_told_by_their_range(
    tmp_path: Path, name: str, greatest: int, white: int
) -> None:
    values = np.array([[0, 7, greatest]], np.uint16)
    path = str(tmp_path / name)
    if name.endswith("npy"):
        np.save(path, values)
    else:
        Image.fromarray(values).save(path)

    found = open_image(path)

    np.testing.assert_allclose(found.pixels[0, :, 0], values[0] / white, rtol=1e-6)
    assert bool(found.notes) == (white == 4095)


def test_the_bands_of_a_file_are_read_where_more_than_colours_are_asked_for(tmp_path: Path) -> None:
    bands = np.random.default_rng(0).integers(0, 255, (6, 5, 4), dtype=np.uint8)
    for mode, name in (("RGBA", "a.png"), ("CMYK", "a.tif")):
        path = saved(tmp_path, Image.frombytes(mode, (5, 6), bands.tobytes()), name)
        assert (open_image(path, 4).pixels == bands).all()
        assert open_image(path, 3).pixels.shape == (6, 5, 3)
    with pytest.raises(InputError, match="it has 3 bands, the model takes 4"):
        open_image(saved(tmp_path, Image.fromarray(RGB)), 4)
    with pytest.raises(InputError, match="it has 4 bands, the model takes 6"):
        open_image(path, 6)


@pytest.mark.parametrize("channels", [1, 3, 4, 7])
@pytest.mark.parametrize("first", [True, False])
def test_an_array_has_any_number_of_bands(tmp_path: Path, channels: int, first: bool) -> None:
    bands = np.random.default_rng(0).integers(0, 255, (9, 8, channels), dtype=np.uint8)
    np.save(tmp_path / "a.npy", bands.transpose(2, 0, 1) if first else bands)

    if channels == 1:
        with pytest.raises(InputError, match="it has 1 band, the model takes 3"):
            open_image(str(tmp_path / "a.npy"))
    found = open_image(str(tmp_path / "a.npy"), channels)

    assert (found.pixels == bands).all()
    assert (found.format, found.mode) == ("NPY", "uint8")
    if channels > 2:
        assert (found.rgb() == bands[:, :, :3]).all()


@pytest.mark.parametrize(
    "array", [np.zeros(5), np.zeros((2, 3, 4, 5)), np.array([["a"]]), np.zeros((0, 4, 3)),
              np.array([[None]])],
)  # fmt: skip
def test_an_array_that_is_no_picture_is_malformed(tmp_path: Path, array: np.ndarray) -> None:
    np.save(tmp_path / "a.npy", array, allow_pickle=True)

    with pytest.raises(InputError) as error:
        open_image(str(tmp_path / "a.npy"))
    assert error.value.kind == "malformed"
