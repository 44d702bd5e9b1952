"""What a page shows of ``explain``."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from gradscope.attribution.diagnostics import Control
from gradscope.attribution.page import explain
from gradscope.report.palettes import PALETTES
from gradscope.report.panels import Chart

from .test_rules import GOOD, result

pytest.importorskip("altair", reason="of the extra html")


def charts(diagnostics: dict[str, Any]) -> dict[str, Chart]:
    panels = explain(result(diagnostics=diagnostics))
    return {panel.title: panel for panel in panels if isinstance(panel, Chart)}


def test_curves_are_drawn_beside_those_of_the_map_elsewhere() -> None:
    control: Control = GOOD["random_control"].model_copy(
        update={"insertion_curve": (0.1, 0.2, 0.9), "deletion_curve": (0.9, 0.5, 0.0)}
    )
    curves = {"insertion_curve": (0.1, 0.8, 0.9), "deletion_curve": (0.9, 0.1, 0.0)}

    found = charts(GOOD | curves | {"random_control": control})

    rows = found["Insertion and deletion: cat.png"].spec["data"]["values"]
    assert [(r["what"], r["order"], r["share"], r["probability"]) for r in rows] == [
        (what, order, share, probability)
        for order, insertion, deletion in (
            ("the map", (0.1, 0.8, 0.9), (0.9, 0.1, 0.0)),
            ("the map elsewhere", (0.1, 0.2, 0.9), (0.9, 0.5, 0.0)),
        )
        for what, curve in (("insertion", insertion), ("deletion", deletion))
        for share, probability in zip((0.0, 0.5, 1.0), curve, strict=True)
    ]
    assert {row["map"] for row in rows} == {"gradcam → 281 tabby"}
    for chart in found.values():
        used = set(re.findall(r'"@@([a-z0-9]+)"', json.dumps(chart.spec)))
        assert all(used <= set(palette.light) for palette in PALETTES.values())


def test_a_report_without_curves_has_the_areas_alone() -> None:
    assert list(charts(GOOD)) == ["Is the map faithful?"]


def test_a_map_that_was_not_evaluated_has_neither() -> None:
    assert charts({}) == {}
