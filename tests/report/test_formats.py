"""Every format, over a report of strange contents."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from safetensors.numpy import save_file

from gradscope import analyze_flow, analyze_weights
from gradscope.errors import UsageError
from gradscope.report.formats import Display, format_names, renderer
from gradscope.report.formats.cells import Grid, sparkline, table
from gradscope.weights.result import WeightsReport

FIXTURES = Path(__file__).resolve().parents[2] / "fixtures"


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> WeightsReport:
    generator = np.random.default_rng(0)
    tensors = {f"layers.{i}.fc.weight": generator.normal(size=(32, 32)) for i in range(40)}
    tensors["layers.3.fc.weight"][0, 0] = np.nan
    tensors["layers.7.fc.weight"][1, 1] = np.inf
    path = tmp_path_factory.mktemp("r") / "m.safetensors"
    save_file({k: v.astype(np.float32) for k, v in tensors.items()}, path)
    return analyze_weights(path, tmp_path_factory.mktemp("r") / "missing.pt")


def test_the_json_gives_the_report_back(report: WeightsReport) -> None:
    text = renderer("json")(report, Display())

    assert renderer("json")(WeightsReport.model_validate_json(text), Display()) == text


def test_the_json_has_a_line_for_each_section_finding_and_tensor(report: WeightsReport) -> None:
    lines = renderer("json")(report, Display()).splitlines()

    assert lines[:2] == ["{", ' "schema_version": "1.0",']
    assert [line for line in lines if line.startswith(' "')][2:5] == [
        ' "command": "weights",', ' "inputs": [', ' "coverage": {'
    ]  # fmt: skip
    tensors = [line for line in lines if line.startswith('   {"name": "layers.')]
    assert len(tensors) == 40
    assert lines[lines.index(tensors[-1]) + 1] == "  ],"
    assert sum(line.startswith('  {"rule": "W101"') for line in lines) == 2
    assert any(line.startswith('  "overall": {"tensors": 40, ') for line in lines)
    assert lines[-1] == "}"


@pytest.mark.parametrize(
    ("name", "written"),
    [("a", "a"), ("=1+1", "'=1+1"), ("+a", "'+a"), ("-a", "'-a"), ("@a", "'@a"), ("a=", "a="),
     ("\x1b", "\\x1b"), ("-Infinity", "-Infinity")],
)  # fmt: skip
def test_a_spreadsheet_runs_nothing(report: WeightsReport, name: str, written: str) -> None:
    tensor = report.result.tensors[0].model_copy(update={"name": name})
    strange = report.result.model_copy(update={"tensors": (tensor,)})
    one = report.model_copy(update={"result": strange, "findings": ()})
    text = renderer("csv")(one, Display())

    (row,) = csv.DictReader(io.StringIO(text))

    assert row["name"] == written
    assert json.loads(row["shape"]) == [32, 32]
    assert row["units.rows"] == "32"
    assert "spectrum" not in row


def test_off_a_terminal_the_table_has_every_tensor_and_finding(report: WeightsReport) -> None:
    text = renderer("table")(report, Display())

    assert all(f"layers.{i}.fc.weight" in text for i in range(40))
    assert "layers.7.fc.weight" in text.split("Health")[0]
    assert "missing.pt" in text


@pytest.mark.parametrize("width", [40, 80, 100, 120, 200])
def test_on_a_terminal_no_line_is_wider_than_it(report: WeightsReport, width: int) -> None:
    text = renderer("table")(report, Display(width=width))

    assert max(map(len, text.splitlines())) <= width
    assert "2 critical" in " ".join(text.split())


def test_on_a_terminal_like_tensors_are_grouped_and_findings_too(report: WeightsReport) -> None:
    text = renderer("table")(report, Display(width=120))

    assert "layers.*.fc.weight  ×38" in text
    assert "(and 1 like it" in text


def test_csv_has_a_row_a_tensor_and_dotted_columns(report: WeightsReport) -> None:
    rows = list(csv.DictReader(io.StringIO(renderer("csv")(report, Display()))))

    assert len(rows) == 40
    assert float(rows[0]["statistics.std"]) == report.result.tensors[0].statistics.std
    assert rows[0]["statistics.quantiles.0.5"]


def test_csv_of_nothing_still_has_its_header() -> None:
    nothing = analyze_weights("nowhere.safetensors")

    assert renderer("csv")(nothing, Display()) == "subject,input,findings\n"


def test_jsonl_has_the_findings_and_the_failed_inputs(report: WeightsReport) -> None:
    lines = [json.loads(line) for line in renderer("jsonl")(report, Display()).splitlines()]

    assert [line.get("rule", line.get("kind")) for line in lines] == ["W101", "W101", "missing"]


def test_an_unknown_format_is_refused_with_those_there_are() -> None:
    with pytest.raises(UsageError, match="table, json, jsonl, csv"):
        renderer("xml")


@settings(deadline=None, max_examples=60)
@given(name=st.text(alphabet=st.characters(), min_size=1, max_size=60))
def test_no_name_breaks_a_format_or_reaches_a_terminal_unescaped(name: str) -> None:
    base = _BASE[0]
    tensor = base.result.tensors[0].model_copy(update={"name": name})
    finding = base.findings[0].model_copy(update={"subject": name})
    result = base.result.model_copy(update={"tensors": (tensor,)})
    strange = base.model_copy(update={"result": result, "findings": (finding,)})

    for format_ in format_names():
        for width in (None, 80):
            text = renderer(format_)(strange, Display(width=width))
            assert all(c.isprintable() or c == "\n" for c in text), format_
    assert json.loads(renderer("json")(strange, Display()))["findings"][0]["subject"] == name


_BASE: list[WeightsReport] = []


@pytest.fixture(autouse=True)
def _base(report: WeightsReport) -> None:
    _BASE[:] = [report]


def test_sparklines_show_every_nonempty_bin_and_fall_back_to_ascii() -> None:
    assert sparkline([0, 1, 1000]) == " ▁█"
    assert sparkline([0, 1, 1000], unicode=False) == " .@"


def test_committed_fixture_reads_the_same_from_both_containers() -> None:
    one = analyze_weights(FIXTURES / "digits.safetensors").result.tensors
    other = analyze_weights(FIXTURES / "digits.pt").result.tensors

    def measured(tensors):
        return {t.name: t.model_copy(update={"file": "", "input": ""}) for t in tensors}

    assert measured(one) == measured(other)


def test_from_python_a_renderer_alone_gives_the_whole_table(report: WeightsReport) -> None:
    flow = renderer("table")(analyze_flow(FIXTURES / "sigmoid"))

    assert "Widest paths from the loss" in flow
    assert renderer("table")(report) == renderer("table")(report, Display())
    assert "Health" in renderer("table")(report)


@pytest.mark.parametrize("name", ["层.0", "é.0", "e\u0301.0"])
def test_a_grid_is_laid_out_as_rich_would(name: str) -> None:
    headings = [("tensor", "left"), ("std", "right"), ("distribution", "left")]
    rows = [["a.weight", "1", "▁█"], [name, "–", ""], ["b", "12,345", "x"]]
    made = table(*headings)
    for row in rows:
        made.add_row(*row)
    out = io.StringIO()
    Console(file=out, width=10_000, no_color=True, _environ={}).print(made)
    drawn = [line.rstrip() for line in out.getvalue().splitlines()]
    assert list(Grid(headings, rows).lines()) == drawn


@pytest.mark.parametrize("width", [80, 60, 50])
def test_a_narrow_table_wraps_names_and_marks_numbers_that_are_cut(width: int) -> None:
    made = table(("method", "left"), ("target", "left"), "min", "max", "complete")
    made.add_row("integrated-gradients", "285 Egyptian cat", "-0.3569", "0.451", "within 23.92%")
    out = io.StringIO()

    Console(file=out, width=width, no_color=True, _environ={}).print(made)

    lines = [line.rstrip() for line in out.getvalue().splitlines()]
    assert ("285 Egyptian cat" in lines[1]) is (width == 80)
    assert len(lines) == (4 if width == 60 else 2)
    assert lines[1].endswith("within 23.9…" if width == 50 else "within 23.92%")
