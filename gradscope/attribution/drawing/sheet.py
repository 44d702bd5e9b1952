"""Several explanations of a picture side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from gradscope.attribution.drawing.colour import Pixels, coloured

#: Of a picture's longer edge, and the least width of a panel, which its words need.
_LONGEST, _NARROWEST = 320, 280
_GAP = 16
_TITLE, _LINE = 16, 13
_BAR = 10
_COLUMNS = 4


@dataclass(frozen=True, eq=False, slots=True)
class Panel:
    """One picture of a sheet: its title, a line of numbers, and what its colours mean."""

    title: str
    subtitle: str
    image: Pixels
    #: Colormap and the values at its ends; None for no bar.
    bar: tuple[str, float, float] | None = None
    #: What the bar's ends are.
    scale: str = ""


def sheet(panels: Sequence[Panel], caption: str = "") -> Pixels:
    """Panels in rows of up to four on a white page [H, W, 3]."""
    height, across = _fitted(panels[0].image)
    width = max(across, _NARROWEST)
    columns = min(_COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    tall = _TITLE + 6 + height + 4 + _BAR + 4 + _LINE + 4 + _LINE
    top = _GAP + (_TITLE + _GAP if caption else 0)
    size = (_GAP + columns * (width + _GAP), top + rows * (tall + _GAP))
    page = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(page)
    if caption:
        draw.text((_GAP, _GAP), _cut(draw, caption, size[0] - 2 * _GAP, _TITLE), "black",
                  _font(_TITLE))  # fmt: skip
    for number, panel in enumerate(panels):
        row, column = divmod(number, columns)
        at = (_GAP + column * (width + _GAP), top + row * (tall + _GAP))
        _place(page, draw, panel, at, (across, height), width)
    return np.asarray(page)


def _fitted(image: Pixels) -> tuple[int, int]:
    height, width = image.shape[:2]
    scale = _LONGEST / max(height, width)
    return max(1, round(height * scale)), max(1, round(width * scale))


def _place(
    page: Image.Image,
    draw: ImageDraw.ImageDraw,
    panel: Panel,
    at: tuple[int, int],
    size: tuple[int, int],
    width: int,
) -> None:
    """Draw a panel of a width, with its picture at ``size``."""
    left, top = at
    draw.text(at, _cut(draw, panel.title, width, _TITLE), "black", _font(_TITLE))
    top += _TITLE + 6
    filter_ = Image.Resampling.LANCZOS
    page.paste(Image.fromarray(panel.image).resize(size, filter_), (left, top))
    top += size[1] + 4
    if panel.bar is not None:
        _, low, high = panel.bar
        _draw_bar(page, draw, panel.bar, (left, top), width)
        said = f"{low:.2g}", panel.scale, f"{high:.2g}"
        for place, (anchor, word) in enumerate(zip(("la", "ma", "ra"), said, strict=True)):
            where = (left + place * width / 2, top + _BAR + 2)
            draw.text(where, word, "#555555", _font(_LINE), anchor=anchor)
    top += _BAR + 4 + _LINE + 4
    draw.text((left, top), _cut(draw, panel.subtitle, width, _LINE), "#555555", _font(_LINE))


def _draw_bar(
    page: Image.Image,
    draw: ImageDraw.ImageDraw,
    bar: tuple[str, float, float],
    at: tuple[int, int],
    width: int,
) -> None:
    name, low, _ = bar
    ramp = np.linspace(-1 if low < 0 else 0, 1, width)[None].repeat(_BAR, 0)
    page.paste(Image.fromarray(coloured(ramp, name)), at)
    draw.rectangle((*at, at[0] + width - 1, at[1] + _BAR - 1), outline="#bbbbbb")


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _cut(draw: ImageDraw.ImageDraw, text: str, width: int, size: int) -> str:
    if draw.textlength(text, _font(size)) <= width:
        return text
    while text and draw.textlength(text + "…", _font(size)) > width:
        text = text[:-1]
    return text + "…"
