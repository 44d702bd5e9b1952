"""What a page shows of a series of checkpoints."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pairs import adapter, drift, model, products
from pairs import drawn as drawn_
from safetensors.numpy import save_file

from gradscope import analyze_drift
from gradscope.drift.page import _paths
from gradscope.drift.result import LayerPath, Series
from gradscope.report.palettes import PALETTES
from gradscope.report.panels import panels_of

pytest.importorskip("altair", reason="of the extra html")

NAMES = ("ckpt-0.pt", "ckpt-1.pt", "ckpt-2.pt")


def path(name: str, *distance: float, **fields: Any) -> LayerPath:
    steps = tuple(abs(b - a) for a, b in zip((0.0, *distance), distance, strict=False))
    return LayerPath(
        layer_name=name, numel=1, distance=(0.0, *distance), step_length=steps, cosine=(None,),
        **fields,
    )  # fmt: skip


def drawn(*paths: LayerPath, names: tuple[str, ...] = NAMES) -> tuple[str, list[dict[str, Any]]]:
    chart = _paths(Series(checkpoints=names, layers=paths))
    return chart.caption, chart.spec["data"]["values"]


def test_each_layer_is_a_line_from_the_second_checkpoint_on() -> None:
    _, rows = drawn(path("a", 0.1, 0.2), path("b", 0.3, 0.3, froze_after="ckpt-1.pt"),
                    path("c", 0.1, 5.0, jumped_at="ckpt-2.pt"))  # fmt: skip

    assert [(r["layer"], r["checkpoint"], r["distance"], r["way"]) for r in rows] == [
        ("a", "ckpt-1", 0.1, "goes on"), ("a", "ckpt-2", 0.2, "goes on"),
        ("b", "ckpt-1", 0.3, "stopped"), ("b", "ckpt-2", 0.3, "stopped"),
        ("c", "ckpt-1", 0.1, "jumped"), ("c", "ckpt-2", 5.0, "jumped"),
    ]  # fmt: skip


def test_its_colours_are_of_every_palette() -> None:
    spec = _paths(Series(checkpoints=NAMES, layers=(path("a", 0.1, 0.2),))).spec

    used = set(re.findall(r'"@@([a-z0-9]+)"', json.dumps(spec)))

    assert used
    assert all(used <= set(palette.light) for palette in PALETTES.values())


def test_what_stands_out_is_drawn_of_many_and_the_rest_counted() -> None:
    many = [path(f"l{n}", 0.1, n / 100) for n in range(1, 80)]

    caption, rows = drawn(path("odd", 0.1, 1e-6, froze_after="ckpt-1.pt"), *many)

    shown = {row["layer"] for row in rows}
    assert len(shown) == 60
    assert shown == {"odd", *(f"l{n}" for n in range(21, 80))}
    assert caption.endswith("Left out: 20 layers that moved less.")


def test_what_has_no_place_on_the_scale_leaves_a_gap() -> None:
    _, rows = drawn(path("a", 0.0, math.inf, jumped_at="ckpt-2.pt"))

    assert [row["distance"] for row in rows] == [None, None]


def test_names_keep_their_suffixes_where_only_those_differ() -> None:
    _, rows = drawn(path("a", 0.1, 0.2), names=("a.pt", "a.bin", "a.npz"))

    assert [row["checkpoint"] for row in rows] == ["a.bin", "a.npz"]


def test_counters_are_not_on_the_map(tmp_path: Path) -> None:
    state = {
        f"layers.{i}.{n}": np.full(shape, i + 1, t)
        for i in range(3)
        for n, shape, t in (
            ("fc.weight", (2, 2), np.float32),
            ("bn.num_batches_tracked", (), np.int64),
        )
    }
    save_file(state, tmp_path / "a.safetensors")
    moved = {name: np.array(value + 1) for name, value in state.items()}
    save_file(moved, tmp_path / "b.safetensors")
    report = analyze_drift(tmp_path / "a.safetensors", tmp_path / "b.safetensors")

    chart, *_ = panels_of(report)

    assert {cell["row"] for cell in chart.spec["data"]["values"]} == {"fc.weight"}


def test_what_became_of_each_module_of_an_adapter_is_a_table(tmp_path: Path) -> None:
    path = adapter(tmp_path, {"base_model.model.nowhere.lora_A.weight": drawn_(4, 32),
                              "base_model.model.nowhere.lora_B.weight": drawn_(32, 4)})  # fmt: skip
    new, added = model(), products(tmp_path)
    for name in new.keys() & added.keys() - {"layers.1.mlp.weight"}:
        new[name] = (new[name].double() + 2 * added[name]).float()
    report = drift(tmp_path, model(), new, expect="merge", adapter=path)

    (grid,) = [p for p in panels_of(report) if p.title == "Modules of the adapter"]

    found = {row.cells[1]: row.cells[2] for row in grid.rows}
    assert found.pop(None) == "not compared: the base has no weight of that name"
    assert found.pop("layers.1.mlp.weight") == "unchanged"
    assert set(found.values()) == {"compared"}
    plain = panels_of(drift(tmp_path, model(), new))
    assert "Modules of the adapter" not in {p.title for p in plain}
