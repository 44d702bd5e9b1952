"""What a practitioner would say of a run, and what must not change it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from gradscope import analyze_flow
from gradscope.flow.result import FlowReport
from gradscope.histories.history import History, Layer, Status
from gradscope.histories.open import open_history
from gradscope.report.severity import Severity

from .made import RECORDED, made, noise, of_vectors, quadratic

FIXTURES = Path(__file__).parents[2] / "fixtures"
RUNS = ("cnn", "transformer", "diverging", "dying", "plain", "residual")


def recorded(name: str) -> History:
    return open_history(str(FIXTURES / ("" if name == "sigmoid" else "recorded") / name))


def severe(report: FlowReport) -> list[tuple[str, str]]:
    return [(f.name, f.subject) for f in report.findings if f.severity.rank >= Severity.HIGH.rank]


def told(report: FlowReport) -> list[tuple[str, str, str]]:
    return [(f.name, f.severity, f.subject) for f in report.findings]


# --- real runs ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cnn", "transformer"])
@pytest.mark.parametrize("by", ["layer", "param"])
def test_a_healthy_run_has_no_finding_that_needs_a_person(name: str, by: str) -> None:
    report = analyze_flow(recorded(name), by=by)

    assert [f for f in report.findings if f.severity.rank > Severity.LOW.rank] == []
    assert report.gate.exit_code == 0


def test_a_deep_sigmoid_network_vanishes_as_one_stack_and_its_output_does_not_explode() -> None:
    report = analyze_flow(recorded("sigmoid"))

    assert [f.name for f in report.findings if f.severity.rank >= Severity.HIGH.rank] == [
        "vanishing-gradient"
    ]
    finding = report.findings[0]
    assert finding.subject.startswith("0 … ")
    assert finding.evidence["factor_per_layer"] == pytest.approx(7.4, rel=0.15)
    assert report.result.explosion.exploding_layers == ()
    assert report.result.depth.systemic == "vanishing"


def test_a_learning_rate_that_diverges_is_named_as_the_cause() -> None:
    report = analyze_flow(recorded("diverging"))

    assert severe(report) == [("non-finite-gradient", "loss"), ("diverged", "loss")]
    assert "diverging" in report.findings[0].message
    assert "learning rate" in report.findings[0].recommendation


def test_a_layer_that_dies_is_a_dead_zone_since_the_step_it_died_at() -> None:
    report = analyze_flow(recorded("dying"))

    (zone,) = report.result.dead_zones
    assert severe(report) == [("dead-zone", "0 … 4")]
    assert zone.origin == "4"
    assert zone.extent.onset == (120, 121)
    assert zone.intervention_required


def test_a_dead_block_cuts_a_plain_net_off_and_is_passed_around_in_a_residual_one() -> None:
    plain, residual = analyze_flow(recorded("plain")), analyze_flow(recorded("residual"))

    assert plain.result.dead_zones[0].affected_layers == (
        "stem",
        *(f"blocks.{i}" for i in range(4)),
    )
    assert residual.result.dead_zones[0].affected_layers == ("blocks.3",)
    assert plain.result.critical_paths[0].criticality_score == 1.0
    assert residual.result.critical_paths[0].criticality_score < 0.5
    assert plain.result.network.metrics.network_connectivity < 0.7
    assert residual.result.network.metrics.network_connectivity > 0.8


# --- what must not matter -------------------------------------------------------------------------


def scaled(history: History, factor: float) -> History:
    fields = {
        name: getattr(history, name).astype(np.float64) * factor
        for name in ("l2", "max_abs", "total_l2")
        if getattr(history, name) is not None
    }
    return replace(history, **fields)


@pytest.mark.parametrize("factor", [1e-8, 1e-4, 1e4, 1e8])
@pytest.mark.parametrize("name", [*RUNS, "sigmoid"])
def test_the_scale_of_the_loss_changes_no_finding(name: str, factor: float) -> None:
    # Epsilon has the gradient's scale, so an adaptive optimizer is not invariant to it.
    history = replace(recorded(name), meta={})

    assert told(analyze_flow(scaled(history, factor))) == told(analyze_flow(history))


def test_the_order_of_rows_in_a_file_changes_no_finding() -> None:
    history = replace(recorded("dying"), exact=None, sketches=None)
    order = np.random.default_rng(0).permutation(len(history.layers))
    place = np.append(np.argsort(order), [len(order), -1])
    shuffled = replace(
        history,
        layers=tuple(history.layers[i] for i in order),
        edges=place[history.edges],
        **{
            name: values[:, order]
            for name in RECORDED
            if np.shape(values := getattr(history, name)) == history.shape
        },
    )  # fmt: skip

    assert told(analyze_flow(shuffled)) == told(analyze_flow(history))


def thinned(history: History) -> History:
    fields = {
        name: values[::2]
        for name in ("steps", *RECORDED)
        if (values := getattr(history, name)) is not None
    }
    return replace(history, **fields, sketches=None, exact=None)


@pytest.mark.parametrize("name", ["dying", "plain", "sigmoid"])
def test_every_second_record_gives_the_same_regions_with_wider_onsets(name: str) -> None:
    whole, half = analyze_flow(recorded(name)), analyze_flow(thinned(recorded(name)))

    def places(report: FlowReport) -> list[tuple[str, ...]]:
        regions = [*report.result.vanishing_regions, *report.result.exploding_regions]
        return [r.affected_layers for r in [*regions, *report.result.dead_zones]]

    assert places(half) == places(whole)
    for a, b in zip(whole.result.dead_zones, half.result.dead_zones, strict=True):
        assert (b.extent.onset[0] or 0) <= a.extent.onset[1] <= b.extent.onset[1] + 1


# --- faults in otherwise quiet runs ---------------------------------------------------------------


def test_one_nan_in_one_layer_of_one_step_is_critical_and_located() -> None:
    norms = noise(200, 8)
    norms[100, 3] = np.nan

    report = analyze_flow(made(norms))

    assert report.gate.exit_code == 1
    assert severe(report) == [("non-finite-gradient", "layers.3")]
    assert report.findings[0].evidence["step"] == 100


def test_of_layers_that_turn_at_once_the_nearest_to_the_loss_is_the_origin() -> None:
    norms = noise(60, 6)
    norms[40, :4] = np.inf

    (entry,) = analyze_flow(made(norms)).result.nonfinite

    assert entry.origin == "layers.3"
    assert set(entry.inherited_by) == {"layers.0", "layers.1", "layers.2"}
    assert entry.last_finite_step == 39


def test_an_infinity_on_a_skipped_step_is_information() -> None:
    norms = noise(200, 8)
    norms[100] = np.inf
    skipped = np.zeros(200, np.uint8)
    skipped[100] = 1

    report = analyze_flow(made(norms, skipped=skipped))

    assert told(report) == [("non-finite-gradient", "info", "network")]
    assert report.gate.exit_code == 0


def test_white_noise_has_no_finding_in_a_hundred_thousand_layer_records(
    record_property: Callable[[str, object], None],
) -> None:
    report = analyze_flow(made(noise(2500, 40)))
    heavy = np.exp(0.3 * np.random.default_rng(1).standard_t(3, (2500, 40)))
    spikes = len(analyze_flow(made(heavy)).result.spikes)
    record_property("student_t3_spikes_per_1e5", spikes)
    print(
        f"\nfalse alarms in 1e5 layer-records: Gaussian {len(report.findings)}, Student "
        f"t3 spikes {spikes}"
    )

    assert report.findings == ()
    assert report.result.oscillation == ()
    assert spikes < 1000


def test_directions_of_noise_are_indeterminate_and_no_oscillation() -> None:
    rng = np.random.default_rng(3)

    report = analyze_flow(
        of_vectors([[rng.normal(size=50), rng.normal(size=80)] for _ in range(128)])
    )

    assert report.findings == ()
    assert {t.flow_direction for t in report.result.temporal} == {"indeterminate"}


@pytest.mark.parametrize(
    ("rate", "direction"), [(0.5, "forward"), (1.5, "oscillating"), (2.2, "oscillating")]
)
def test_gradient_descent_on_a_quadratic_shows_its_learning_rate(
    rate: float, direction: str
) -> None:
    result = analyze_flow(quadratic(rate, records=60)).result

    assert result.layers[0].flow_direction == direction
    if direction == "oscillating":
        assert result.learning_rate.divide_by == pytest.approx(rate, rel=0.05)
        assert result.learning_rate.suggested == pytest.approx(0.5, rel=0.05)
    else:
        assert result.learning_rate is None


def test_only_the_rate_that_diverges_is_of_high_severity() -> None:
    assert [f.severity for f in analyze_flow(quadratic(1.5)).findings] == [Severity.MEDIUM]
    found = analyze_flow(quadratic(2.2)).findings
    assert {f.name for f in found if f.severity.rank >= Severity.HIGH.rank} == {
        "oscillation",
        "exploding-gradient",
    }


@pytest.mark.parametrize("onset", [60, 100, 150])
def test_a_local_drop_is_found_where_and_when_it_was_planted(onset: int) -> None:
    norms = noise(240, 8)
    norms[onset:, 2:4] *= 1e-5

    report = analyze_flow(made(norms))

    (region,) = report.result.vanishing_regions
    assert region.affected_layers == ("layers.2", "layers.3")
    assert region.extent.onset == (onset - 1, onset)
    assert region.extent.ongoing
    assert not region.systemic
    assert severe(report) == [("vanishing-gradient", "layers.2 … layers.3")]
    assert not any("clip" in advice for advice in region.mitigation_suggestions)


def test_a_network_whose_gradients_fall_together_converges_and_does_not_vanish() -> None:
    norms = noise(400, 6) * np.exp(-np.arange(400) / 40)[:, None]

    result = analyze_flow(made(norms, loss=np.exp(-np.arange(400) / 80))).result

    assert result.vanishing_regions == ()
    assert result.convergence is not None


def test_growth_that_no_spike_detector_sees_is_an_explosion() -> None:
    norms = noise(300, 5, scale=0.1)
    norms[200:] *= np.exp(0.04 * np.arange(100))[:, None]

    report = analyze_flow(made(norms))

    assert report.result.spikes == ()
    assert severe(report) == [("exploding-gradient", "layers.0 … layers.4")]
    _, until = report.result.exploding_regions[0].extent.onset
    assert 150 <= until <= 240


def test_growth_under_a_falling_loss_is_not_an_explosion() -> None:
    norms = noise(300, 5, scale=0.1)
    norms[200:] *= np.exp(0.03 * np.arange(100))[:, None]

    report = analyze_flow(made(norms, loss=np.linspace(2, 0.1, 300)))

    assert [f for f in report.findings if f.severity.rank > Severity.LOW.rank] == []


def test_a_spike_that_leaves_no_trace_is_at_most_medium() -> None:
    norms = noise(300, 5, scale=0.1)
    norms[200] *= 1000

    report = analyze_flow(made(norms))

    assert told(report) == [("gradient-spike", "medium", "network")]
    assert report.findings[0].evidence["step"] == 200


def test_a_bottleneck_between_two_wide_layers_is_named() -> None:
    norms = noise(100, 7, scale=0.1)
    norms[:, 3] *= 10**-2.5

    report = analyze_flow(made(norms))

    assert told(report) == [("bottleneck", "medium", "layers.3")]
    assert report.result.layers[3].bottleneck_score == pytest.approx(2.5 / 3, abs=0.05)


# --- the least there can be -----------------------------------------------------------------------


def test_one_record_says_nothing_it_does_not_know() -> None:
    result = analyze_flow(made([[1.0, 2.0]])).result

    assert result.layers[0].flow_direction == "indeterminate"
    assert result.layers[0].flow_consistency is None
    assert result.layers[0].stability_score is None
    assert {e.edge_type for e in result.network.edges} == {"unknown"}


def test_no_layers_and_no_records_are_inconclusive_not_healthy() -> None:
    for history in (made(np.empty((0, 3))), made(np.empty((5, 0)))):
        report = analyze_flow(history)
        assert report.gate.exit_code == 4
        assert report.findings == ()


def test_a_layer_without_any_gradient_is_missing_not_dead() -> None:
    norms = noise(50, 4)
    status = np.full(norms.shape, Status.RECORDED, np.uint8)
    norms[:, 1], status[:, 1] = np.nan, Status.NONE
    status[:, 2] = Status.FROZEN

    report = analyze_flow(made(norms, status=status))

    assert told(report) == [
        ("missing-gradient", "medium", "layers.1"),
        ("missing-gradient", "info", "layers.2"),
    ]
    assert report.result.dead_zones == ()
    assert [s.subject for s in report.coverage.skipped] == ["layers.1", "layers.2"]


def test_tied_weights_are_counted_once() -> None:
    history = made(noise(20, 3))
    layers = (*history.layers[:2], Layer("layers.2", "matrix", 100, "layers.2", tied_to=0))

    result = analyze_flow(replace(history, layers=layers)).result

    assert [layer.layer_name for layer in result.layers] == ["layers.0", "layers.1"]


def test_what_needs_directions_or_updates_is_not_evaluated_without_them() -> None:
    report = analyze_flow(made(noise(50, 3)))

    assert {n.rule for n in report.coverage.not_evaluated} >= {
        "oscillation",
        "update-ratio",
        "stagnation",
    }
