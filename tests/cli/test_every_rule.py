"""A gate that cannot fail is worse than none: the fault of every rule, through the command line
that the GitHub Action runs, and through every format.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from typer.testing import CliRunner

from gradscope.cli import app
from gradscope.report.formats import BUILT_IN
from gradscope.report.rules import load_rules
from gradscope.report.severity import Severity

pytest.importorskip("yaml", reason="PyYAML is of the test extra: run `make test`")

from ..workflows import run_action
from .faulty import FAULTS

RULES = {rule.name: rule for rule in load_rules().values()}


@dataclass(frozen=True)
class Run:
    """How a run ended, and its reports by format."""

    code: int
    reports: dict[str, str]

    @property
    def report(self) -> Any:
        return json.loads(self.reports["json"])


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[str]]:
    """The arguments that the Action gives to `gradscope`, which only writes them down."""
    folder = tmp_path_factory.mktemp("action")
    program = folder / "bin" / "gradscope"
    program.parent.mkdir()
    program.write_text('#!/bin/sh\nprintf "%s\\0" "$@" > asked\n')
    program.chmod(0o755)
    path = os.environ | {"PATH": f"{program.parent}{os.pathsep}{os.environ['PATH']}"}

    def run(**given: str) -> list[str]:
        assert run_action(folder, path, **given).returncode == 0
        return (folder / "asked").read_text().split("\0")[:-1]

    return run


@pytest.fixture(scope="module", params=RULES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def runs(name: str, asked: Callable[..., list[str]], tmp_path_factory) -> tuple[Run, Run]:
    """The rule's fault at a --fail-on of its severity, and at the one above."""
    folder = tmp_path_factory.mktemp("fault")
    fault = FAULTS[name]
    inputs, options = fault.plant(folder)

    def run(fail_on: str) -> Run:
        words = " ".join([*options, "--select", RULES[name].code, "--isolated"])
        given = {"files": "\n".join(inputs), "command": RULES[name].reads.command}
        arguments = asked(**given, fail_on=fail_on, args=words)
        done = CliRunner().invoke(app, arguments)
        pairs = (v.split("=", 1) for o, v in pairwise(arguments) if o == "--report")
        return Run(done.exit_code, {form: Path(path).read_text() for form, path in pairs})

    severity = FAULTS[name].severity
    return run(severity), run(above(severity))


def above(severity: str) -> str:
    return next((s.value for s in Severity if s.rank > Severity(severity).rank), "never")


def test_every_rule_has_a_fault() -> None:
    assert set(FAULTS) == set(RULES)


def test_it_fails_the_job_at_its_severity_and_not_above(name: str, runs: tuple[Run, Run]) -> None:
    code = FAULTS[name].code

    assert [run.code for run in runs] == [code, code if code == 3 else 0]
    for run in runs:
        severities = {f["name"]: f["severity"] for f in reversed(run.report["findings"])}
        assert severities == {name: FAULTS[name].severity}
        assert run.report["gate"]["exit_code"] == run.code
    assert "at or above" in runs[0].report["gate"]["reasons"][-1]
    assert not any("at or above" in reason for reason in runs[1].report["gate"]["reasons"])


#: Of a format: the codes of the findings that its text tells, and whether the run failed; None
#: where it does not say.
Told = tuple[set[str], bool | None]


def _json(text: str) -> Told:
    read = json.loads(text)
    return {f["rule"] for f in read["findings"]}, read["gate"]["failed"]


def _jsonl(text: str) -> Told:
    return {r["rule"] for r in map(json.loads, text.splitlines()) if "rule" in r}, None


def _csv(text: str) -> Told:
    rows = csv.DictReader(io.StringIO(text))
    return {
        found.split()[1] for row in rows for found in row["findings"].split("; ") if found
    }, None


def _sarif(text: str) -> Told:
    (run,) = json.loads(text)["runs"]
    return {r["ruleId"] for r in run["results"]}, run["invocations"][0]["exitCode"] != 0


def _junit(text: str) -> Told:
    suites = ElementTree.fromstring(text.encode())
    names = (case.get("name").split()[0] for case in suites.iter("testcase"))
    codes = {word for word in names if re.fullmatch(r"[A-Z]\d{3}", word)}
    return codes, any(suites.get(kind) != "0" for kind in ("failures", "errors"))


def _github(text: str) -> Told:
    return set(re.findall(r"^::\w+ (?:file=[^,]*,line=1,)?title=(\w+) [\w-]+ \(", text, re.M)), None


def _shown(code: str, failed: str) -> Callable[[str], Told]:
    """Codes where findings stand, and the words of a run that failed."""
    return lambda text: (set(re.findall(code, text, re.M)), failed in text)


TOLD: dict[str, Callable[[str], Told]] = {
    "table": _shown(r"^  [A-Z]+ +([A-Z]\d{3}) ", "\nFAILED "),
    "json": _json,
    "jsonl": _jsonl,
    "csv": _csv,
    "markdown": _shown(r"^\| [A-Z]+ \| ([A-Z]\d{3}) ", ": FAILED\n"),
    "github": _github,
    "sarif": _sarif,
    "junit": _junit,
    "html": _shown(r"<strong>([A-Z]\d{3}) ", "</span> Failed"),
    "model-card": _shown(r"^\| [a-z]+ \| ([A-Z]\d{3}) ", "` failed."),
}


def test_every_format_tells_it_and_whether_it_failed(
    name: str, runs: tuple[Run, Run], tmp_path: Path
) -> None:
    for run in runs:
        (tmp_path / "report.json").write_text(run.reports["json"])
        for format_ in BUILT_IN:
            done = CliRunner().invoke(app, ["render", str(tmp_path / "report.json"), "-f", format_])

            codes, failed = TOLD[format_](done.stdout)
            assert (done.exit_code, codes) == (0, {RULES[name].code}), format_
            assert failed in (run.code != 0, None), format_
            assert run.reports.get(format_, done.stdout) == done.stdout, format_
