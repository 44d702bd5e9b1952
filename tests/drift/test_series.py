"""A series of checkpoints: the way of each layer, against steps taken in float64."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from pairs import State, drawn, found, walk, written

import gradscope
from gradscope.drift.result import LayerPath
from gradscope.report.formats import Display, renderer


def series(folder: Path, states: list[State], **options: Any) -> Any:
    """The report, of files given out of order."""
    paths = [written(folder / f"ckpt-{n * 50}.safetensors", s) for n, s in enumerate(states)]
    return gradscope.analyze_drift(*reversed(paths), **options)


def path(report: Any, layer: str) -> LayerPath:
    (one,) = [p for p in report.result.series.layers if p.layer_name == layer]
    return one


def test_distance_step_and_cosine_are_those_of_a_loop(tmp_path: Path) -> None:
    states = walk()

    report = series(tmp_path, states)

    name = "layers.1.q_proj"
    w = [s[f"{name}.weight"].double() for s in states]
    norm = w[0].norm()
    told = path(report, name)
    d = [b - a for a, b in itertools.pairwise(w)]
    assert told.distance == pytest.approx([float((x - w[0]).norm() / norm) for x in w], rel=1e-9)
    assert told.step_length == pytest.approx([float(x.norm() / norm) for x in d], rel=1e-9)
    cosines = [float((a * b).sum() / a.norm() / b.norm()) for a, b in itertools.pairwise(d)]
    assert told.cosine == pytest.approx(cosines, abs=1e-9)


def test_the_order_is_that_of_the_steps_in_the_names(tmp_path: Path) -> None:
    report = series(tmp_path, walk())

    assert report.result.series.checkpoints == tuple(f"ckpt-{n * 50}.safetensors" for n in range(7))
    assert [i.path.rpartition("-")[2] for i in report.inputs][:2] == [
        "0.safetensors", "50.safetensors"
    ]  # fmt: skip
    assert report.result.max_drift == pytest.approx(
        max(p.distance[-1] for p in report.result.series.layers), rel=0.2
    )


def test_what_froze_is_told_once(tmp_path: Path) -> None:
    states = walk()
    for n in (4, 5, 6):
        states[n] |= {k: states[3][k] for k in states[3] if k.startswith("layers.0.")}

    report = series(tmp_path, states, ignore=["tensor-set-changed"])

    assert path(report, "layers.0.mlp").froze_after == "ckpt-150.safetensors"
    assert path(report, "layers.1.mlp").froze_after is None
    told = [f for f in report.findings if f.evidence.get("kind") == "froze"]
    assert [(f.severity, f.evidence["layers"]) for f in told] == [("low", 4)]


def test_what_jumped_is_told_with_its_checkpoint(tmp_path: Path) -> None:
    states = walk()
    for n in (5, 6):
        states[n]["layers.2.mlp.weight"] = states[n]["layers.2.mlp.weight"] + 0.2 * drawn(32, 32)

    report = series(tmp_path, states)

    assert path(report, "layers.2.mlp").jumped_at == "ckpt-250.safetensors"
    assert [p.layer_name for p in report.result.series.layers if p.jumped_at] == ["layers.2.mlp"]


def test_values_that_are_not_finite_are_a_jump(tmp_path: Path) -> None:
    states = walk(3)
    states[3]["layers.2.mlp.weight"] = torch.full((32, 32), torch.nan)

    report = series(tmp_path, states)

    assert path(report, "layers.2.mlp").jumped_at == "ckpt-150.safetensors"


def test_steady_training_has_no_finding_about_its_way(tmp_path: Path) -> None:
    report = series(tmp_path, walk())

    assert found(report) == {"weight-drift": ["low"]}
    assert all(p.jumped_at is p.froze_after is None for p in report.result.series.layers)


def test_the_table_draws_the_way(tmp_path: Path) -> None:
    shown = renderer("table")(series(tmp_path, walk()), Display(width=120))

    assert "7 checkpoints, ckpt-0.safetensors … ckpt-300.safetensors" in shown
    assert "▁" in shown


def test_a_bad_one_among_them_is_exit_3_and_the_rest_is_told(tmp_path: Path) -> None:
    states = walk(3)
    paths = [written(tmp_path / f"ckpt-{n}.safetensors", s) for n, s in enumerate(states)]
    Path(paths[1]).write_bytes(b"junk")

    report = gradscope.analyze_drift(*paths)

    assert report.gate.exit_code == 3
    assert len(report.result.series.checkpoints) == 3
