"""JSON: the report as contract.md §4 publishes it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from gradscope.report.formats import FILE, Display
from gradscope.report.model import AnyReport, as_json


def render(report: AnyReport, display: Display = FILE) -> str:  # noqa: ARG001
    """One object; non-finite numbers are strings, names stand verbatim.

    Each finding, tensor and section is a line of its own: readable with ``less``, small in a diff,
    and written by the C encoder, which indentation would bypass at ten times the cost.
    """
    return lined(as_json(report)) + "\n"


def lined(value: Mapping[str, Any]) -> str:
    """JSON with a line for each section, and for each record of a list."""
    return _object(value, 0)


def _object(value: Mapping[str, Any], depth: int) -> str:
    pad = " " * (depth + 1)
    members = ",\n".join(f"{pad}{json.dumps(k)}: {_value(v, depth + 1)}" for k, v in value.items())
    return f"{{\n{members}\n{' ' * depth}}}"


def _value(value: Any, depth: int) -> str:
    if isinstance(value, dict) and depth < 2 and value:
        return _object(value, depth)
    if isinstance(value, list) and depth < 3 and value and isinstance(value[0], dict):
        pad = " " * (depth + 1)
        lines = ",\n".join(pad + json.dumps(item, allow_nan=False) for item in value)
        return f"[\n{lines}\n{' ' * depth}]"
    return json.dumps(value, allow_nan=False)
