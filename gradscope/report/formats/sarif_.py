"""SARIF 2.1.0 (OASIS), as GitHub code scanning takes it.

GitHub rejects a whole file for one result without a line in a file, and keeps 5,000 results of a
run: each finding stands at line 1 of its input, or of the anchor, and the worst come first.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any
from urllib.parse import quote

from gradscope.report.formats import FILE, Display
from gradscope.report.formats.places import LEVELS, place
from gradscope.report.model import AnyReport, Finding, as_json
from gradscope.report.rules import Rule, load_rules
from gradscope.text import escaped, plural, shortened

SCHEMA = (
    "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"
)
HOME = "https://github.com/gradscope/gradscope"
_MOST = 5_000
_KINDS = {"tensors": "tensor", "layers": "layer", "images": "image"}
_STATES = {"new": "new", "unchanged": "unchanged", "worsened": "updated"}
#: GitHub refuses texts that are longer.
_LONGEST = 1_000


def render(report: AnyReport, display: Display = FILE) -> str:
    """One run. Empty texts count as missing at GitHub, and null is against the schema."""
    shown = report.findings[:_MOST]
    codes = list(dict.fromkeys(f.rule for f in shown))
    known = load_rules()
    log = {
        "$schema": SCHEMA,
        "version": "2.1.0",
        "runs": [
            {
                "tool": {
                    "driver": {
                        "name": "gradscope",
                        "version": report.tool.version,
                        "informationUri": HOME,
                        "rules": [_rule(code, known.get(code), shown) for code in codes],
                    }
                },
                # Of what has the same category, GitHub keeps the last alone.
                "automationDetails": {
                    "id": "/".join(filter(None, ("gradscope", report.command, report.part))) + "/"
                },
                "columnKind": "utf16CodeUnits",
                "originalUriBaseIds": {"%SRCROOT%": {"description": {"text": "The checkout."}}},
                "invocations": [_invocation(report)],
                "results": list(_results(report, shown, codes, display)),
            }
        ],
    }
    return json.dumps(log, indent=1, allow_nan=False) + "\n"


def _rule(code: str, rule: Rule | None, findings: Iterable[Finding]) -> Mapping[str, Any]:
    """A rule as it documents itself; of a plug-in that is not installed, as it was found."""
    first = next(f for f in findings if f.rule == code)
    summary = rule.summary if rule else first.name
    text = rule.documentation if rule else first.recommendation
    severity = rule.always or rule.severity if rule else first.severity
    return {
        "id": code,
        "name": "".join(part.capitalize() for part in first.name.split("-")),
        "shortDescription": {"text": f"{first.name}: {summary}"[:_LONGEST]},
        "fullDescription": {"text": summary[:_LONGEST]},
        "help": {"text": text or summary},
        "defaultConfiguration": {"level": LEVELS[severity]},
        "properties": {"tags": [rule.reads.command] if rule else ["gradscope"]},
    }


def _invocation(report: AnyReport) -> Mapping[str, Any]:
    said = [
        *(("error", f"{e.input}: {e.message}") for e in report.errors),
        *(("error", reason) for reason in report.gate.reasons if report.gate.exit_code == 4),
        *(("warning", f"not evaluated: {n.rule}: {n.reason}")
          for n in report.coverage.not_evaluated),
        *(("warning", f"not analysed: {shortened(s.subject)}: {s.reason}")
          for s in report.coverage.skipped[:100]),
        *(("note", note) for note in report.gate.notes),
    ]  # fmt: skip
    if len(report.findings) > _MOST:
        rest = plural(len(report.findings) - _MOST, "finding")
        said.append(
            ("warning", f"{rest} left out, the least severe or known: a run holds {_MOST:,}")
        )
    return {
        "executionSuccessful": report.gate.exit_code in (0, 1),
        "exitCode": report.gate.exit_code,
        "toolExecutionNotifications": [
            {"level": level, "message": {"text": escaped(text)}} for level, text in said
        ],
    }


def _results(
    report: AnyReport, findings: Iterable[Finding], codes: list[str], display: Display
) -> Iterator[Mapping[str, Any]]:
    compared = any(f.state != "new" for f in report.findings)
    seen: Counter[str] = Counter()
    for finding in findings:
        seen[finding.fingerprint] += 1
        result = {
            "ruleId": finding.rule,
            "ruleIndex": codes.index(finding.rule),
            "kind": "fail",
            "level": LEVELS[finding.severity],
            "message": {"text": _sentence(finding)},
            "locations": [_location(finding, _KINDS[report.coverage.unit], display)],
            "partialFingerprints": {
                "primaryLocationLineHash": f"{finding.fingerprint}:{seen[finding.fingerprint]}",
                "gradscope/v1": finding.fingerprint,
            },
            "properties": _properties(finding),
        }
        if compared:
            result["baselineState"] = _STATES[finding.state]
        if finding.state == "unchanged":
            why = escaped(finding.allowed) if finding.allowed else "in the baseline"
            result["suppressions"] = [{"kind": "external", "justification": why}]
        yield result


def _sentence(finding: Finding) -> str:
    return (
        f"{shortened(finding.subject)}: {escaped(finding.message)}. "
        f"What to do: {escaped(finding.recommendation)}."
    )


def _location(finding: Finding, kind: str, display: Display) -> Mapping[str, Any]:
    name = shortened(finding.subject)
    return {
        "physicalLocation": {
            "artifactLocation": {
                "uri": quote(place(finding.input, display).encode("utf-8", "backslashreplace")),
                "uriBaseId": "%SRCROOT%",
            },
            "region": {"startLine": 1, "startColumn": 1, "endLine": 1, "endColumn": 1},
        },
        "logicalLocations": [
            {
                "fullyQualifiedName": name,
                "name": name.rpartition(".")[2] or name,
                "kind": kind,
            }
        ],
    }


def _properties(finding: Finding) -> Mapping[str, Any]:
    facts: Mapping[str, Any] = {
        "severity": str(finding.severity),
        "input": escaped(finding.input),
        **{
            name: escaped(value) if isinstance(value, str) else value
            for name, value in as_json(finding)["evidence"].items()
        },
        "threshold": as_json(finding)["threshold"],
    }
    return {name: value for name, value in facts.items() if value is not None}
