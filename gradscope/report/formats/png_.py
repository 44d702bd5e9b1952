"""PNG of a report's main chart."""

from __future__ import annotations

from vl_convert import vegalite_to_png

from gradscope.report.formats import FILE, Display
from gradscope.report.formats.svg_ import main_chart
from gradscope.report.model import AnyReport

#: Pixels per unit: sharp in print and on dense screens.
_SCALE = 2.0


def render(report: AnyReport, display: Display = FILE) -> bytes:
    """Raises UsageError where there is nothing to draw."""
    png: bytes = vegalite_to_png(main_chart(report, display), scale=_SCALE)
    return png
