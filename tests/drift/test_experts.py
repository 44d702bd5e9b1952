"""Experts that one side stores stacked and the other one by one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pairs import State, drawn, drift, found, only

from gradscope.drift.result import DriftReport

EXPERTS = 4
STACK = "layers.0.mlp.experts.up_proj.weight"


def alone(numbers: range = range(EXPERTS)) -> State:
    each = {f"layers.0.mlp.experts.{n}.up_proj.weight": drawn(24, 16, seed=n) for n in numbers}
    return each | {"norm.weight": 1 + 0.1 * drawn(16, seed=9)}


def stacked(experts: State) -> State:
    both = {n: t for n, t in experts.items() if "experts" not in n}
    return both | {STACK: torch.stack([t for n, t in experts.items() if "experts" in n])}


def kinds(report: DriftReport) -> set[str | None]:
    assert report.result is not None
    return {t.status for t in report.result.tensors}


@pytest.mark.parametrize("turned", [False, True])
def test_each_expert_is_compared_by_itself(tmp_path: Path, turned: bool) -> None:
    pair = (stacked(alone()), alone()) if turned else (alone(), stacked(alone()))

    report = drift(tmp_path, *pair, expect="identical")

    assert kinds(report) == {"identical"}
    assert found(report) == {}
    assert report.coverage.analyzed == report.coverage.total == EXPERTS + 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.float8_e4m3fn])
def test_the_expert_that_changed_is_named(tmp_path: Path, dtype: torch.dtype) -> None:
    new = alone()
    new["layers.0.mlp.experts.2.up_proj.weight"] += 0.5

    report = drift(tmp_path, alone(), {n: t.to(dtype) for n, t in stacked(new).items()})

    assert only(report, f"{STACK}[1]").status == "rounding"
    changed = only(report, f"{STACK}[2]")
    assert changed.status == "changed"
    assert changed.base_name == "layers.0.mlp.experts.2.up_proj.weight"


def test_experts_in_another_order_are_not_the_stack(tmp_path: Path) -> None:
    turned = {n: t.flip(0) if n == STACK else t for n, t in stacked(alone()).items()}

    report = drift(tmp_path, alone(), turned, expect="converted")

    assert "unexpected-change" in found(report)


def test_a_stack_of_more_experts_than_there_are_is_left_whole(tmp_path: Path) -> None:
    report = drift(tmp_path, alone(range(3)), stacked(alone()))

    assert kinds(report) == {"identical", "removed", "added"}
    assert only(report, STACK).status == "added"


def test_names_are_matched_from_headers_alone(tmp_path: Path) -> None:
    report = drift(tmp_path, alone(), stacked(alone()), headers_only=True)

    assert only(report, f"{STACK}[3]").base_name == "layers.0.mlp.experts.3.up_proj.weight"
    assert found(report) == {}
