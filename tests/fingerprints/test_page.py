"""What a page shows of ``verify``."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from gradscope.fingerprints.page import verify
from gradscope.fingerprints.result import TensorVerified, VerifyResult
from gradscope.report.palettes import PALETTES
from gradscope.report.panels import Chart, Grid

pytest.importorskip("altair", reason="of the extra html")


def tensor(name: str, status: Any, **fields: Any) -> TensorVerified:
    plain = {"input": "m.pt", "dtype": "F32", "shape": (4, 4)}
    return TensorVerified(name=name, status=status, **(plain | fields))


def shown(*tensors: TensorVerified) -> tuple[list[Chart], Grid]:
    *charts, grid = verify(VerifyResult(tensors=tensors, manifest="m.json", counts={}))
    assert isinstance(grid, Grid)
    return [chart for chart in charts if isinstance(chart, Chart)], grid


def test_what_differs_comes_first_and_nothing_is_left_out() -> None:
    _, grid = shown(
        tensor("a", "match"),
        tensor("b", "changed", between=((0, 1 << 20), (1 << 21, 3 << 20))),
        tensor("c", "missing", dtype=None, shape=None),
        tensor("d", "match", shape=()),
    )

    assert [row.cells for row in grid.rows] == [
        ["b", "changed", "F32", "4×4", "0–1,048,576, 2,097,152–3,145,728"],
        ["c", "missing", None, None, None],
        ["a", "match", "F32", "4×4", None],
        ["d", "match", "F32", "scalar", None],
    ]


def test_several_checkpoints_are_told_apart() -> None:
    charts, grid = shown(tensor("a", "match"), tensor("a", "changed", input="n.pt"))

    assert [row.cells[-1] for row in grid.rows] == ["n.pt", "m.pt"]
    assert grid.columns[-1].title == "input"
    assert [chart.title for chart in charts] == [
        "Against the manifest: m.pt", "Against the manifest: n.pt",
    ]  # fmt: skip


def test_the_map_has_the_worst_of_each_place_and_the_caption_counts() -> None:
    (chart,), _ = shown(
        *(tensor(f"layers.{i}.experts.{e}.up", "match") for i in range(3) for e in range(2)),
        tensor("layers.1.experts.7.up", "changed"),
        tensor("layers.1.experts.8.up", "added"),
        tensor("head", "missing"),
    )
    cells = {(c["block"], c["row"]): c for c in chart.spec["data"]["values"]}

    assert cells["layers.0", "experts.*.up"]["status"] == "match"
    assert cells["layers.1", "experts.*.up"]["status"] == "changed"
    assert cells["layers.1", "experts.*.up"]["differ"] == (
        "layers.1.experts.7.up, layers.1.experts.8.up"
    )
    assert cells["outside", "head"]["status"] == "missing"
    assert chart.caption.startswith("6 of 9 tensors match, 1 changed, 1 missing, 1 added: m.json.")
    colour = chart.spec["encoding"]["color"]["scale"]
    assert colour["domain"] == ["changed", "missing", "match"]
    for name in re.findall(r'"@@(\w+)"', json.dumps(chart.spec)):
        assert all(name in p.light and name in p.dark for p in PALETTES.values())


def test_in_a_long_tensor_the_damaged_parts_are_drawn() -> None:
    charts, _ = shown(
        tensor("long", "changed", shape=(100, 10), between=((400, 800), (800, 1200))),
        tensor("short", "changed"),
    )
    rows = charts[1].spec["data"]["values"]

    assert [(r["tensor"], r["what"], r["from"], r["to"]) for r in rows] == [
        ("long", "whole tensor", 0.0, 1.0), ("long", "differs", 0.4, 0.8),
        ("long", "differs", 0.8, 1.0),
    ]  # fmt: skip


def test_where_all_match_there_is_no_damage_to_draw() -> None:
    (chart,), _ = shown(tensor("a", "match"), tensor("b", "match"))

    assert chart.caption.startswith("2 of 2 tensors match: m.json.")
    assert {cell["status"] for cell in chart.spec["data"]["values"]} == {"match"}
