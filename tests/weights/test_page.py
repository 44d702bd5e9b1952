"""What a page shows of checkpoints."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from gradscope import analyze_weights
from gradscope.report.panels import Chart, Grid, panels_of

pytest.importorskip("altair", reason="of the extra html")


def checkpoint(path: Path, *, dead: bool = False) -> Path:
    draw = np.random.default_rng(0)
    state = {
        f"layers.{i}.fc.weight": draw.normal(0, 0.1, (16, 16)).astype(np.float32) for i in range(4)
    }
    if dead:
        state["layers.2.fc.weight"][:12] = 0
    save_file(state, path)
    return path


def titles(*paths: Path) -> list[str]:
    return [panel.title for panel in panels_of(analyze_weights(*paths))]


def test_the_map_of_health_leads_where_it_has_a_spot(tmp_path: Path) -> None:
    faulty = checkpoint(tmp_path / "faulty.safetensors", dead=True)
    healthy = checkpoint(tmp_path / "healthy.safetensors")

    assert titles(faulty) == ["Health by place", "Values by depth and role", "Tensors"]
    assert titles(healthy) == ["Values by depth and role", "Health by place", "Tensors"]


def test_the_spot_is_the_block_with_the_damage(tmp_path: Path) -> None:
    report = analyze_weights(checkpoint(tmp_path / "m.safetensors", dead=True))
    chart = next(panel for panel in panels_of(report) if isinstance(panel, Chart))

    spots = {c["block"] for c in chart.spec["data"]["values"] if c["status"] != "excellent"}
    assert spots == {"layers.2"}


def test_tensors_of_several_checkpoints_are_told_apart(tmp_path: Path) -> None:
    one, two = (checkpoint(tmp_path / f"{name}.safetensors") for name in ("one", "two"))

    def grid(*paths: Path) -> Grid:
        return next(p for p in panels_of(analyze_weights(*paths)) if isinstance(p, Grid))

    assert {row.cells[-1] for row in grid(one, two).rows} == {str(one), str(two)}
    assert grid(one, two).columns[-1].title == "input"
    assert grid(one).columns[-1].title == "health"
    assert all(len(row.cells) == len(grid(one).columns) for row in grid(one).rows)


def test_a_long_series_is_drawn_in_few_points_that_hold_the_widest(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    state = {f"layers.{i}.w": draw.normal(0, 0.1, (4, 8)).astype(np.float32) for i in range(900)}
    state["layers.501.w"] *= 100
    save_file(state, tmp_path / "m.safetensors")
    report = analyze_weights(tmp_path / "m.safetensors")

    chart = next(p for p in panels_of(report) if p.title == "Values by depth and role")
    assert isinstance(chart, Chart)
    points = chart.spec["data"]["values"]

    assert len(points) == 300
    widest = max(points, key=lambda point: point["q99"] - point["q1"])
    strange = next(t for t in report.result.tensors if t.name == "layers.501.w")
    assert widest["tensor"] == "layers.501.w"
    assert (widest["q1"], widest["q99"]) == (
        strange.statistics.quantiles["0.01"], strange.statistics.quantiles["0.99"],
    )  # fmt: skip
    assert abs(widest["median"]) < 0.2
