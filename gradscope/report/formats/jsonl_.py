"""JSON lines: one finding a line, for streams and log collectors."""

from __future__ import annotations

import json

from gradscope.report.formats import FILE, Display
from gradscope.report.model import AnyReport, as_json


def render(report: AnyReport, display: Display = FILE) -> str:  # noqa: ARG001
    """Findings first, then inputs that failed (with ``kind`` and ``input`` instead of a rule)."""
    records = (*report.findings, *report.errors)
    return "".join(json.dumps(as_json(record), allow_nan=False) + "\n" for record in records)
