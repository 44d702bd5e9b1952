"""A picture in a terminal: two pixels per cell, one above the other."""

from __future__ import annotations

import numpy as np
from PIL import Image
from rich.text import Text

from gradscope.attribution.drawing.colour import Pixels

_SHADES = " .:-=+*#%@"


def preview(image: Pixels, columns: int, *, colour: bool, unicode: bool) -> Text:
    """The picture [H, W, 3], ``columns`` cells wide; without colours, in shades of grey."""
    height = max(1, round(image.shape[0] * columns / image.shape[1]))
    height += height % 2
    small = np.asarray(Image.fromarray(image).resize((columns, height), Image.Resampling.BOX))
    if colour and unicode:
        return Text("\n").join(_blocks(small[row], small[row + 1]) for row in range(0, height, 2))
    light = small @ np.array([0.2126, 0.7152, 0.0722])
    rows = (light[0::2] + light[1::2]) / 2
    shades = np.clip(rows / 256 * len(_SHADES), 0, len(_SHADES) - 1).astype(int)
    return Text("\n".join("".join(_SHADES[shade] for shade in row) for row in shades))


def _blocks(upper: Pixels, lower: Pixels) -> Text:
    text = Text()
    for above, below in zip(upper.tolist(), lower.tolist(), strict=True):
        front, back = ("#{:02x}{:02x}{:02x}".format(*colour) for colour in (above, below))
        text.append("▀", f"{front} on {back}")
    return text
