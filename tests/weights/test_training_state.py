"""What training keeps beside a model is judged apart from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import gradscope
from gradscope.checkpoints.torchfile import read_torch
from gradscope.report.model import Finding
from gradscope.weights.masters import compared, digests


def state(seed: int = 0) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return {
        "a.weight": torch.randn(24, 16) * 0.1, "a.bias": torch.randn(24) * 0.1,
        "b.weight": torch.randn(8, 24) * 0.1, "b.bias": torch.zeros(8),
    }  # fmt: skip


def moments(weights: dict[str, torch.Tensor]) -> dict[str, Any]:
    return {
        "state": {
            i: {"exp_avg": w * 1e-3, "exp_avg_sq": w**2 * 1e-6, "step": torch.tensor(9.0)}
            for i, w in enumerate(weights.values())
        },
        "param_groups": [{"lr": 1e-3, "params": list(range(len(weights)))}],
    }


def report_on(folder: Path, value: object, **options: Any) -> Any:
    torch.save(value, folder / "a.pt")
    return gradscope.analyze_weights(folder / "a.pt", **options)


def told(report: Any) -> list[tuple[str, str, str]]:
    """The findings above info."""
    above: list[Finding] = [f for f in report.findings if f.severity.rank > 0]
    return [(f.name, str(f.severity), f.subject) for f in above]


def test_a_sound_state_is_quiet_and_under_a_role_of_its_own(tmp_path: Path) -> None:
    weights = state()
    value = {"model": weights, "optimizer": moments(weights), "ema": state()}
    report = report_on(tmp_path, value)
    assert (report.gate.exit_code, told(report)) == (0, [])
    roles = {t.name: str(t.role) for t in report.result.tensors}
    assert roles["optimizer.state.0.exp_avg"] == "optimizer-state"
    assert roles["optimizer.state.0.step"] == "counter"
    assert roles["ema.a.weight"] == "weight-average"
    assert roles["a.weight"] == "linear"
    assert report.coverage.analyzed == report.coverage.total == 4 + 12 + 4


def test_statistics_and_counts_are_those_of_the_model_alone(tmp_path: Path) -> None:
    weights = state()
    alone = report_on(tmp_path, weights).result
    value = {"model": weights, "optimizer": moments(weights), "ema": {"x": torch.ones(5, 5)}}
    both = report_on(tmp_path, value).result
    assert both.overall.statistics == alone.overall.statistics
    assert both.overall.parameters == alone.overall.parameters
    assert both.overall.tensors == alone.overall.tensors
    assert both.health == alone.health


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_moment_that_is_not_finite_is_critical_and_no_fault_of_the_model(tmp_path, value):
    weights, optimizer = state(), moments(state())
    optimizer["state"][2]["exp_avg"][3, 4] = value
    report = report_on(tmp_path, {"model": weights, "optimizer": optimizer})
    assert told(report) == [("non-finite", "critical", "optimizer.state.2.exp_avg")]
    assert "do not resume" in report.findings[0].recommendation
    assert report.gate.exit_code == 1
    assert report.result.health.score == 100


@pytest.mark.parametrize("leaf", ["exp_avg_sq", "max_exp_avg_sq", "exp_avg_sq_row", "square_avg"])
def test_a_negative_second_moment_is_high(tmp_path, leaf):
    weights, optimizer = state(), moments(state())
    moment = weights["a.weight"] ** 2
    moment[0, 0] = -1e-12
    optimizer["state"][0][leaf] = moment
    report = report_on(tmp_path, {"model": weights, "optimizer": optimizer})
    assert told(report) == [("negative-variance", "high", f"optimizer.state.0.{leaf}")]
    assert "average of squares" in report.findings[0].message


def test_a_first_moment_may_be_negative(tmp_path: Path) -> None:
    weights, optimizer = state(), moments(state())
    optimizer["state"][0]["exp_avg"] = -torch.ones(24, 16) - torch.rand(24, 16)
    assert told(report_on(tmp_path, {"model": weights, "optimizer": optimizer})) == []


def test_an_average_of_zeros_is_one_finding(tmp_path: Path) -> None:
    zeros = {name: torch.zeros_like(w) for name, w in state().items()}
    report = report_on(tmp_path, {"model": state(), "ema": zeros})
    assert told(report) == [("all-zero", "high", "ema.a.weight")]
    assert "3 of 4 averaged (EMA) tensors" in report.findings[0].message
    assert report.result.health.score == 100


def test_an_average_without_names_is_judged_as_a_whole(tmp_path: Path) -> None:
    zeros = [torch.zeros_like(w) for w in state().values()]
    report = report_on(tmp_path, {"model": state(), "ema": {"shadow_params": zeros}})
    assert told(report) == [("all-zero", "high", "ema.shadow_params.0")]
    alive = [torch.ones(3, 3), *zeros[1:]]
    assert told(report_on(tmp_path, {"model": state(), "ema": {"shadow_params": alive}})) == []


def test_what_is_zero_in_the_model_may_be_zero_in_its_average(tmp_path: Path) -> None:
    average = {**state(1), "b.bias": torch.zeros(8)}
    assert told(report_on(tmp_path, {"model": state(), "ema": average})) == []


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"optimizer": s}, lambda s: [s, s]])
def test_an_optimizer_alone_has_no_model_and_no_health(tmp_path, wrap):
    report = report_on(tmp_path, wrap(moments(state())))
    assert report.gate.exit_code == 0
    assert report.result.health is None
    assert report.result.overall.parameters == 0
    assert {str(t.role) for t in report.result.tensors} == {"optimizer-state", "counter"}
    assert any("no model" in note for note in report.result.notes)


def test_an_optimizer_alone_can_be_broken(tmp_path: Path) -> None:
    optimizer = moments(state())
    optimizer["state"][0]["exp_avg"][0, 0] = float("nan")
    report = report_on(tmp_path, optimizer)
    assert told(report) == [("non-finite", "critical", "state.0.exp_avg")]
    assert report.gate.exit_code == 1


def test_a_scheduler_alone_is_inconclusive(tmp_path: Path) -> None:
    assert report_on(tmp_path, {"base_lrs": [0.1], "last_epoch": 3}).gate.exit_code == 4


def test_random_states_alone_have_no_health(tmp_path: Path) -> None:
    report = report_on(tmp_path, {"cpu": torch.get_rng_state(), "python": (3, (1, 2), None)})
    assert report.result.health is None


# --- master weights -------------------------------------------------------------------------------

HALVES = [torch.bfloat16, torch.float16]


def mixed(dtype: torch.dtype, masters: list[torch.Tensor]) -> dict[str, Any]:
    model = {name: w.to(dtype) for name, w in state().items()}
    return {"model": model, "optimizer": {"fp32_from_fp16_params": [masters]}}


@pytest.mark.parametrize("dtype", HALVES)
def test_masters_that_round_to_the_model_are_quiet_in_any_order(tmp_path, dtype):
    report = report_on(tmp_path, mixed(dtype, list(reversed(state().values()))))
    assert told(report) == []
    assert {str(t.role) for t in report.result.tensors if "fp32" in t.name} == {"master-weight"}


@pytest.mark.parametrize("dtype", HALVES)
def test_a_master_one_rounding_away_is_astray(tmp_path, dtype):
    masters = [w.clone() for w in state().values()]
    masters[2][3, 4] *= 1.02
    report = report_on(tmp_path, mixed(dtype, masters))
    assert told(report) == [("master-mismatch", "medium", "optimizer.fp32_from_fp16_params.0.2")]
    assert report.findings[0].evidence == {"astray": 1, "compared": 4}
    assert report.gate.exit_code == 0


def test_masters_of_another_step_are_one_finding(tmp_path: Path) -> None:
    report = report_on(tmp_path, mixed(torch.bfloat16, [w + 0.01 for w in state().values()]))
    assert [name for name, *_ in told(report)] == ["master-mismatch"]
    assert "4 of 4 master weights" in report.findings[0].message


def test_masters_by_name_in_the_state_are_compared_too(tmp_path: Path) -> None:
    weights = state()
    optimizer = moments(weights)
    for i, master in enumerate(weights.values()):
        optimizer["state"][i]["master_param"] = master + (0.01 if i == 1 else 0)
    model = {name: w.bfloat16() for name, w in weights.items()}
    report = report_on(tmp_path, {"model": model, "optimizer": optimizer})
    assert told(report) == [("master-mismatch", "medium", "optimizer.state.1.master_param")]


def test_broken_masters_are_told_by_the_rule_of_their_cause(tmp_path: Path) -> None:
    masters = [w.clone() for w in state().values()]
    masters[0][0, 0] = float("nan")
    masters[2].zero_()
    found = told(report_on(tmp_path, mixed(torch.bfloat16, masters)))
    assert [name for name, *_ in found] == ["non-finite"]


def test_a_model_in_full_precision_needs_no_masters(tmp_path: Path) -> None:
    value = {"model": state(), "optimizer": {"fp32_from_fp16_params": [list(state(1).values())]}}
    report = report_on(tmp_path, value)
    assert told(report) == []
    assert "master-mismatch" in {n.rule for n in report.coverage.not_evaluated}


def test_flat_masters_are_not_evaluated(tmp_path: Path) -> None:
    flat = torch.cat([w.flatten() for w in state().values()])
    report = report_on(tmp_path, mixed(torch.bfloat16, [flat]))
    assert told(report) == []
    assert "master-mismatch" in {n.rule for n in report.coverage.not_evaluated}


@pytest.mark.parametrize("dtype", HALVES)
def test_rounding_is_that_of_torch_for_every_kind_of_value(tmp_path, dtype):
    bits = torch.randint(0, 2**31, (50_000,), dtype=torch.int64)
    values = torch.cat([bits.int().view(torch.float32), -bits.int().view(torch.float32)])
    finite = values[values.isfinite()]
    extremes = torch.tensor([0.0, -0.0, 1e-45, 6e-8, 65504.0, 65520.0, 3.4e38, 1.00390625, -1e-40])
    master = torch.cat([finite, extremes]).reshape(-1, 1)
    value = {"model": {"w": master.to(dtype)}, "optimizer": {"master_params": [master]}}
    torch.save(value, tmp_path / "a.pt")
    refs = read_torch(str(tmp_path / "a.pt")).tensors
    found = compared(refs, digests(refs))
    assert found is not None
    assert (found.compared, found.astray) == (1, ())
