"""CSV: one row for each tensor (layer, image) of the result, for spreadsheets and data frames."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping
from typing import Any

from gradscope.report.formats import Display
from gradscope.report.model import AnyReport, as_json


def render(report: AnyReport, display: Display) -> str:  # noqa: ARG001
    """Nested values become columns with dotted names; lists are JSON; undefined is empty."""
    result = as_json(report)["result"] or {}
    rows = [
        dict(_flat(item)) for item in next((v for v in result.values() if isinstance(v, list)), [])
    ]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    out = io.StringIO()
    writer = csv.DictWriter(out, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def _flat(item: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, object]]:
    for name, value in item.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        elif isinstance(value, list):
            yield prefix + name, json.dumps(value)
        elif isinstance(value, str):
            yield prefix + name, _inert(value)
        elif value is not None:
            yield prefix + name, value


def _inert(text: str) -> str:
    """Names come from strangers: no control characters, and nothing a spreadsheet would run."""
    escaped = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return (
        "'" + escaped if escaped[:1] in ("=", "+", "-", "@") and escaped not in _SIGNED else escaped
    )


_SIGNED = ("-Infinity",)
