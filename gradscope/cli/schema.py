"""``gradscope schema``."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from enum import StrEnum
from typing import Annotated, Any, Union

import typer

from gradscope.cli.command import command
from gradscope.cli.terminal import emit


class Subject(StrEnum):
    """What has a schema."""

    REPORT = "report"
    CONFIG = "config"
    HISTORY = "history"


@command
def schema(subject: Annotated[Subject, typer.Argument(help="Whose schema.")]) -> int:
    """The JSON Schema of what gradscope writes and of its configuration."""
    emit(json.dumps(_SCHEMAS[subject](), indent=1) + "\n")
    return 0


def report_schema() -> dict[str, Any]:
    """The schema of the JSON report of any command, draft 2020-12."""
    from pydantic import TypeAdapter
    from pydantic.json_schema import GenerateJsonSchema

    from gradscope.merging import MERGERS
    from gradscope.report.model import NUMBER_SCHEMA, SCHEMA_VERSION
    from gradscope.saved import KINDS, kind, part_kind

    class AnyFloat(GenerateJsonSchema):
        """Any float may be beyond the numbers that JSON has: float64 weights have such norms."""

        def float_schema(self, schema: Any) -> dict[str, Any]:  # noqa: ARG002
            return dict(NUMBER_SCHEMA)

    written: Any = Union[*map(kind, KINDS), *map(part_kind, MERGERS)]
    reports: TypeAdapter[Any] = TypeAdapter(written)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": f"urn:gradscope:report:{SCHEMA_VERSION}",
        "title": "gradscope report",
    } | reports.json_schema(mode="serialization", schema_generator=AnyFloat)


def _history() -> dict[str, Any]:
    from gradscope.histories.format import meta_schema

    return meta_schema()


def config_schema() -> dict[str, Any]:
    """The schema of gradscope.toml, with every rule and threshold there is."""
    from gradscope.report.config import Config
    from gradscope.report.rules import load_rules
    from gradscope.report.severity import Severity

    schema = Config.model_json_schema()
    severity = {"enum": list(Severity), "description": "The severity of all its findings."}
    rules = {
        name: {
            "type": "object",
            "description": rule.summary,
            "additionalProperties": False,
            "properties": {
                "severity": severity,
                **{
                    threshold: {
                        "type": "integer" if isinstance(value, int) else "number",
                        "default": value,
                    }
                    for threshold, value in rule.thresholds.items()
                },
            },
        }
        for rule in load_rules().values()
        for name in (rule.name, rule.code)
    }
    schema["properties"]["rules"] |= {"additionalProperties": False, "properties": rules}
    return (
        {
            "$schema": "https://json-schema.org/draft/2020-12/schema",
            "$id": "urn:gradscope:config:1.0",
        }
        | schema
        | {"title": "gradscope.toml"}
    )


_SCHEMAS: Mapping[Subject, Callable[[], dict[str, Any]]] = {
    Subject.REPORT: report_schema,
    Subject.CONFIG: config_schema,
    Subject.HISTORY: _history,
}
