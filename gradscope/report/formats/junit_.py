"""JUnit XML, in the dialect that Jenkins, GitLab and pytest share.

A test case for each finding and for each rule that found nothing. What fails the gate is a
failure, what could not be read an error, what could not be asked skipped.
"""

from __future__ import annotations

from collections.abc import Iterator
from xml.etree import ElementTree

from gradscope.report.formats import FILE, Display
from gradscope.report.gate import fails
from gradscope.report.model import AnyReport, Finding
from gradscope.text import escaped, listed, shortened

Element = ElementTree.Element


def render(report: AnyReport, display: Display = FILE) -> str:  # noqa: ARG001
    """One suite; times are left out, so that the same report has the same bytes."""
    cases = list(_cases(report))
    counts = {
        "tests": len(cases),
        **{
            f"{kind}s" if kind != "skipped" else kind: sum(c.find(kind) is not None for c in cases)
            for kind in ("failure", "error", "skipped")
        },
    }
    shown = {name: str(count) for name, count in counts.items()}
    suites = Element("testsuites", {"name": "gradscope", **shown})
    suite = ElementTree.SubElement(suites, "testsuite", {"name": _named(report), **shown})
    suite.extend(cases)
    ElementTree.indent(suites)
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{ElementTree.tostring(suites, "unicode")}\n'


def _named(report: AnyReport) -> str:
    """The command and what it looked at: several suites stand in one report of a job."""
    paths = dict.fromkeys((*(i.path for i in report.inputs), *(e.input for e in report.errors)))
    return f"{_home(report)} {listed(map(shortened, paths), len(paths))}".rstrip()


def _home(report: AnyReport) -> str:
    return f"gradscope.{report.command}"


def _cases(report: AnyReport) -> Iterator[Element]:
    home = _home(report)
    for failure in report.errors:
        case = _case(f"{home}.inputs", failure.input)
        _said(case, "error", failure.kind, failure.message, "")
        yield case
    if report.gate.exit_code == 4:
        case = _case(f"{home}.inputs", "coverage")
        _said(case, "error", "empty", "; ".join(report.gate.reasons), "")
        yield case
    for finding in report.findings:
        yield _of_finding(finding, report)
    found = {f.name for f in report.findings}
    absent = {n.rule: n.reason for n in report.coverage.not_evaluated}
    for name in dict.fromkeys((*report.coverage.rules, *absent)):
        if name in found:
            continue
        case = _case(f"{home}.{name}", "every input")
        if name in absent:
            ElementTree.SubElement(case, "skipped", {"message": escaped(absent[name])})
        yield case


def _of_finding(finding: Finding, report: AnyReport) -> Element:
    several = len(report.inputs) > 1
    where = f" in {shortened(finding.input)}" if several else ""
    case = _case(
        f"{_home(report)}.{finding.name}",
        f"{finding.rule} {shortened(finding.subject)}{where}",
    )
    if fails(finding, report.gate.fail_on):
        _said(case, "failure", finding.severity, finding.message, finding.recommendation)
    else:
        out = ElementTree.SubElement(case, "system-out")
        known = f" ({finding.allowed or finding.state})" if finding.state != "new" else ""
        out.text = escaped(f"{finding.severity}{known}: {finding.message}")
    return case


def _case(home: str, name: str) -> Element:
    return Element("testcase", {"classname": escaped(home), "name": shortened(name)})


def _said(case: Element, tag: str, kind: str, message: str, advice: str) -> None:
    told = ElementTree.SubElement(case, tag, {"type": kind, "message": escaped(message)})
    told.text = escaped(f"{message} → {advice}" if advice else message)
