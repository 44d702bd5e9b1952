"""HTML reports as files: complete, inert, the same bytes each time; test_browser opens them."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from gradscope import analyze_drift, analyze_flow, analyze_weights
from gradscope.errors import UsageError
from gradscope.report.formats import Display, renderer
from gradscope.report.palettes import PALETTES, palette
from gradscope.report.panels import Chart, Gallery, Picture, panels_of

FIXTURES = Path(__file__).resolve().parents[2] / "fixtures"
HOSTILE = '</script><img src=x onerror=alert(1)>"\u202e{{7*7}}@@high'
REPORTS: dict[str, Callable[[], Any]] = {
    "weights": lambda: analyze_weights(FIXTURES / "digits.safetensors"),
    "flow": lambda: analyze_flow(FIXTURES / "sigmoid"),
    "drift": lambda: analyze_drift(FIXTURES / "digits.safetensors", FIXTURES / "digits.pt"),
    "unread": lambda: analyze_weights("nowhere.safetensors"),
}


@pytest.fixture(params=REPORTS)
def page(request: pytest.FixtureRequest) -> str:
    return renderer("html")(REPORTS[request.param]())


class Tags(HTMLParser):
    """Every tag with its attributes, and the text of scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.text = ""
        self._script = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._script = tag == "script" and dict(attrs).get("type") is None

    def handle_endtag(self, tag: str) -> None:  # noqa: ARG002
        self._script = False

    def handle_data(self, data: str) -> None:
        if self._script:
            self.scripts.append(data)
        else:
            self.text += data


def test_a_page_refers_to_nothing_outside_itself(page: str) -> None:
    for tag, attributes in Tags(page).tags:
        assert tag not in ("link", "iframe", "object", "embed", "base", "form")
        assert (attributes.get("src") or "data:").startswith("data:")
        assert "href" not in attributes
        assert not [name for name in attributes if name.startswith("on")]


def test_only_the_page_s_own_scripts_may_run(page: str) -> None:
    found = Tags(page)
    policy = next(a["content"] for t, a in found.tags if a.get("http-equiv")) or ""
    hashes = [
        f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
        for script in found.scripts
    ]

    assert policy.split("; ")[:2] == ["default-src 'none'", f"script-src {' '.join(hashes)}"]
    assert "unsafe-eval" not in policy


@pytest.mark.parametrize("name", REPORTS)
def test_the_same_report_gives_the_same_page(name: str) -> None:
    report = REPORTS[name]()

    assert renderer("html")(report) == renderer("html")(report)


def test_the_verdict_and_what_to_do_come_first(page: str) -> None:
    text = Tags(page).text

    assert re.search(r"Passed|Failed", text)
    assert "analysed" in text.split("Findings")[0]


def hostile() -> Any:
    report = REPORTS["weights"]()
    tensors = tuple(
        t.model_copy(update={"name": f"layers.{i}.{HOSTILE}"})
        for i, t in enumerate(report.result.tensors[:6])
    )
    named = {"subject": HOSTILE, "message": HOSTILE, "input": HOSTILE, "recommendation": HOSTILE}
    finding = analyze_flow(FIXTURES / "sigmoid").findings[0].model_copy(update=named)
    result = report.result.model_copy(update={"tensors": tensors, "notes": (HOSTILE,)})
    given = report.inputs[0].model_copy(update={"path": HOSTILE})
    return report.model_copy(
        update={"result": result, "findings": (finding,), "inputs": (given, given)}
    )


def test_a_hostile_name_stays_text() -> None:
    page = renderer("html")(hostile())
    found = Tags(page)

    assert "img" not in {tag for tag, _ in found.tags}
    assert len(found.scripts) == 2
    assert page.count("onerror=alert(1)") == page.count("&lt;img src=x onerror=alert(1)&gt;") + (
        page.count("\\u003cimg src=x onerror=alert(1)\\u003e")
    )
    assert "{{7*7}}" in found.text
    assert "\u202e" not in page


def data_of(page: str) -> Any:
    return json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1])


def test_every_tensor_is_in_the_table_with_its_values() -> None:
    report = REPORTS["weights"]()
    grid = next(p for p in data_of(renderer("html")(report))["panels"] if "rows" in p)

    titles = [c["title"] for c in grid["columns"]]
    assert [row["cells"][0] for row in grid["rows"]] == [t.name for t in report.result.tensors]
    for row, tensor in zip(grid["rows"], report.result.tensors, strict=True):
        assert row["cells"][titles.index("std")] == pytest.approx(tensor.statistics.std, rel=1e-5)
        opened = {grid["names"][at]: value for at, value in row["more"]}
        assert opened["max"] == pytest.approx(tensor.statistics.max, rel=1e-5)
        assert sum(row["bars"]) == sum(tensor.histogram)


@pytest.mark.parametrize("name", ["weights", "flow", "drift"])
@pytest.mark.parametrize("kind", ["svg", "png"])
def test_the_main_chart_is_a_picture_too(name: str, kind: str) -> None:
    drawn = renderer(kind, pictures=True)(REPORTS[name]())

    assert drawn[:4] == ("<svg" if kind == "svg" else b"\x89PNG")
    assert "@@" not in str(drawn)


def test_a_report_without_a_chart_has_no_picture() -> None:
    with pytest.raises(UsageError, match="no chart"):
        renderer("svg", pictures=True)(REPORTS["unread"]())
    with pytest.raises(UsageError, match="--report png"):
        renderer("png")


def test_names_of_colours_are_known_to_every_palette() -> None:
    names = {name for chosen in PALETTES.values() for name in chosen.light}
    used = {
        found
        for name in ("weights", "flow", "drift")
        for panel in panels_of(REPORTS[name]())
        if isinstance(panel, Chart)
        for found in re.findall(r'"@@([a-z0-9]+)"', json.dumps(panel.spec))
    }

    assert used
    assert used <= names
    for chosen in PALETTES.values():
        assert set(chosen.light) == set(chosen.dark) == names
    with pytest.raises(UsageError, match="high-contrast"):
        palette("pink")


def luminance(colour: str) -> float:
    """Relative luminance, WCAG 2.1."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return float(np.dot([0.2126, 0.7152, 0.0722], linear))


@pytest.mark.parametrize("scheme", PALETTES)
def test_text_can_be_read_on_its_ground(scheme: str) -> None:
    for side in (PALETTES[scheme].light, PALETTES[scheme].dark):
        for ground in ("bg", "panel"):
            for name in ("fg", "dim", "critical", "high", "medium", "low", "info", "good"):
                a, b = sorted((luminance(side[name]), luminance(side[ground])))
                least = 7.0 if scheme == "high-contrast" else 4.5  # WCAG AAA and AA
                assert (b + 0.05) / (a + 0.05) >= least, (name, ground)


def test_monochrome_has_no_hue() -> None:
    chosen = PALETTES["monochrome"]
    plain = {"bg", "panel", "fg", "dim", "line"}
    for name, colour in [*chosen.light.items(), *chosen.dark.items()]:
        if name not in plain:
            assert colour[1:3] == colour[3:5] == colour[5:7], name


def test_a_thousand_tensors_fit_into_two_megabytes() -> None:
    report = REPORTS["weights"]()
    tensors = tuple(
        t.model_copy(update={"name": f"model.layers.{i}.{t.name}"})
        for i in range(-(-1000 // len(report.result.tensors)))
        for t in report.result.tensors
    )
    large = report.model_copy(
        update={"result": report.result.model_copy(update={"tensors": tensors[:1000]})}
    )

    assert len(renderer("html")(large)) < 2_000_000


def test_ten_thousand_findings_are_grouped_and_those_left_out_are_counted(
    report_of: Callable[..., Any], finding: Callable[..., Any]
) -> None:
    like = [finding("high", f"layers.{i}.w") for i in range(5_000)]
    single = [finding("medium", "w" + "x" * i, message="m" * 300) for i in range(5_000)]

    page = renderer("html")(report_of(*like, *single))
    text = re.sub(r"\s+", " ", Tags(page).text)

    assert len(page) < 1_000_000
    assert "layers.0.w and 4,999 like it" in text
    assert "layers.199.w" in text
    assert "and 4,800 more" in text
    assert "Left out: 4,801 findings that are less severe or known" in text


def test_many_inputs_do_not_push_the_findings_away() -> None:
    report = REPORTS["weights"]()
    given = [report.inputs[0].model_copy(update={"path": f"step-{i}.pt"}) for i in range(40)]

    text = Tags(renderer("html")(report.model_copy(update={"inputs": tuple(given)}))).text

    assert text.index("step-5.pt") < text.index("and 34 more") < text.index("step-39.pt")


def test_a_gate_that_nothing_fails_says_so(
    report_of: Callable[..., Any], finding: Callable[..., Any]
) -> None:
    text = Tags(renderer("html")(report_of(finding("critical"), fail_on="never"))).text

    assert "findings fail nothing (--fail-on never)" in text


def test_pictures_are_in_the_page_and_one_that_is_gone_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new("RGB", (3000, 1000), "red").save(tmp_path / "a.png")
    stack = Picture("gradcam", "", str(tmp_path / "a.png"), str(tmp_path / "gone.png"))
    monkeypatch.setattr(
        "gradscope.report.formats.html_.panels_of", lambda _: [Gallery("a", "", [stack])]
    )

    found = Tags(renderer("html")(REPORTS["weights"]()))

    (image,) = [a["src"] for t, a in found.tags if t == "img"]
    assert (image or "").startswith("data:image/jpeg;base64,")
    assert len(image or "") < 50_000
    assert "gone.png" in found.text


@pytest.mark.parametrize("has_map", [True, False])
def test_a_slider_is_there_where_a_map_lies_over_a_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_map: bool
) -> None:
    Image.new("RGB", (30, 10), "red").save(tmp_path / "a.png")
    file = str(tmp_path / "a.png")
    stack = Picture("espresso", "", file, file if has_map else None)
    monkeypatch.setattr(
        "gradscope.report.formats.html_.panels_of", lambda _: [Gallery("a", "", [stack])]
    )

    found = Tags(renderer("html")(REPORTS["weights"]()))

    assert bool([a for _, a in found.tags if "data-opacity" in a]) == has_map


def test_colours_are_those_asked_for() -> None:
    report = REPORTS["weights"]()

    pages = {s: renderer("html")(report, Display(colors=s)) for s in PALETTES}

    assert len(set(pages.values())) == len(PALETTES)
    for scheme, page in pages.items():
        assert f"--critical: {PALETTES[scheme].light['critical']}" in page
