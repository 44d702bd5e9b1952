"""One overlay as a figure for a paper: title, class, probability, and a colour bar with its scale.

Needs Matplotlib (the extra ``figures``), for text that stays text in SVG and PDF.
"""

from __future__ import annotations

import io
from importlib.util import find_spec
from textwrap import wrap
from typing import Any

from gradscope.attribution.drawing.colour import COLORMAPS, Pixels
from gradscope.errors import UsageError

FORMATS = ("png", "svg", "pdf")
#: Inches of a column's width and of the tallest picture; dots of a raster.
_WIDTH, _HIGHEST, _DPI = 3.4, 5.0, 300
#: Inches: around everything, a line of the title, and the bar with its numbers and its label.
_MARGIN, _LINE, _FOOT = 0.06, 0.13, 0.55
#: Letters in a line of the title.
_COLUMNS = 62


def check_figures(format_: str) -> None:
    """Raise UsageError for an unknown format, and where Matplotlib is not installed."""
    if format_ not in FORMATS:
        raise UsageError(f"--figure is one of {', '.join(FORMATS)}, not {format_!r}")
    if find_spec("matplotlib") is None:
        raise UsageError(
            "--figure needs Matplotlib: pip install 'gradscope-diagnostics[figures]' (heatmaps and "
            "overlays need nothing)"
        )


def figure(
    image: Pixels,
    title: str,
    subtitle: str,
    bar: tuple[str, float, float],
    scale: str,
    format_: str,
) -> bytes:
    """The picture [H, W, 3] with text and a bar of ``(colormap, low, high)``, as a file's bytes.

    ``scale`` says what the bar's ends are. The same arguments give the same bytes.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    lines = [line for text in (title, subtitle) for line in wrap(text, _COLUMNS)]
    high = min(_WIDTH * image.shape[0] / image.shape[1], _HIGHEST)
    top = _LINE * len(lines) + _MARGIN
    page = _WIDTH + 2 * _MARGIN, top + high + _FOOT
    fixed: Any = {"svg.fonttype": "none", "svg.hashsalt": "gradscope", "pdf.fonttype": 42}
    with rc_context({**fixed, "font.size": 7, "text.parse_math": False}):
        made = Figure(figsize=page, dpi=_DPI)
        made.text(_MARGIN / page[0], 1 - _MARGIN / page[1], "\n".join(lines), va="top", size=7.5)
        axes = made.add_axes(_placed(page, _MARGIN, _FOOT, _WIDTH, high))
        axes.imshow(image, interpolation="lanczos" if format_ == "png" else "none")
        axes.set_axis_off()
        below = made.add_axes(_placed(page, 0.1 * _WIDTH, _FOOT - 0.16, 0.85 * _WIDTH, 0.09))
        _draw_bar(made, below, bar, scale)
        stream = io.BytesIO()
        made.savefig(stream, format=format_, metadata=_undated(format_))
    return stream.getvalue()


def _placed(page: tuple[float, float], *inches: float) -> tuple[float, float, float, float]:
    """Left, bottom, width and height in inches as fractions of the page."""
    left, bottom, width, height = inches
    return left / page[0], bottom / page[1], width / page[0], height / page[1]


def _draw_bar(made: Any, axes: Any, bar: tuple[str, float, float], scale: str) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, Normalize
    from matplotlib.ticker import MaxNLocator, ScalarFormatter

    name, low, high = bar
    colours = ListedColormap(COLORMAPS[name]() / 255)
    # A map with nothing to show still has a bar.
    norm = Normalize(low, high if high > low else low + 1)
    numbers = ScalarFormatter(useOffset=False)
    drawn = made.colorbar(
        ScalarMappable(norm, colours),
        cax=axes,
        orientation="horizontal",
        ticks=MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]),
        format=numbers,
    )
    # Matplotlib would print a power of ten over the label.
    axes.xaxis.get_offset_text().set_visible(False)
    numbers.set_locs(drawn.get_ticks())
    power = numbers.get_offset()
    label = f"× {power}; {scale}" if power else scale
    drawn.set_label("\n".join(wrap(label, _COLUMNS)), labelpad=2)
    axes.tick_params(length=2, pad=2)
    drawn.outline.set_linewidth(0.4)


def _undated(format_: str) -> dict[str, Any]:
    if format_ == "png":
        return {"Software": "gradscope"}
    return {"Date" if format_ == "svg" else "CreationDate": None}
