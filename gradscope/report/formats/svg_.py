"""SVG of a report's main chart, for a paper or a README."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from vl_convert import vegalite_to_svg

from gradscope.errors import UsageError
from gradscope.report.formats import FILE, Display
from gradscope.report.model import AnyReport
from gradscope.report.palettes import palette
from gradscope.report.panels import Chart, panels_of, plain


def render(report: AnyReport, display: Display = FILE) -> str:
    """Raises UsageError where there is nothing to draw."""
    svg: str = vegalite_to_svg(main_chart(report, display))
    return svg


def main_chart(report: AnyReport, display: Display) -> dict[str, Any]:
    """The Vega-Lite specification of a report's first chart, coloured for white paper."""
    chart = next((p for p in panels_of(report) if isinstance(p, Chart)), None)
    if chart is None:
        raise UsageError(f"this report of gradscope {report.command} has no chart to draw")
    light = palette(display.colors).light
    coloured: dict[str, Any] = json.loads(_coloured(json.dumps(plain(chart.spec)), light))
    return {**coloured, "title": chart.title, "background": light["bg"]}


def _coloured(spec: str, colours: Mapping[str, str]) -> str:
    """A specification with the names of colours replaced, as the page's script does."""
    return re.sub(r'"@@([a-z0-9]+)"', lambda found: json.dumps(colours[found[1]]), spec)
