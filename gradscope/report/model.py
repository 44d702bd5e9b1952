"""The report: the JSON object of every command, typed. Formats and the gate see nothing else."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from typing import Annotated, Any, Generic, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, WithJsonSchema

from gradscope import __version__
from gradscope.report.severity import Severity as Severity

SCHEMA_VERSION = "1.0"


_NON_FINITE = ("NaN", "Infinity", "-Infinity")


def _number(value: object) -> object:
    """Take the strings that stand for numbers JSON cannot write."""
    return float(value) if isinstance(value, str) and value in _NON_FINITE else value


_NUMBER_SCHEMA = {"anyOf": [{"type": "number"}, {"type": "string", "enum": list(_NON_FINITE)}]}
#: A float that may be non-finite: in JSON then the string "NaN", "Infinity" or "-Infinity".
Number = Annotated[float, BeforeValidator(_number), WithJsonSchema(_NUMBER_SCHEMA)]
#: What a finding's evidence holds.
Fact = int | Number | str


class Record(BaseModel):
    """Base of the report's parts: frozen, complete, non-finite numbers as strings."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")


class Tool(Record):
    """Which program wrote the report."""

    name: str = "gradscope"
    version: str = __version__


class Input(Record):
    """One input as it was found."""

    path: str
    format: str
    bytes: int


class Skip(Record):
    """Something that was not analysed, and why."""

    subject: str
    reason: str


class NotEvaluated(Record):
    """A rule that could not be asked, and why: missing is not healthy."""

    rule: str
    reason: str


class Coverage(Record):
    """How much of the inputs the result rests on."""

    analyzed: int
    total: int
    unit: Literal["tensors", "layers", "images"]
    bytes: int
    skipped: tuple[Skip, ...] = ()
    not_evaluated: tuple[NotEvaluated, ...] = ()


class Finding(Record):
    """What a rule found of one subject."""

    rule: str
    name: str
    severity: Severity
    subject: str
    message: str
    evidence: Mapping[str, Fact]
    threshold: Number | None
    recommendation: str
    fingerprint: str
    state: Literal["new", "unchanged", "worsened"] = "new"


class Gate(Record):
    """Whether the run fails, and why."""

    fail_on: str
    failed: bool
    exit_code: int
    reasons: tuple[str, ...]


class InputFailure(Record):
    """An input, or a part of one, that could not be read."""

    input: str
    kind: str
    message: str


R = TypeVar("R")


class Report(Record, Generic[R]):
    """The envelope of contract.md §4; ``result`` is the command's own section."""

    schema_version: str = SCHEMA_VERSION
    tool: Tool = Tool()
    command: str
    inputs: tuple[Input, ...]
    coverage: Coverage
    findings: tuple[Finding, ...]
    result: R | None
    gate: Gate
    errors: tuple[InputFailure, ...] = ()


AnyReport = Report[Any]


def fingerprint(rule: str, subject: str, artefact: str = "") -> str:
    """The identity of a finding: the rule and what it is about, never a measured value.

    ``artefact`` tells several inputs of one run apart.
    """
    return hashlib.sha256("\0".join((rule, artefact, subject)).encode()).hexdigest()[:32]


def finite(value: float | None) -> float | None:
    """None for what is not a number worth writing."""
    return value if value is not None and math.isfinite(value) else None
