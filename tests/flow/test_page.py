"""What a page shows of a run, as it is drawn."""

from __future__ import annotations

import re

import numpy as np
import pytest

from gradscope import analyze_flow
from gradscope.report.model import AnyReport
from gradscope.report.panels import panels_of, plain

from .made import made, noise

vl_convert = pytest.importorskip("vl_convert", reason="of the extra html")


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
