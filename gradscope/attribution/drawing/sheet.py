"""Several explanations of a picture side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from gradscope.attribution.drawing.colour import Pixels, coloured

_WIDEST = 320
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
    height, width = _fitted(panels[0].image)
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
        _place(page, draw, panel, at, (width, height))
    return np.asarray(page)


def _fitted(image: Pixels) -> tuple[int, int]:
    height, width = image.shape[:2]
    scale = _WIDEST / max(height, width)
    return max(1, round(height * scale)), max(1, round(width * scale))


def _place(
    page: Image.Image,
    draw: ImageDraw.ImageDraw,
    panel: Panel,
    at: tuple[int, int],
    size: tuple[int, int],
) -> None:
    left, top = at
    width, height = size
    draw.text(at, _cut(draw, panel.title, width, _TITLE), "black", _font(_TITLE))
    top += _TITLE + 6
    filter_ = Image.Resampling.LANCZOS
    page.paste(Image.fromarray(panel.image).resize((width, height), filter_), (left, top))
    top += height + 4
    if panel.bar is not None:
        _, low, high = panel.bar
        _draw_bar(page, draw, panel.bar, (left, top), width)
        ends = f"{low:.2g}", f"{high:.2g}"
        draw.text((left, top + _BAR + 2), ends[0], "#555555", _font(_LINE))
        across = draw.textlength(ends[1], _font(_LINE))
        word = _cut(draw, panel.scale, width // 2, _LINE)
        middle = left + (width - draw.textlength(word, _font(_LINE))) / 2
        draw.text((middle, top + _BAR + 2), word, "#555555", _font(_LINE))
        draw.text((left + width - across, top + _BAR + 2), ends[1], "#555555", _font(_LINE))
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
