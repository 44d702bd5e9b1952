"""A saved report is the report: read back, it is the same object, and shows the same."""

from __future__ import annotations

import io
import json
import math
import struct
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from gradscope import (
    analyze_drift,
    analyze_flow,
    analyze_weights,
    explain,
    manifest,
    read_report,
    verify,
    visualize,
)
from gradscope.errors import InputError
from gradscope.fingerprints.document import written
from gradscope.report.formats import BUILT_IN, Display, renderer
from gradscope.saved import KINDS

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
    "drift": lambda folder: analyze_drift(FIXTURES / "digits.pt", strange(folder)),
    "verify": lambda folder: verify(strange(folder), manifest=fingerprinted(folder)),
    "explain": lambda folder: explain(
        vision(folder), picture(folder), ["gradcam", "saliency"], layer="0", preprocess=PREPROCESS
    ),
    "visualize": lambda folder: visualize(
        vision(folder, 1.0), 1, steps=1, preprocess=PREPROCESS, output=folder
    ),
}
PREPROCESS = "image_mean=0.5/0.5/0.5,image_std=0.5/0.5/0.5,size=16x16"


def fingerprinted(folder: Path) -> Path:
    """The manifest of another model."""
    (folder / "m.json").write_text(written(manifest(FIXTURES / "digits.safetensors")))
    return folder / "m.json"


def vision(folder: Path, factor: float = math.nan) -> Path:
    """A model whose every answer is NaN, unless another factor is given."""
    torch.manual_seed(0)
    last = nn.Linear(4, 3)
    last.weight.data *= factor
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), last)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.trace(net.eval(), torch.zeros(1, 3, 16, 16)).save(folder / "net.jit")
    return folder / "net.jit"


def picture(folder: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 255, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "cat.png")
    return folder / "cat.png"


def test_every_command_with_a_report_is_among_these(tmp_path: Path) -> None:
    assert set(KINDS) <= set(REPORTS)


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
