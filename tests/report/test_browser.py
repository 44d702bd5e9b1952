"""HTML reports in a real browser: headless Chromium through Playwright.

Needs the extra ``browser`` and Debian's ``chromium`` (or GRADSCOPE_CHROMIUM, the path of one);
without either the tests are skipped, and say why.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gradscope import analyze_flow, analyze_weights
from gradscope.report.formats import renderer

from .test_page import FIXTURES, HOSTILE, hostile

playwright = pytest.importorskip("playwright.sync_api", reason="needs the extra browser")
CHROMIUM = os.environ.get("GRADSCOPE_CHROMIUM") or shutil.which("chromium")
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine"),
    pytest.mark.xdist_group("browser"),
]
_FLAGS = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        found = started.chromium.launch(executable_path=CHROMIUM, args=list(_FLAGS))
        yield found
        found.close()


class Shown:
    """A page that is open: what it asked for, and what it complained of."""

    def __init__(self, browser: Any, path: Path, **options: Any) -> None:
        self.page = browser.new_page(**{"viewport": {"width": 1280, "height": 900}, **options})
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self.page.on("request", lambda r: self.requests.append(r.url))
        self.page.on("console", lambda m: self.complaints.append(m.text))
        self.page.on("pageerror", lambda e: self.complaints.append(str(e)))
        self.page.goto(f"file://{path}")

    def all_charts(self) -> int:
        charts = self.page.locator("[data-chart]")
        for i in range(charts.count()):
            charts.nth(i).scroll_into_view_if_needed()
            self.page.wait_for_selector(f"[data-chart] >> nth={i} >> canvas", timeout=30_000)
        return int(charts.count())

    def visible(self, selector: str) -> int:
        return len([e for e in self.page.query_selector_all(selector) if e.is_visible()])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pages")
    reports = {
        "weights": analyze_weights(FIXTURES / "digits.safetensors", FIXTURES / "digits.pt"),
        "flow": analyze_flow(FIXTURES / "sigmoid"),
        "hostile": hostile(),
    }
    for name, report in reports.items():
        (folder / f"{name}.html").write_text(renderer("html")(report))
    return folder


@pytest.mark.parametrize("name", ["weights", "flow", "hostile"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_a_page_opens_without_a_complaint_or_a_request(
    browser: Any, folder: Path, name: str, scheme: str, width: int
) -> None:
    viewport = {"width": width, "height": 800}
    shown = Shown(browser, folder / f"{name}.html", color_scheme=scheme, viewport=viewport)

    assert shown.all_charts() >= 1
    assert shown.complaints == []
    assert [url for url in shown.requests if not url.startswith(("file:", "data:"))] == []
    assert len([url for url in shown.requests if url.startswith("file:")]) == 1
    assert shown.page.evaluate("document.documentElement.scrollWidth") <= width


def test_a_hostile_name_is_shown_and_never_run(browser: Any, folder: Path) -> None:
    shown = Shown(browser, folder / "hostile.html")
    dialogs: list[str] = []
    shown.page.on("dialog", lambda d: dialogs.append(d.message))
    shown.all_charts()

    named = shown.page.locator("td.name").first.inner_text()

    assert HOSTILE.split("\u202e")[0] in named
    assert dialogs == []
    assert shown.page.locator("main img").count() == 0


def cells(shown: Shown, column: int) -> list[str]:
    rows = shown.page.locator("[data-grid] tbody tr:not(.more)")
    return [rows.nth(i).locator("td").nth(column).inner_text() for i in range(rows.count())]


def test_a_table_sorts_both_ways_with_the_unknown_last_and_searches(
    browser: Any, folder: Path
) -> None:
    shown = Shown(browser, folder / "weights.html")
    heading = shown.page.locator("[data-grid] th", has_text="std").locator("button")
    column = [h.inner_text() for h in shown.page.locator("[data-grid] th").all()].index("std")

    heading.click()
    down = [float(c) for c in cells(shown, column) if c != "–"]
    unknown_last = cells(shown, column)[len(down) :]
    heading.click()
    up = [float(c) for c in cells(shown, column) if c != "–"]
    shown.page.locator("[data-search]").fill("running_var")

    assert down == sorted(down, reverse=True)
    assert up == sorted(up)
    assert set(unknown_last) <= {"–"}
    assert cells(shown, 0)
    assert all("running_var" in name for name in cells(shown, 0))
    assert "rows" in shown.page.locator("[data-shown]").inner_text()


def test_a_row_opens_to_its_histogram_by_keyboard(browser: Any, folder: Path) -> None:
    shown = Shown(browser, folder / "weights.html")
    button = shown.page.locator("td.name button", has_text="classifier.weight").first

    button.focus()
    shown.page.keyboard.press("Enter")

    assert button.get_attribute("aria-expanded") == "true"
    assert shown.page.locator("tr.more svg.bars rect").count() > 1
    assert "quantile" in shown.page.locator("tr.more").inner_text()
    shown.page.keyboard.press("Enter")
    assert shown.page.locator("tr.more").count() == 0


def test_what_a_finding_is_about_leads_to_its_row(browser: Any, tmp_path: Path) -> None:
    report = analyze_weights(FIXTURES / "digits.safetensors")
    about = analyze_flow(FIXTURES / "sigmoid").findings[0]
    subject = report.result.tensors[5].name
    found = about.model_copy(update={"subject": subject})
    page = renderer("html")(report.model_copy(update={"findings": (found,)}))
    (tmp_path / "page.html").write_text(page)
    shown = Shown(browser, tmp_path / "page.html")

    shown.page.locator(".finding button.to").click()

    assert cells(shown, 0) == [subject]
    assert shown.page.locator("tr.more svg.bars rect").count() > 1
    shown.page.locator("[data-search]").fill("")
    assert len(cells(shown, 0)) == len(report.result.tensors)
    assert shown.complaints == []


def test_on_a_narrow_screen_a_chart_is_narrower(browser: Any, folder: Path) -> None:
    wide, narrow = (
        Shown(browser, folder / "flow.html", viewport={"width": width, "height": 800})
        for width in (1280, 390)
    )
    widths = [
        [shown.page.locator("canvas").nth(i).bounding_box()["width"] for i in range(3)]
        for shown in (wide, narrow)
        if shown.all_charts() == 3
    ]

    assert all(few < many for many, few in zip(*widths, strict=True))
    assert narrow.complaints == []


def test_charts_far_below_are_there_for_the_printer(browser: Any, folder: Path) -> None:
    shown = Shown(browser, folder / "flow.html", viewport={"width": 1280, "height": 300})

    for i in range(3):
        shown.page.wait_for_selector(f"[data-chart][data-ready] >> nth={i}", state="attached")
    shown.page.emulate_media(media="print")

    assert shown.page.locator("#theme").is_hidden()
    assert shown.page.pdf()[:4] == b"%PDF"


def test_findings_are_filtered_by_severity_rule_and_text(browser: Any, folder: Path) -> None:
    shown = Shown(browser, folder / "flow.html")
    before = shown.visible(".finding")

    chip = shown.page.locator("button[data-severity]").first
    chip.click()
    none = shown.visible(".finding")
    chip.click()
    shown.page.keyboard.press("/")
    shown.page.keyboard.type("no such words")

    assert before >= 1
    assert none < before
    assert shown.visible(".finding") == 0
    assert shown.page.locator("#found").inner_text() == f"0 of {before}"


def test_the_theme_can_be_chosen_and_charts_follow(browser: Any, folder: Path) -> None:
    shown = Shown(browser, folder / "flow.html", color_scheme="light")
    shown.all_charts()

    def ground() -> str:
        return str(
            shown.page.evaluate("getComputedStyle(document.documentElement).backgroundColor")
        )

    light = ground()
    shown.page.locator("#theme").click()  # light
    assert ground() == light
    shown.page.locator("#theme").click()  # dark
    assert ground() != light
    assert shown.complaints == []


def test_twelve_thousand_tensors_open_soon(browser: Any, tmp_path: Path) -> None:
    report = analyze_weights(FIXTURES / "digits.safetensors")
    tensors = tuple(
        t.model_copy(update={"name": f"model.layers.{i}.{t.name}"})
        for i in range(-(-12_000 // len(report.result.tensors)))
        for t in report.result.tensors
    )[:12_000]
    large = report.model_copy(
        update={"result": report.result.model_copy(update={"tensors": tensors})}
    )
    (tmp_path / "large.html").write_text(renderer("html")(large))

    shown = Shown(browser, tmp_path / "large.html")

    assert shown.all_charts() >= 1
    assert shown.page.locator("[data-grid] tbody tr").count() <= 400
    assert "12,000 rows" in shown.page.locator("[data-shown]").inner_text()
