"""The report: the JSON object of every command, typed. Formats and the gate see nothing else."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from typing import Annotated, Any, Generic, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, WithJsonSchema

from gradscope.report.severity import Severity as Severity
from gradscope.version import __version__

SCHEMA_VERSION = "1.0"


_NON_FINITE = ("NaN", "Infinity", "-Infinity")


def _number(value: object) -> object:
    """Take the strings that stand for numbers JSON cannot write."""
    return float(value) if isinstance(value, str) and value in _NON_FINITE else value


#: How the JSON report spells a float, wherever it stands.
NUMBER_SCHEMA = {"anyOf": [{"type": "number"}, {"type": "string", "enum": list(_NON_FINITE)}]}
#: A float that may be non-finite: in JSON then the string "NaN", "Infinity" or "-Infinity".
Number = Annotated[float, BeforeValidator(_number), WithJsonSchema(NUMBER_SCHEMA)]
#: What a finding's evidence holds.
Fact = int | Number | str


class Record(BaseModel):
    """Base of the report's parts: frozen and complete."""

    model_config = ConfigDict(frozen=True, extra="forbid")


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
    #: Losses are those of a run that logged no gradients.
    unit: Literal["tensors", "layers", "images", "losses"]
    bytes: int
    #: Names of the rules that were asked, those not evaluated included.
    rules: tuple[str, ...] = ()
    #: The options by which only a part was looked at.
    narrowed: tuple[str, ...] = ()
    skipped: tuple[Skip, ...] = ()
    not_evaluated: tuple[NotEvaluated, ...] = ()


class Finding(Record):
    """What a rule found of one subject."""

    rule: str
    name: str
    severity: Severity
    subject: str
    #: The input that it is about, as it was given.
    input: str
    message: str
    evidence: Mapping[str, Fact]
    threshold: Number | None
    recommendation: str
    fingerprint: str
    #: To the baseline and the allow-list: an unchanged one does not fail the run.
    state: Literal["new", "unchanged", "worsened"] = "new"
    #: Why it is allowed, in the words of the configuration.
    allowed: str | None = None


class Gate(Record):
    """Whether the run fails, and why."""

    fail_on: str
    failed: bool
    exit_code: int
    reasons: tuple[str, ...]
    #: What became of the baseline and the allow-list: entries that are stale or have expired.
    notes: tuple[str, ...] = ()


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

    @property
    def part(self) -> str:
        """Which part of a run it is of, as ``0/4``; empty of a whole run."""
        return ""

    @property
    def verdict(self) -> str:
        """What became of the gate. A part that does not fail it says nothing of the whole."""
        return "failed" if self.gate.failed else f"part {self.part}" if self.part else "passed"

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        from gradscope.report.notebook import report_html

        return report_html(self)


AnyReport = Report[Any]


def as_json(record: Record) -> Any:
    """A report's part as JSON values, non-finite numbers as strings.

    Not pydantic's own JSON: that cannot write names with lone surrogates, which a JSON header may
    spell, and leaves non-finite floats as they are in this mode.
    """
    return _strict(record.model_dump(mode="python"))


def _strict(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else _spelled(value)
    if isinstance(value, Mapping):
        return {str(key): _strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(item) for item in value]
    return value


def _spelled(value: float) -> str:
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def place_in(input_: str, subject: str) -> str:
    """What a finding is about within its input; empty where that is all of it, whatever its path.

    A run's next checkpoint has the same fault under another name.
    """
    return "" if subject == input_ else subject


def fingerprint(rule: str, subject: str, artefact: str = "") -> str:
    """The identity of a finding: the rule and what it is about, never a measured value.

    ``artefact`` tells several inputs of one run apart.
    """
    named = "\0".join((rule, artefact, subject)).encode("utf-8", "surrogatepass")
    return hashlib.sha256(named).hexdigest()[:32]
