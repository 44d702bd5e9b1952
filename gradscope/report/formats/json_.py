"""JSON: the report as contract.md §4 publishes it."""

from __future__ import annotations

import json

from gradscope.report.formats import Display
from gradscope.report.model import AnyReport, as_json


def render(report: AnyReport, display: Display) -> str:  # noqa: ARG001
    """One object, indented; non-finite numbers are strings, names stand verbatim."""
    return json.dumps(as_json(report), indent=1, allow_nan=False) + "\n"
