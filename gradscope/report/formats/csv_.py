"""CSV: one row for each tensor (layer, image) of the result, for spreadsheets and data frames."""

from __future__ import annotations

import csv
import io
import json
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

from gradscope.report.formats import FILE, Display
from gradscope.report.model import AnyReport, Finding, Record, as_json
from gradscope.text import escaped


def render(report: AnyReport, display: Display = FILE) -> str:  # noqa: ARG001
    """Nested values become columns with dotted names; lists are JSON; undefined is empty.

    Each row names its input and its findings; a finding about something else, such as a whole
    checkpoint, has a row of its own.
    """
    rows = list(_rows(report))
    columns = list(dict.fromkeys(name for row in rows or (_NONE,) for name in row))
    out = io.StringIO()
    writer = csv.DictWriter(out, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


#: The columns of a report without a row, for data frames will read it, too.
_NONE = ("subject", "input", "findings")


def _rows(report: AnyReport) -> Iterator[dict[str, object]]:
    only = report.inputs[0].path if len(report.inputs) == 1 else ""
    found: dict[tuple[str, str], list[Finding]] = defaultdict(list)
    for finding in report.findings:
        found[finding.input, finding.subject].append(finding)
    first = "subject"
    for item in _items(report.result):
        row = dict(_flat(as_json(item)))
        first = next(iter(row))
        input_ = getattr(item, "input", only)
        about = found.pop((input_, getattr(item, "subject", "")), [])
        yield row | {"input": _inert(input_), "findings": _named(about)}
    for (input_, subject), about in found.items():
        yield {first: _inert(subject), "input": _inert(input_), "findings": _named(about)}


def _items(result: Any) -> tuple[Any, ...]:
    """The first list of records in a result: its tensors, layers or explanations."""
    lists = (value for _, value in result or () if isinstance(value, tuple))
    return next((items for items in lists if items and isinstance(items[0], Record)), ())


def _named(findings: list[Finding]) -> str:
    return "; ".join(f"{f.severity} {f.rule} {f.name}" for f in findings)


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
    shown = escaped(text)
    return "'" + shown if shown[:1] in ("=", "+", "-", "@") and shown not in _SIGNED else shown


_SIGNED = ("-Infinity",)
