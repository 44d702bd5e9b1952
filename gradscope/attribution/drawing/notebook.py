"""An attribution in a notebook: the maps by themselves, each over nothing."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Iterator
from io import BytesIO
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from gradscope.attribution.drawing.colour import Floats
from gradscope.attribution.drawing.overlay import heatmap, scale
from gradscope.attribution.methods import method_named
from gradscope.notebook import name, shown, table, words
from gradscope.text import plural

if TYPE_CHECKING:
    from gradscope.attribution.attribute import Attribution

#: Maps that are drawn, and the longer edge of one in pixels.
_MOST = 16
_EDGE = 224


def attribution_html(found: Attribution) -> str:
    """Method, layer and shape; of each image the map, target, score and greatest value."""
    layer = "" if found.layer is None else f" at {name(found.layer)}"
    shape = "×".join(map(str, found.values.shape))
    rest = len(found.upsampled) - _MOST
    return shown(
        f"<p><strong>{words(found.method)}</strong>{layer} · values {shape}</p>",
        table(("map", "target", "score", "least", "greatest", "colours"), _rows(found)),
        f"<p>… and {plural(rest, 'map')} more, in <code>.upsampled</code></p>" if rest > 0 else "",
    )


def _rows(found: Attribution) -> Iterator[tuple[str, ...]]:
    sign = method_named(found.method).sign
    maps = found.upsampled[:_MOST].detach().cpu().double().numpy()
    scores = found.diagnostics.get("scores", ())
    for number, values in enumerate(maps):
        yield (
            f'<img alt="map {number}" src="{_picture(values, sign)}">',
            str(found.target[number]),
            f"{scores[number]:.4g}" if number < len(scores) else "–",
            f"{np.min(values):.3g}",
            f"{np.max(values):.3g}",
            words(scale(values, sign)),
        )


def _picture(values: Floats, sign: str) -> str:
    """A PNG as a data URL; small maps are enlarged without smoothing."""
    drawn = Image.fromarray(heatmap(values, sign))
    factor = _EDGE / max(drawn.size)
    edges = [max(1, round(edge * factor)) for edge in drawn.size]
    smoothing = Image.Resampling.NEAREST if factor > 1 else Image.Resampling.BOX
    file = BytesIO()
    drawn.resize((edges[0], edges[1]), smoothing).save(file, "PNG", optimize=True)
    return f"data:image/png;base64,{b64encode(file.getvalue()).decode()}"
