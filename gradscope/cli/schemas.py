"""The published JSON Schemas, made from the models."""

from __future__ import annotations

from typing import Any

from gradscope.report.model import SCHEMA_VERSION
from gradscope.weights.result import WeightsReport


def report_schema() -> dict[str, Any]:
    """The schema of the JSON report, draft 2020-12."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": f"urn:gradscope:report:{SCHEMA_VERSION}",
        "title": "gradscope report",
    } | WeightsReport.model_json_schema(mode="serialization")
