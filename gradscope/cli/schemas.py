"""The published JSON Schemas, made from the models."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from pydantic import TypeAdapter

from gradscope.attribution.result import ExplainReport, VisualizeReport
from gradscope.flow.result import FlowReport
from gradscope.histories.schema import meta_schema
from gradscope.report.model import SCHEMA_VERSION
from gradscope.weights.result import WeightsReport


def report_schema() -> dict[str, Any]:
    """The schema of the JSON report of any command, draft 2020-12."""
    reports: TypeAdapter[Any] = TypeAdapter(
        WeightsReport | FlowReport | ExplainReport | VisualizeReport
    )
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": f"urn:gradscope:report:{SCHEMA_VERSION}",
        "title": "gradscope report",
    } | reports.json_schema(mode="serialization")


#: By what has a schema.
SCHEMAS: Mapping[str, Callable[[], dict[str, Any]]] = {
    "report": report_schema,
    "history": meta_schema,
}
