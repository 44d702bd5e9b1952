"""JSON: the report as contract.md §4 publishes it."""

from __future__ import annotations

import json

from gradscope.report.formats import Display
from gradscope.report.model import AnyReport


def render(report: AnyReport, display: Display) -> str:  # noqa: ARG001
    """One object, indented; non-finite numbers are strings, names stand verbatim."""
    return json.dumps(report.model_dump(mode="json"), indent=1, allow_nan=False) + "\n"
