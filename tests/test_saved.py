"""A saved report is the report: read back, it is the same object, and shows the same."""

from __future__ import annotations

import io
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gradscope import analyze_flow, analyze_weights, read_report
from gradscope.errors import InputError
from gradscope.report.formats import BUILT_IN, Display, renderer

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"


def strange(folder: Path) -> Path:
    """Values that JSON has no numbers for, and a name that no terminal should see."""
    weight = np.random.default_rng(0).normal(size=(16, 16))
    weight[0, :3] = np.nan, np.inf, -np.inf
    tensors = {"\u202ea": weight, "huge": np.full((8, 8), 1e200), "empty": np.zeros((0, 4))}
    header, at = {}, 0
    for name, values in tensors.items():
        offsets = [at, at := at + values.nbytes]
        header[name] = {"dtype": "F64", "shape": values.shape, "data_offsets": offsets}
    text = json.dumps(header).encode()
    data = b"".join(values.tobytes() for values in tensors.values())
    (folder / "s.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)
    return folder / "s.safetensors"


REPORTS: dict[str, Callable[[Path], Any]] = {
    "weights": lambda _: analyze_weights(FIXTURES / "digits.safetensors"),
    "headers": lambda _: analyze_weights(FIXTURES / "digits.pt", headers_only=True),
    "strange": lambda folder: analyze_weights(strange(folder), folder / "missing.pt"),
    "flow": lambda _: analyze_flow(FIXTURES / "sigmoid"),
    "unread": lambda folder: analyze_flow(folder / "missing.npz"),
}


def test_the_strange_one_is_strange(tmp_path: Path) -> None:
    report = REPORTS["strange"](tmp_path)

    assert report.result.tensors[0].name == "\u202ea"
    assert report.findings[0].rule == "W101"


@pytest.mark.parametrize("name", REPORTS)
def test_every_format_shows_a_saved_report_byte_for_byte_as_the_run_did(
    name: str, tmp_path: Path
) -> None:
    report = REPORTS[name](tmp_path)
    (tmp_path / "r.json").write_text(renderer("json")(report))

    saved = read_report(tmp_path / "r.json")

    assert type(saved) is type(report)
    for format_ in BUILT_IN:
        for display in (Display(), Display(width=80, colour=True), Display(detail=2)):
            assert renderer(format_)(saved, display) == renderer(format_)(report, display), format_


def test_the_first_report_of_schema_1_0_is_still_read() -> None:
    report = read_report(FIXTURES / "report-1.0.json")

    assert [f.rule for f in report.findings] == ["W101", "W102", "W105", "W111"]
    assert "CRITICAL W101" in renderer("table")(report)


def refused(text: str, why: str) -> None:
    with pytest.raises(InputError, match=why) as refusal:
        read_report(io.BytesIO(text.encode()))
    assert refusal.value.path == "stdin"


def test_what_is_no_report_is_malformed(tmp_path: Path) -> None:
    good = json.loads(renderer("json")(analyze_flow(tmp_path / "missing.npz")))

    refused("", "not JSON")
    refused("[1]", "not a report of gradscope; write one with --report json=FILE")
    refused('{"schema_version": "1.0"}', "not a report of gradscope")
    refused("[" * 100_000, "not JSON")
    refused(json.dumps(good | {"command": "judge"}), "a report of the command 'judge'")
    refused(json.dumps(good | {"coverage": 5}), "'coverage' is not what a report has there")
    refused(json.dumps(good | {"schema_version": "1.7"}), r"\(schema 1.7\); this is older")
    refused(json.dumps(good | {"schema_version": "2.0"}), "upgrade it")
    with pytest.raises(InputError, match="file not found"):
        read_report(tmp_path / "r.json")
    with pytest.raises(InputError, match="directory"):
        read_report(tmp_path)


def test_a_report_of_an_earlier_version_lacks_what_came_later(tmp_path: Path) -> None:
    good = json.loads(renderer("json")(analyze_flow(tmp_path / "missing.npz")))
    del good["coverage"]["rules"], good["gate"]["notes"]

    assert read_report(io.BytesIO(json.dumps(good).encode())).coverage.rules == ()
