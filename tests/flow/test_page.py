"""What a page shows of a run, as it is drawn."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gradscope import analyze_flow
from gradscope.report.model import AnyReport
from gradscope.report.panels import Chart, panels_of, plain

from .made import made, noise

vl_convert = pytest.importorskip("vl_convert", reason="of the extra html")
FIXTURES = Path(__file__).resolve().parents[2] / "fixtures"


def labels(report: AnyReport, title: str) -> list[str]:
    """The texts of a chart."""
    (chart,) = [panel for panel in panels_of(report) if panel.title == title]
    return re.findall(r"<text[^>]*>([^<]+)</text>", vl_convert.vegalite_to_svg(plain(chart.spec)))


@pytest.mark.parametrize(("rate", "shown"), [(0.1, "0.1"), (3e-4, "0.0003"), (2e-7, "2e-7")])
def test_a_learning_rate_that_stays_is_told_by_its_value(rate: float, shown: str) -> None:
    report = analyze_flow(made(noise(60, 3), loss=np.ones(60), lr=np.full((60, 1), rate)))

    assert shown in labels(report, "The run")


def test_losses_of_many_decades_have_short_labels() -> None:
    loss = 10.0 ** np.linspace(0, 30, 60)
    report = analyze_flow(made(noise(60, 3), loss=loss))

    assert max(map(len, labels(report, "The run"))) <= len("total gradient norm")
    assert "1e+10" in labels(report, "The run")


def chart(report: AnyReport, title: str) -> Chart:
    (found,) = [panel for panel in panels_of(report) if panel.title == title]
    assert isinstance(found, Chart)
    return found


def rows(spec: Any, field: str) -> list[Any]:
    """The data of a chart's layers that have a field."""
    return [row for layer in spec["layer"] for row in layer["data"]["values"] if field in row]


def test_layers_stand_in_the_order_of_the_network_and_neighbours_are_outlined_as_one() -> None:
    report = analyze_flow(FIXTURES / "sigmoid")
    names = [layer.layer_name for layer in report.result.layers]
    region = report.result.vanishing_regions[0].affected_layers

    found = chart(report, "Gradients by layer and step")

    assert [(r["layer"], r["until"]) for r in rows(found.spec, "until")] == [
        (region[0], region[-1])
    ]
    svg = vl_convert.vegalite_to_svg(plain(found.spec))
    axis = svg[svg.index("role-axis-label", svg.index("Y-axis")) :]
    assert re.findall(r"<text[^>]*>([^<]+)</text>", axis)[: len(names)] == names


def test_layers_apart_have_outlines_of_their_own() -> None:
    norms = noise(80, 6)
    norms[30:, [1, 2, 4]] *= 1e4
    report = analyze_flow(made(norms))
    affected = {n for r in report.result.exploding_regions for n in r.affected_layers}
    assert affected == {"layers.1", "layers.2", "layers.4"}

    outlines = rows(chart(report, "Gradients by layer and step").spec, "until")

    assert {(r["layer"], r["until"]) for r in outlines} == {
        ("layers.1", "layers.2"), ("layers.4", "layers.4"),
    } or {(r["layer"], r["until"]) for r in outlines} == {(n, n) for n in affected}  # fmt: skip


def test_an_edge_that_passes_layers_goes_around_them() -> None:
    names = ["a", "b", "c"]
    edges = np.array([[0, 1], [1, 2], [0, 2]])
    report = analyze_flow(made(noise(60, 3), names=names, edges=edges))

    lines = rows(chart(report, "The network").spec, "edge")

    heights = {
        (r["from"], r["to"]): {q["y"] for q in lines if q["edge"] == r["edge"]} for r in lines
    }
    assert {frozenset(ends): len(ys) > 1 for ends, ys in heights.items()} == {
        frozenset("ab"): False, frozenset("bc"): False, frozenset("ac"): True,
    }  # fmt: skip


def test_another_run_is_on_the_page() -> None:
    usual = noise(60, 4)
    strange = usual.copy()
    strange[:, 2] *= 50
    other = made(usual, loss=np.linspace(2, 1, 60))
    report = analyze_flow(made(strange, loss=np.linspace(2, 1.5, 60)), against=other)

    found = chart(report, "Gradients against the other run")
    grid = next(p for p in panels_of(report) if p.title.startswith("Against "))

    assert found.caption.split(". ")[1].startswith("1 of 4 layers differ")
    bars = {row["layer"]: row for row in found.spec["data"]["values"]}
    assert bars["layers.2"]["factor"] == pytest.approx(50, rel=1e-3)
    assert [name for name, row in bars.items() if row["colour"] != "@@info"] == ["layers.2"]
    cells = {row.cells[0]: row.cells[1:] for row in grid.rows}
    assert cells["loss"][0] > cells["loss"][1]


def test_without_another_run_there_is_none_on_the_page() -> None:
    titles = [panel.title for panel in panels_of(analyze_flow(made(noise(60, 4))))]

    assert not [title for title in titles if "gainst" in title]
