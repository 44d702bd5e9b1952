"""What notebooks show: whole, small, and with every name as text."""

from __future__ import annotations

import io
from base64 import b64decode
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from gradscope import analyze_weights, attribute, read_report
from gradscope.histories.open import open_history
from gradscope.report.formats.table_ import counted

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"
HOSTILE = "<img src=x onerror=alert(1)>\"'&lt;</code></table>\x1b[31m\u202e\ud800$\\href{x}{y}$"
#: The name as a reader sees it.
SEEN = "<img src=x onerror=alert(1)>\"'&lt;</code></table>\\x1b[31m\\u202e\\ud800$\\href{x}{y}$"
_PLAIN = {"div", "p", "strong", "code", "ul", "li", "table", "thead", "tbody", "tr", "th", "td"}


class Page(HTMLParser):
    """Text, cells of rows, and pictures; every tag is one of ours and is closed in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.text = ""
        self.rows: list[list[str]] = []
        self.pictures: list[np.ndarray] = []
        self.open: list[str] = []
        html.encode()
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert {name for name, _ in attrs} <= {"style", "class", "alt", "src"}
        if tag == "img":
            self.pictures.append(_picture(dict(attrs)["src"]))
        if tag == "tr":
            self.rows.append([])
        if tag in ("th", "td"):
            self.rows[-1].append("")
        if tag not in ("img", "br"):
            assert tag in _PLAIN
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        if {"th", "td"} & set(self.open):
            self.rows[-1][-1] += data


def _picture(url: str | None) -> np.ndarray:
    start, _, data = str(url).partition(",")
    assert start == "data:image/png;base64"
    return np.asarray(Image.open(io.BytesIO(b64decode(data))).convert("RGB"))


def page(shown: Any) -> Page:
    return Page(shown._repr_html_())


# --- reports ------------------------------------------------------------------------------------


def test_a_report_shows_its_verdict_and_a_row_for_each_finding() -> None:
    report = read_report(FIXTURES / "report-1.0.json")

    shown = page(report)

    assert shown.text.startswith(
        f"gradscope weights: FAILED · {counted(report)} · 16 of 16 tensors"
    )
    assert "4 findings at or above high" in shown.text
    assert len(shown.rows) == 1 + len(report.findings)
    first = report.findings[0]
    assert shown.rows[1] == [
        "CRITICAL", f"{first.rule} {first.name}", first.subject,
        f"{first.message}→ {first.recommendation}",
    ]  # fmt: skip


def test_a_healthy_report_says_so_without_a_table() -> None:
    shown = page(analyze_weights(FIXTURES / "digits.safetensors"))

    assert "PASSED · no findings" in shown.text
    assert "not evaluated: rank-collapse" in shown.text
    assert shown.rows == []


def test_a_report_names_what_could_not_be_read() -> None:
    shown = page(analyze_weights(FIXTURES / "digits.safetensors", "missing.pt"))

    assert "not read in full missing.pt: file not found" in shown.text


def test_many_findings_are_counted_rather_than_shown() -> None:
    report = read_report(FIXTURES / "report-1.0.json")
    letters = [a + b for a in "abcdefghij" for b in "klmnopqrst"]
    many = tuple(report.findings[0].model_copy(update={"subject": n}) for n in letters)

    shown = page(report.model_copy(update={"findings": many}))

    assert len(shown.rows) == 31
    assert "… and 70 findings more" in shown.text


def test_a_hostile_name_in_a_report_is_text() -> None:
    report = read_report(FIXTURES / "report-1.0.json")
    changed = {"subject": HOSTILE, "message": HOSTILE, "recommendation": HOSTILE, "name": HOSTILE}
    finding = report.findings[0].model_copy(update=changed)
    given = report.inputs[0].model_copy(update={"path": HOSTILE, "format": HOSTILE})

    shown = page(report.model_copy(update={"findings": (finding,), "inputs": (given,)}))

    assert shown.text.count(SEEN) == 6


# --- attributions -------------------------------------------------------------------------------


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(4, 5),
    )  # fmt: skip


@pytest.mark.parametrize("method", ["gradcam", "saliency", "integrated-gradients", "occlusion"])
def test_an_attribution_shows_the_map_of_each_picture(method: str) -> None:
    found = attribute(model(), torch.rand(3, 3, 12, 20), method, target=[1, 2, 3])

    shown = page(found)

    assert [picture.shape for picture in shown.pictures] == [(134, 224, 3)] * 3
    assert [row[1] for row in shown.rows[1:]] == ["1", "2", "3"]
    assert shown.text.startswith(method)


def test_the_brightest_place_of_a_picture_is_the_greatest_value_of_its_map() -> None:
    found = attribute(model(), torch.rand(1, 3, 8, 8), "saliency", target=0)
    values = found.upsampled[0]
    at = np.unravel_index(int(values.argmax()), values.shape)

    (drawn,) = page(found).pictures

    pixels = drawn.reshape(8, 28, 8, 28, 3).sum((1, 3, 4), dtype=np.int64)
    assert np.unravel_index(int(pixels.argmax()), pixels.shape) == at


def test_a_batch_is_cut_and_counted() -> None:
    shown = page(attribute(model(), torch.rand(20, 3, 8, 8), "saliency"))

    assert len(shown.pictures) == 16
    assert "… and 4 maps more" in shown.text


def test_a_map_without_a_number_and_a_hostile_layer_are_shown() -> None:
    found = attribute(model(), torch.rand(1, 3, 8, 8), "gradcam", layer="0")
    nothing = torch.full_like(found.upsampled, torch.nan)

    shown = page(replace(found, layer=HOSTILE, upsampled=nothing, diagnostics={}))

    assert SEEN in shown.text
    assert shown.rows[1][2:5] == ["–", "nan", "nan"]


# --- histories ----------------------------------------------------------------------------------


def test_a_history_shows_its_format_steps_layers_and_statistics() -> None:
    history = open_history(str(FIXTURES / "sigmoid"))

    facts = dict(page(history).rows)

    records, layers = history.shape
    assert facts["format"].startswith(history.format)
    assert facts["steps"] == (
        f"{records} records, {history.steps[0]} … {history.steps[-1]}"
    )  # fmt: skip
    assert facts["layers"].startswith(f"{layers}: {history.layers[0].name}, ")
    assert {"l2", "sketches", "loss"} <= set(facts["recorded"].split(", "))
    assert facts["topology"] == "recorded"


def test_a_hostile_name_in_a_history_is_text() -> None:
    history = open_history(str(FIXTURES / "sigmoid"))
    layers = (replace(history.layers[0], name=HOSTILE), *history.layers[1:])

    shown = page(
        replace(
            history, path=HOSTILE, format=HOSTILE, layers=layers, notes=(HOSTILE,),
            skipped_parts=((HOSTILE, HOSTILE),) * 12,
        )
    )  # fmt: skip

    assert shown.text.count(SEEN) == 4 + 20
    assert shown.rows[-1][1].startswith("2 parts more")
