"""``analyze_weights``: what the whole of a report says of one or several checkpoints."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch

import gradscope
from gradscope.errors import UsageError
from gradscope.report.formats import Display, renderer
from gradscope.report.model import Finding, Severity
from gradscope.statistics.records import Statistics
from gradscope.weights.health import health
from gradscope.weights.result import WeightsReport, WeightsResult

from .checkpoints import Array, Tensor, bf16, conv_net, transformer, write, write_sharded

UP = "model.layers.1.mlp.up_proj.weight"


def analyzed(*paths: Path, **options: object) -> WeightsReport:
    return gradscope.analyze_weights(*paths, **options)


def result(report: WeightsReport) -> WeightsResult:
    assert report.result is not None
    return report.result


def with_nan(tensors: dict[str, Array], name: str = UP) -> dict[str, Array]:
    tensor = tensors[name].copy()
    tensor.flat[7] = np.nan
    return {**tensors, name: tensor}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write(tmp_path / "model.safetensors", transformer())


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    """One critical finding, in one tensor."""
    return write(tmp_path / "broken.safetensors", with_nan(transformer()))


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return write_sharded(tmp_path / "sharded", transformer())


# -- health ---------------------------------------------------------------------------------------


def finding(severity: Severity, share: float | None = None) -> Finding:
    return Finding(
        rule="W999", name="made-up", severity=severity, subject="w", input="m.pt",
        message="", threshold=None,
        evidence={} if share is None else {"affected_fraction": share},
        recommendation="", fingerprint="",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("severity", "share", "score", "status"),
    [
        (Severity.CRITICAL, None, 20, "critical"),
        (Severity.CRITICAL, 1.0, 0, "critical"),
        (Severity.HIGH, None, 55, "poor"),
        (Severity.HIGH, 1.0, 20, "critical"),
        (Severity.MEDIUM, None, 85, "good"),
        (Severity.MEDIUM, 0.5, 72.5, "fair"),
        (Severity.MEDIUM, 0.4, 75, "good"),
        (Severity.MEDIUM, 0.404, 74.9, "fair"),
        (Severity.MEDIUM, 1.0, 60, "fair"),
        (Severity.HIGH, 3 / 7, 40, "poor"),
        (Severity.HIGH, 0.432, 39.9, "critical"),
        (Severity.LOW, 0.5, 90, "excellent"),
        (Severity.LOW, 0.51, 89.9, "good"),
        (Severity.LOW, None, 95, "excellent"),
        (Severity.LOW, 1.0, 85, "good"),
        (Severity.INFO, 1.0, 100, "excellent"),
    ],
)
def test_the_worst_finding_caps_the_score_and_the_affected_share_lowers_it(
    severity: Severity, share: float | None, score: float, status: str
) -> None:
    measured = health([finding(Severity.INFO), finding(severity, share)])
    assert (measured.score, measured.status) == (score, status)


def test_a_tensor_without_findings_is_excellent() -> None:
    assert (health([]).score, health([]).status) == (100, "excellent")


def test_many_findings_weigh_no_more_than_the_worst() -> None:
    several = [finding(Severity.MEDIUM)] * 20
    assert health(several) == health(several[:1])


def test_a_checkpoint_of_running_statistics_alone_has_health_too(tmp_path: Path) -> None:
    variance = {"a.running_var": np.float32([1.0, 2.0])}
    found = result(analyzed(write(tmp_path / "m.safetensors", variance)))
    assert (found.health.score, found.health.status) == (100, "excellent")


def test_only_the_broken_tensor_is_unhealthy_and_the_model_is_no_better(broken: Path) -> None:
    found = result(analyzed(broken))
    unhealthy = {t.name: t.health.status for t in found.tensors if t.health.score < 100}
    assert unhealthy == {UP: "critical"}
    assert (found.health.score, found.health.status) == (20, "critical")


def test_a_healthy_model_is_excellent(model: Path) -> None:
    assert result(analyzed(model)).health.score == 100


def test_a_model_read_in_part_is_never_excellent(sharded: Path) -> None:
    next(sharded.glob("*-00003-of*")).unlink()
    found = result(analyzed(sharded, select=["W"]))
    assert all(t.health.status == "excellent" for t in found.tensors)
    assert found.health.status == "good"


def test_leaving_tensors_out_on_request_costs_no_health(model: Path) -> None:
    assert result(analyzed(model, exclude=["lm_head*"])).health.score == 100


def test_the_mean_of_the_model_is_weighted_by_parameters(tmp_path: Path) -> None:
    a, b = np.zeros((30, 10), np.float32), transformer()[UP]
    a[:29] = b.ravel()[:290].reshape(29, 10)
    path = write(tmp_path / "m.safetensors", {"a.weight": a, "b.weight": b})
    found = result(analyzed(path, select=["dead-units"]))
    scores = {t.name: t.health.score for t in found.tensors}
    assert scores == {"a.weight": 100, "b.weight": 100}  # one dead row of thirty is info
    a[:2] = 0
    write(path, {"a.weight": a, "b.weight": b})  # three of thirty: still info
    a[:3] = 0
    write(path, {"a.weight": a, "b.weight": b})
    found = result(analyzed(path, select=["dead-units"]))
    score = {t.name: t.health.score for t in found.tensors}["a.weight"]
    assert score == round(85 - 25 * 4 / 30, 1)
    assert found.health.score == round(min(85, (score * 300 + 100 * 4096) / 4396), 1)


# -- pooled statistics ----------------------------------------------------------------------------


def agrees(measured: Statistics, values: Array) -> None:
    """Against NumPy and SciPy on all elements."""
    x = values.astype(np.float64)
    assert measured.count == x.size
    assert measured.zero_count == int((x == 0).sum())
    assert (measured.min, measured.max) == (x.min(), x.max())
    assert measured.abs_max == np.abs(x).max()
    assert measured.mean == pytest.approx(x.mean(), rel=1e-9)
    assert measured.std == pytest.approx(x.std(), rel=1e-9)
    assert measured.rms == pytest.approx(np.sqrt((x * x).mean()), rel=1e-9)
    assert measured.l2_norm == pytest.approx(np.linalg.norm(x), rel=1e-9)
    assert measured.skewness == pytest.approx(scipy.stats.skew(x), rel=1e-7)
    assert measured.kurtosis == pytest.approx(scipy.stats.kurtosis(x), rel=1e-7)
    assert measured.quantiles is not None
    for q, value in measured.quantiles.items():
        expected = np.quantile(x, float(q), method="inverted_cdf")
        assert value == pytest.approx(expected, rel=0.01)


def test_overall_statistics_are_those_of_all_elements_together(model: Path) -> None:
    overall = result(analyzed(model)).overall
    everything = np.concatenate([t.ravel() for t in transformer().values()])
    assert overall.tensors == len(transformer())
    assert overall.parameters == everything.size
    assert overall.statistics is not None
    agrees(overall.statistics, everything)


def test_roles_are_pooled_apart(model: Path) -> None:
    by_role = result(analyzed(model)).overall.by_role
    assert set(by_role) == {"embedding", "linear", "norm-gain", "unembedding"}
    for role, part in {"linear": "proj", "norm-gain": "norm", "unembedding": "lm_head"}.items():
        members = [t.ravel() for name, t in transformer().items() if part in name]
        assert by_role[role].tensors == len(members)
        agrees(by_role[role].statistics, np.concatenate(members))


def test_types_of_different_width_are_pooled_together(tmp_path: Path) -> None:
    a, b = transformer()[UP], transformer()[UP.replace("1", "2")]
    rounded = (bf16(b).codes.astype(np.uint32) << 16).view(np.float32)
    path = write(tmp_path / "m.safetensors", {"a.weight": a, "b.weight": bf16(b)})
    pooled = result(analyzed(path)).overall.statistics
    assert pooled is not None
    agrees(pooled, np.concatenate([a.ravel(), rounded.ravel()]))


def test_what_was_not_trained_is_no_part_of_the_whole(tmp_path: Path) -> None:
    path = write(tmp_path / "m.safetensors", conv_net())
    overall = result(analyzed(path)).overall
    left_out = ("running_mean", "running_var", "num_batches_tracked")
    trained = [t.ravel() for name, t in conv_net().items() if not name.endswith(left_out)]
    assert overall.parameters == sum(t.size for t in trained)
    assert overall.statistics is not None
    agrees(overall.statistics, np.concatenate(trained))
    assert overall.by_role["running-var"].tensors == 3


def test_several_checkpoints_are_pooled_as_one(model: Path, tmp_path: Path) -> None:
    other = write(tmp_path / "other.safetensors", conv_net())
    overall = result(analyzed(model, other)).overall
    one, two = (result(analyzed(path)).overall for path in (model, other))
    assert overall.parameters == one.parameters + two.parameters
    assert overall.statistics.count == one.statistics.count + two.statistics.count


def test_elements_that_are_not_finite_spoil_no_statistic(broken: Path) -> None:
    overall = result(analyzed(broken)).overall
    tensors = with_nan(transformer()).values()
    finite = np.concatenate([t[np.isfinite(t)].ravel() for t in tensors]).astype(np.float64)
    assert overall.statistics.nan_count == 1
    assert overall.statistics.mean == pytest.approx(finite.mean(), rel=1e-9)
    assert overall.statistics.std == pytest.approx(finite.std(), rel=1e-9)


# -- several inputs -------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [None, b"", b"<!DOCTYPE html>", b"\x00" * 100])
def test_a_bad_input_leaves_the_good_ones_reported(
    content: bytes | None, model: Path, tmp_path: Path
) -> None:
    bad = tmp_path / "bad.safetensors"
    if content is not None:
        bad.write_bytes(content)
    report = analyzed(bad, model)
    assert report.gate.exit_code == 3
    assert [error.input for error in report.errors] == [str(bad)]
    assert [item.path for item in report.inputs] == [str(model)]
    assert report.coverage.analyzed == len(transformer())
    assert any(str(bad) in reason for reason in report.gate.reasons)


def test_a_bad_input_outranks_the_findings_of_the_others(broken: Path, tmp_path: Path) -> None:
    report = analyzed(broken, tmp_path / "absent.safetensors")
    assert [f.name for f in report.findings] == ["non-finite"]
    assert report.gate.exit_code == 3


def test_only_bad_inputs_leave_no_result(tmp_path: Path) -> None:
    report = analyzed(tmp_path / "absent.safetensors")
    assert report.result is None
    assert report.gate.exit_code == 3
    assert report.errors[0].kind == "missing"


def test_findings_of_equal_tensors_of_two_inputs_are_told_apart(
    broken: Path, tmp_path: Path
) -> None:
    other = write(tmp_path / "other.safetensors", with_nan(transformer()))
    both = analyzed(broken, other).findings
    assert [f.subject for f in both] == [UP, UP]
    assert len({f.fingerprint for f in both}) == 2


def test_a_fingerprint_does_not_change_with_the_measured_value(tmp_path: Path) -> None:
    def fingerprint(rows: int) -> str:
        made = transformer()
        made[UP][:rows] = 0
        path = write(tmp_path / "m.safetensors", made)
        return analyzed(path, select=["dead-units"]).findings[0].fingerprint

    assert fingerprint(50) == fingerprint(60)


# -- what is analysed -----------------------------------------------------------------------------


def names(report: WeightsReport) -> list[str]:
    return [t.name for t in result(report).tensors]


def test_tensors_are_in_file_order(model: Path) -> None:
    assert names(analyzed(model)) == list(transformer())


def test_include_and_exclude_are_shell_patterns_of_names(model: Path) -> None:
    report = analyzed(model, include=["*layers.0*", "lm_head*"], exclude=["*norm*", "*attn*"])
    prefix = "model.layers.0.mlp"
    assert names(report) == [f"{prefix}.up_proj.weight", f"{prefix}.down_proj.weight",
                             "lm_head.weight"]  # fmt: skip
    assert report.coverage.analyzed == 3
    assert report.coverage.total == len(transformer())
    assert len(report.coverage.skipped) == len(transformer()) - 3
    assert report.gate.exit_code == 0


def test_a_fault_in_a_tensor_that_is_left_out_is_not_found(broken: Path) -> None:
    assert analyzed(broken).gate.exit_code == 1
    assert analyzed(broken, exclude=[UP]).gate.exit_code == 0


def test_nothing_matched_is_inconclusive_unless_that_is_allowed(model: Path) -> None:
    report = analyzed(model, include=["nothing.*"])
    assert report.gate.exit_code == 4
    assert "nothing was analysed" in report.gate.reasons[0]
    assert result(report).health is None
    assert analyzed(model, include=["nothing.*"], allow_empty=True).gate.exit_code == 0


def test_headers_only_reads_no_data_and_says_what_was_not_asked(model: Path) -> None:
    size = model.stat().st_size
    with model.open("r+b") as file:  # no data behind the header, but the right size
        header = 8 + int.from_bytes(file.read(8), "little")
        file.truncate(header)
        file.truncate(size)
    report = analyzed(model, headers_only=True)
    assert names(report) == list(transformer())
    tensors = result(report).tensors
    assert all(t.statistics is None and t.health is None for t in tensors)
    assert {t.role for t in tensors} == {"embedding", "linear", "norm-gain", "unembedding"}
    missed = {n.rule for n in report.coverage.not_evaluated}
    assert {"non-finite", "all-zero", "dead-units"} <= missed
    assert missed.isdisjoint({"index-mismatch", "truncated-file", "empty-tensor", "missing-layer"})
    assert report.gate.exit_code == 0
    assert analyzed(model).gate.exit_code == 1  # the data is zeros


def test_headers_only_finds_what_headers_show(sharded: Path) -> None:
    next(sharded.glob("*-00003-of*")).unlink()
    report = analyzed(sharded, headers_only=True)
    assert [f.name for f in report.findings] == ["missing-shard"]
    assert report.gate.exit_code == 3


def test_one_nested_dict_of_a_torch_file_is_chosen_by_key(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    a, b = torch.ones(4, 4), torch.zeros(4, 4)
    torch.save({"model": {"a.weight": a}, "ema": {"b.weight": b}}, path)
    assert names(analyzed(path, key="ema")) == ["b.weight"]
    assert names(analyzed(path, key="model")) == ["a.weight"]


# -- the gate -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "severity"), [(1, "info"), (20, "medium"), (60, "high"), (0, None)]
)
@pytest.mark.parametrize("fail_on", ["info", "low", "medium", "high", "critical", "never"])
def test_the_gate_fails_at_and_above_the_chosen_severity(
    rows: int, severity: str | None, fail_on: str, tmp_path: Path
) -> None:
    made = transformer()
    made[UP][:rows] = 0
    path = write(tmp_path / "m.safetensors", made)
    report = analyzed(path, select=["dead-units"], fail_on=fail_on)
    order = ["info", "low", "medium", "high", "critical", "never"]
    fails = severity is not None and order.index(severity) >= order.index(fail_on)
    assert (report.gate.failed, report.gate.exit_code) == (fails, int(fails))


def test_findings_are_listed_with_the_worst_first(tmp_path: Path) -> None:
    made = with_nan(transformer())
    made["lm_head.weight"] = made["model.embed_tokens.weight"]
    made["model.layers.0.mlp.up_proj.weight"][:] = 0
    report = analyzed(write(tmp_path / "m.safetensors", made))
    assert [f.severity.value for f in report.findings] == ["critical", "high", "info"]


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({}, ["non-finite", "all-zero"]),
        ({"select": ["W101"]}, ["non-finite"]),
        ({"select": ["W1"]}, ["non-finite", "all-zero"]),
        ({"select": ["all-zero"]}, ["all-zero"]),
        ({"select": ["C"]}, []),
        ({"ignore": ["W101"]}, ["all-zero"]),
        ({"ignore": ["W"]}, []),
        ({"ignore": ["W"], "select": ["W101"]}, ["non-finite"]),
        ({"ignore": ["W101"], "select": ["W"]}, ["all-zero"]),
    ],
)
def test_rules_are_selected_and_ignored_by_code_prefix_or_name(
    options: dict[str, list[str]], found: list[str], tmp_path: Path
) -> None:
    made = with_nan(transformer())
    made["model.layers.0.mlp.up_proj.weight"][:] = 0
    path = write(tmp_path / "m.safetensors", made)
    assert [f.name for f in analyzed(path, **options).findings] == found


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"select": ["all-zeros"]}, "all-zero"),
        ({"ignore": ["W999"]}, "W999"),
        ({"device": "cuda:99"}, "cuda:99"),
        ({"device": "abacus"}, "abacus"),
        ({"key": "model"}, "model"),
        ({"fail_on": "sometimes"}, "sometimes"),
    ],
)
def test_a_wrong_request_is_refused(options: dict[str, object], said: str, model: Path) -> None:
    with pytest.raises(UsageError, match=said):
        analyzed(model, **options)


def test_an_unknown_key_of_a_torch_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save({"model": {"a.weight": torch.ones(4, 4)}}, path)
    with pytest.raises(UsageError, match="modle"):
        analyzed(path, key="modle")


# -- determinism ----------------------------------------------------------------------------------


def printed(report: WeightsReport) -> str:
    return renderer("json")(report, Display())


def test_the_report_is_the_same_to_the_byte_for_any_number_of_jobs(tmp_path: Path) -> None:
    made: dict[str, Tensor] = {**with_nan(transformer()), "half.weight": bf16(transformer()[UP])}
    path = write_sharded(tmp_path, made)
    reports = {printed(analyzed(path, jobs=jobs)) for jobs in (1, 2, 3)}
    assert len(reports) == 1


def test_the_report_is_strict_json_with_numbers_that_are_not_finite_as_strings(
    broken: Path,
) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    loaded = json.loads(printed(analyzed(broken)), parse_constant=refuse)
    assert loaded["schema_version"] == "1.0"
    assert loaded["command"] == "weights"
    (tensor,) = (t for t in loaded["result"]["tensors"] if t["name"] == UP)
    assert tensor["nonfinite"] == [{"index": [0, 7], "value": "NaN", "score": None}]
    again = WeightsReport.model_validate(loaded)
    assert printed(again) == printed(analyzed(broken))


def test_progress_tells_bytes_done_and_bytes_in_all(model: Path) -> None:
    seen: list[tuple[int, int]] = []
    analyzed(model, progress=lambda done, total: seen.append((done, total)))
    total = sum(t.nbytes for t in transformer().values())
    assert {t for _, t in seen} == {total}
    assert [d for d, _ in seen] == sorted(d for d, _ in seen)
    assert seen[-1][0] == total


# -- files that change ----------------------------------------------------------------------------


def touching(path: Path) -> Callable[[int, int], None]:
    """A progress callback that gives a file a new modification time while it is read."""
    now = path.stat().st_mtime_ns
    return lambda done, _total: os.utime(path, ns=(now, now + done + 1))


def test_a_file_that_changes_while_it_is_read_is_not_reported(model: Path) -> None:
    report = analyzed(model, progress=touching(model))
    assert report.gate.exit_code == 3
    assert report.errors[0].kind == "changed"
    assert report.coverage.analyzed == 0
    assert report.coverage.total == len(transformer())
    assert result(report).tensors == ()


def test_keep_going_analyses_the_shards_that_did_not_change(sharded: Path) -> None:
    changing = next(sharded.glob("*-00002-of*"))
    stopped = analyzed(sharded, progress=touching(changing))
    assert (stopped.gate.exit_code, stopped.coverage.analyzed) == (3, 0)
    report = analyzed(sharded, progress=touching(changing), keep_going=True)
    assert report.gate.exit_code == 3
    index = json.loads((sharded / "model.safetensors.index.json").read_text())["weight_map"]
    kept = [name for name in transformer() if index[name] != changing.name]
    assert names(report) == kept
    lost = {skip.subject for skip in report.coverage.skipped}
    assert lost == set(transformer()) - set(kept)
    assert result(report).health.status != "excellent"


def test_a_file_that_shrinks_while_it_is_read_fails_alone(model: Path, tmp_path: Path) -> None:
    other = write(tmp_path / "other.safetensors", conv_net())

    def shrink(done: int, total: int) -> None:
        if other.stat().st_size > 5000:
            os.truncate(other, 5000)

    report = analyzed(model, other, progress=shrink)
    assert report.gate.exit_code == 3
    assert {error.input for error in report.errors} == {str(other)}
    assert set(transformer()) <= set(names(report))


# -- cross-layer outliers -------------------------------------------------------------------------


def test_outlier_dimensions_are_grouped_across_layers(tmp_path: Path) -> None:
    made = transformer(6)
    for layer in range(5):
        made[f"model.layers.{layer}.self_attn.o_proj.weight"][4, (7 * layer + 1) % 32] = 3.0
    report = analyzed(write(tmp_path / "m.safetensors", made))
    (shared,) = (f for f in report.findings if "[row" in f.subject)
    assert shared.subject == "model.layers.*.self_attn.o_proj.weight[row 4]"
    assert shared.severity == Severity.INFO
    assert shared.evidence == {"row": 4, "tensors": 5}
    assert "5 tensors" in shared.message
