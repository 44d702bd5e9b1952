"""Pictures of maps, against closed forms and Matplotlib's tables."""

from __future__ import annotations

import io
from itertools import pairwise
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image
from scipy.ndimage import gaussian_filter

from gradscope.attribution.drawing.colour import COLORMAPS, coloured
from gradscope.attribution.drawing.figure import check_figures, figure
from gradscope.attribution.drawing.folder import _canvas, _smoothed
from gradscope.attribution.drawing.overlay import (
    bounds,
    heatmap,
    normalised,
    overlay,
    scale,
    top_mass,
)
from gradscope.attribution.drawing.preview import preview
from gradscope.attribution.drawing.sheet import Panel, sheet
from gradscope.errors import UsageError


def lightness(table: Any) -> Any:
    linear = np.where(
        table / 255 <= 0.04045, table / 255 / 12.92, ((table / 255 + 0.055) / 1.055) ** 2.4
    )
    return linear @ np.array([0.2126, 0.7152, 0.0722])


@pytest.mark.parametrize("name", ["viridis", "inferno"])
def test_sequential_tables_grow_lighter_at_every_step(name: str) -> None:
    assert (np.diff(np.cbrt(lightness(COLORMAPS[name]().astype(float)))) > -1e-3).all()


def test_the_diverging_table_is_grey_in_the_middle_and_blue_and_red_at_its_ends() -> None:
    table = COLORMAPS["coolwarm"]().astype(int)

    assert np.ptp(table[127:129], axis=1).max() <= 3
    assert table[0][2] > table[0][0] + 80
    assert table[-1][0] > table[-1][2] + 80


@pytest.mark.parametrize("name", COLORMAPS)
def test_tables_are_matplotlibs(name: str) -> None:
    wanted = matplotlib.colormaps[name](np.arange(256))[:, :3] * 255

    assert np.abs(wanted - COLORMAPS[name]()).max() <= 0.51


def test_a_signed_map_diverges_and_another_does_not() -> None:
    values = np.array([[-1.0, 0.0, 1.0]])
    table = {name: COLORMAPS[name]() for name in ("coolwarm", "inferno")}

    assert (heatmap(values, "signed")[0] == table["coolwarm"][[0, 128, 255]]).all()
    assert (heatmap(values, "positive")[0] == table["inferno"][[0, 0, 255]]).all()


def test_an_unknown_table_names_those_there_are() -> None:
    with pytest.raises(UsageError, match="viridis"):
        coloured(np.zeros((2, 2)), "rainbow")


def test_display_keeps_zero_for_signed_maps_and_cuts_below_it_for_others() -> None:
    values = np.array([[-4.0, 0.0], [1.0, 2.0]])

    np.testing.assert_allclose(normalised(values, "signed", clip=1), values / 4)
    np.testing.assert_allclose(normalised(values, "positive", clip=1), [[0, 0], [0.5, 1]])
    assert bounds(values, "positive", clip=1) == (0, 2)
    assert bounds(np.array([[0.2, np.nan], [0.5, np.inf]]), "positive", clip=1) == (0.2, 0.5)
    assert bounds(np.array([[-0.5, 0.0], [0.2, 0.1]]), "signed", clip=1) == (-0.5, 0.5)
    # Of what is above zero alone.
    assert bounds(np.array([0.0] * 98 + [1.0, 3.0]), "positive", clip=0.5) == (0, 2)


@pytest.mark.parametrize("value", [0.0, -1.0, np.nan])
@pytest.mark.parametrize("sign", ["positive", "signed"])
def test_a_map_with_nothing_to_show_is_drawn_as_nothing(value: float, sign: str) -> None:
    values = np.full((4, 4), value)
    shown = normalised(values, sign)

    if value == 0:
        assert (shown == 0).all()
    picture = np.full((4, 4, 3), 100, np.uint8)
    assert heatmap(values, sign).shape == (4, 4, 3)
    drawn = overlay(picture, values, sign, contour=None)
    if value != -1 or sign == "positive":
        assert (drawn == (45 if np.isnan(value) else 100)).all()


def test_tiny_maps_are_drawn_like_large_ones() -> None:
    values = np.random.default_rng(0).random((6, 6))

    assert (heatmap(values, "positive") == heatmap(values * 1e-30, "positive")).all()
    assert (top_mass(values, 0.5) == top_mass(values * 1e-30, 0.5)).all()
    assert 0 < top_mass(values, 0.5).sum() < values.size


mass = hnp.arrays(np.float64, (3, 4), elements=st.integers(0, 5).map(float))


@given(mass, st.floats(0.05, 1))
def test_the_top_mass_is_the_smallest_set_of_the_greatest_values(values: Any, share: float) -> None:
    found = top_mass(values, share)

    if values.sum() == 0:
        assert not found.any()
        return
    assert values[found].sum() >= share * values.sum() * (1 - 1e-12)
    least = values[found].min()
    assert (found == (values >= least)).all()
    assert values[values > least].sum() < share * values.sum() or least == 0


def test_a_picture_without_heat_stays_as_it_is_and_full_heat_hides_it() -> None:
    picture = np.random.default_rng(0).integers(0, 255, (5, 6, 3), dtype=np.uint8)
    values = np.zeros((5, 6))
    values[2, 3] = 1.0

    drawn = overlay(picture, values, "positive", "viridis", opacity=1.0, contour=None)

    assert (drawn[2, 3] == COLORMAPS["viridis"]()[255]).all()
    drawn[2, 3] = picture[2, 3]
    assert (drawn == picture).all()


def test_heat_covers_by_the_root_of_its_strength_and_blindness_darkens() -> None:
    picture = np.full((2, 2, 3), 200, np.uint8)
    values = np.array([[0.25, 1.0], [0.0, np.nan]])

    drawn = overlay(picture, values, "positive", "viridis", opacity=0.8, contour=None)

    table = COLORMAPS["viridis"]().astype(float)
    # The clip quantile of 0.25 and 1 lies just below 1.
    share = 0.25 / np.quantile([0.25, 1.0], 0.995)
    part = 0.8 * np.sqrt(share)
    wanted = 200 * (1 - part) + table[round(share * 255)] * part
    assert np.abs(drawn[0, 0] - wanted).max() <= 0.5
    assert (drawn[1, 0] == 200).all()
    assert (drawn[1, 1] == 90).all()


def test_a_faded_picture_is_pale_grey() -> None:
    picture = np.zeros((1, 3, 3), np.uint8)
    picture[0, 1], picture[0, 2] = (255, 0, 0), 255

    drawn = overlay(picture, np.zeros((1, 3)), "positive", contour=None, faded=True)

    # Rec. 709 luminance, halved, over a grey of 110.
    assert drawn[0].tolist() == [[110] * 3, [int(110 + 0.5 * 0.2126 * 255)] * 3, [237] * 3]


@pytest.mark.parametrize(("side", "width"), [(20, 1), (900, 3)])
def test_a_line_is_as_wide_as_the_picture_asks(side: int, width: int) -> None:
    values = np.zeros((side, side))
    values[side // 2 :] = 1.0

    column = overlay(np.full((side, side, 3), 90, np.uint8), values, "positive")[:, 0, 0]

    assert (column == 20).sum() == (column == 255).sum() == width
    assert (column[side // 2 : side // 2 + width] == 255).all()
    assert (column[side // 2 - width : side // 2] == 20).all()


def test_a_line_around_a_signed_map_is_around_both_signs() -> None:
    values = np.zeros((9, 20))
    values[2:5, 2:5], values[2:5, 12:15] = 1, -1

    drawn = overlay(np.full((9, 20, 3), 90, np.uint8), values, "signed", contour=1)

    assert (drawn[2, 2] == 255).all()
    assert (drawn[2, 12] == 255).all()


def test_a_line_goes_around_half_of_the_mass() -> None:
    values = np.zeros((20, 20))
    values[5:10, 5:10] = 1.0
    picture = np.full((20, 20, 3), 90, np.uint8)

    drawn = overlay(picture, values, "positive", contour=0.5)

    assert (drawn[5, 5:10] == 255).all()
    assert (drawn[4, 5:10] == 20).all()
    assert (drawn[0] == 90).all()


@pytest.mark.parametrize("count", [1, 2, 5])
def test_a_sheet_has_room_for_every_panel(count: int) -> None:
    image = np.full((40, 60, 3), 200, np.uint8)
    panels = [Panel("título " * 20, "", image, ("coolwarm", -1.0, 1.0)) for _ in range(count)]

    page = sheet(panels, "caption")

    rows = -(-count // 4)
    assert page.shape[1] == 16 + min(count, 4) * (320 + 16)
    assert rows * 213 < page.shape[0] < rows * 330 + 60
    assert (page == 200).all(2).sum() > count * 60_000


@pytest.mark.parametrize("shape", [(300, 20), (20, 300), (1, 1)])
def test_the_words_of_a_panel_have_room_beside_a_narrow_picture(shape: tuple[int, int]) -> None:
    image = np.full((*shape, 3), 200, np.uint8)
    panel = Panel("method", "", image, ("coolwarm", -0.00012, 0.00012), "symmetric about 0")

    page = sheet([panel])

    words = (page[-40:] != 255).any(2)
    assert page.shape[1] >= 280 + 2 * 16
    # The ends of the bar and what they are stand apart: three groups with white between them.
    inked = np.flatnonzero(words[:23].any(0))
    assert (np.diff(inked) > 12).sum() == 2


def test_a_preview_is_two_pixels_a_cell_or_shades_of_light() -> None:
    image = np.array([[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [255, 255, 255]]], np.uint8)

    blocks = preview(image, 2, colour=True, unicode=True)
    shades = preview(np.stack([np.zeros((2, 2)), np.full((2, 2), 255)] * 2)[..., None].repeat(3, -1)
                     .reshape(4, 4, 3).astype(np.uint8), 4, colour=False, unicode=True)  # fmt: skip

    assert blocks.plain == "▀▀"
    assert [str(span.style) for span in blocks.spans] == [
        "#ff0000 on #0000ff",
        "#00ff00 on #ffffff",
    ]
    assert set(shades.plain) <= set(" .:-=+*#%@\n")


@pytest.mark.parametrize(("shape", "times"), [((28, 20), 10), ((1, 1), 256), ((255, 9), 2),
                                              ((256, 9), 1), ((30, 900), 1)])  # fmt: skip
def test_a_small_picture_is_drawn_on_as_squares_of_its_pixels(
    shape: tuple[int, int], times: int
) -> None:
    picture = np.random.default_rng(0).integers(0, 255, (*shape, 3), dtype=np.uint8)

    drawn = _canvas(picture)

    assert (drawn == np.kron(picture, np.ones((times, times, 1), np.uint8))).all()


def test_a_picture_of_one_pixel_can_be_drawn() -> None:
    one = np.full((1, 1, 3), 7, np.uint8)

    assert overlay(one, np.ones((1, 1)), "positive").shape == (1, 1, 3)
    assert preview(one, 1, colour=True, unicode=True).plain == "▀"


def drawn_figure(
    format_: str,
    title: str = "tabby, probability 0.7",
    ends: tuple[float, float] = (0.2, 0.9),
) -> bytes:
    picture = np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    return figure(picture, title, "gradcam at layer4", ("inferno", *ends), "min-max", format_)


def test_a_figure_has_title_method_scale_and_the_bars_ends_as_text() -> None:
    text = drawn_figure("svg").decode()

    for word in ("tabby, probability 0.7", "gradcam at layer4", "min-max", ">0.2<", "<image"):
        assert word in text


@pytest.mark.parametrize(
    "ends", [(-0.0217, 0.0217), (0.2, 0.9), (-1.3e-9, 1.3e-9), (0.0, 12345.6), (-3.3e8, 3.3e8),
             (0.5699, 0.57), (100000.57, 100000.62), (0.0, 0.0)],
)  # fmt: skip
def test_the_numbers_below_a_bar_do_not_run_into_one_another_or_the_label(
    ends: tuple[float, float],
) -> None:
    page = ElementTree.fromstring(drawn_figure("svg", ends=ends))
    texts = [
        (float(text.get("y", 0)), float(text.get("x", 0)), text.text or "")
        for text in page.iter("{http://www.w3.org/2000/svg}text")
        if "middle" in text.get("style", "")
    ]

    (label,) = [text for text in texts if "min-max" in text[2]]
    numbers = sorted(text for text in texts if text is not label)
    assert 3 <= len(numbers) <= 6
    assert len({y for y, _, _ in numbers}) == 1
    assert label[0] > numbers[0][0]
    # A digit of DejaVu Sans is 0.64 of the font's size wide.
    for (_, left, one), (_, right, other) in pairwise(numbers):
        assert right - left > 7 * 0.64 * (len(one) + len(other)) / 2


@pytest.mark.parametrize(
    ("end", "said"), [(1.3e-9, "× 1e−9; min-max"), (3.3e8, "× 1e8; min-max"), (0.9, ">min-max")]
)
def test_the_power_of_ten_of_a_bars_numbers_is_said_in_its_label(end: float, said: str) -> None:
    assert said in drawn_figure("svg", ends=(-end, end)).decode()


@pytest.mark.parametrize(("format_", "start"), [("png", b"\x89PNG"), ("pdf", b"%PDF"),
                                                ("svg", b"<?xml")])  # fmt: skip
def test_a_figure_is_the_same_bytes_every_time(format_: str, start: bytes) -> None:
    assert drawn_figure(format_) == drawn_figure(format_)
    assert drawn_figure(format_).startswith(start)


def test_a_long_title_is_wrapped_and_its_signs_are_no_markup() -> None:
    text = drawn_figure("svg", "$x_1$ " + "a very long name of a class " * 4).decode()

    assert "$x_1$" in text
    assert text.count("a very long name") >= 2


def test_all_of_a_figure_lies_within_its_page() -> None:
    image = np.asarray(Image.open(io.BytesIO(drawn_figure("png"))).convert("L"))

    ink = np.argwhere(image < 128)
    assert ink.min() > 2
    assert (ink.max(0) < np.array(image.shape) - 2).all()


def test_figures_without_matplotlib_name_what_to_install(monkeypatch: Any) -> None:
    monkeypatch.setattr("gradscope.attribution.drawing.figure.find_spec", lambda _name: None)

    with pytest.raises(UsageError, match=r"gradscope-diagnostics\[figures\]"):
        check_figures("png")
    with pytest.raises(UsageError, match="png, svg, pdf"):
        check_figures("gif")


@pytest.mark.parametrize(
    ("values", "sign", "said"),
    [([0.2, 0.5], "positive", "min-max: from the least value, 0.2"),
     ([-1.0, 0.5], "positive", "ReLU: negative values cut off"), ([0.0, 1.0], "positive", "starts"),
     ([-1.0, 1.0], "signed", "symmetric about 0"), ([-1.0, -2.0], "positive", "nothing to show")],
)  # fmt: skip
def test_a_bar_says_whether_values_were_cut_off_or_stretched(
    values: list[float], sign: str, said: str
) -> None:
    assert scale(np.array([values]), sign).startswith(said)


def drawn(family: str, sign: str, values: Any) -> tuple[Any, str]:
    return _smoothed(SimpleNamespace(method=SimpleNamespace(family=family, sign=sign)), values)


def test_signed_pixels_are_drawn_under_a_gaussian_of_a_hundredth_of_the_edge() -> None:
    values = np.random.default_rng(0).normal(size=(200, 300)).astype(np.float32)

    found, said = drawn("gradient", "signed", values)

    wanted = gaussian_filter(values.astype(float), 2.0, mode="mirror", truncate=3.0)
    np.testing.assert_allclose(found, wanted, atol=1e-6)
    assert said == "smoothed by 2.0 px"


@pytest.mark.parametrize(
    ("family", "sign", "side"),
    [("gradient", "positive", 200), ("perturbation", "signed", 200), ("gradient", "signed", 20)],
)
def test_other_maps_are_drawn_as_they_are(family: str, sign: str, side: int) -> None:
    values = np.random.default_rng(0).normal(size=(side, side)).astype(np.float32)

    found, said = drawn(family, sign, values)

    assert found is values
    assert said == ""
