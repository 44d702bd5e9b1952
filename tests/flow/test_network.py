"""Nodes, edges, metrics, depth and the rows of layers, against closed forms."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from scipy import stats

from gradscope import analyze_flow
from gradscope.flow.depth import depth_of
from gradscope.flow.graph import graph_of
from gradscope.flow.joining import series
from gradscope.flow.levels import levels
from gradscope.flow.network import edge_type, flows
from gradscope.flow.recent import kin, recent
from gradscope.flow.result import FlowResult
from gradscope.histories.history import Exact, History, Sketches, Status

from .made import made, noise, of_vectors


def result(history: History, **options: Any) -> FlowResult:
    found = analyze_flow(history, **options).result
    assert found is not None
    return found


def steady(*norms: float, records: int = 20) -> np.ndarray:
    return np.tile(np.array(norms, dtype=np.float64), (records, 1))


DIAMOND = np.array([[-1, 0], [0, 1], [0, 2], [1, 3], [2, 3], [3, 4]])


# --- nodes ----------------------------------------------------------------------------------------


def test_roles_are_told_by_the_topology() -> None:
    edges = np.array([[-1, 0], [0, 1], [1, 2], [2, 5], [3, 3]])

    nodes = result(made(steady(1, 1, 1, 1, 1), edges=edges, topology="given")).network.nodes

    assert {n.layer_name: (n.role, n.node_type, n.depth) for n in nodes} == {
        "layers.0": ("sink", "sink", 2),
        "layers.1": ("interior", "normal", 1),
        "layers.2": ("source", "source", 0),
        "layers.3": ("isolated", "normal", 0),
        "layers.4": ("isolated", "normal", 0),
    }


@pytest.mark.parametrize(
    ("norm", "condition"), [(0.099, "bottleneck"), (0.101, "normal"), (1e-5, "bottleneck")]
)
def test_a_bottleneck_is_a_tenth_of_both_neighbours(norm: float, condition: str) -> None:
    nodes = result(made(steady(1, 1, norm, 1, 1))).network.nodes

    assert [n.condition for n in nodes] == ["normal", "normal", condition, "normal", "normal"]


@pytest.mark.parametrize(("gain", "condition"), [(9.9, "normal"), (10.1, "amplifier")])
def test_an_amplifier_is_ten_times_the_next_layer_and_unlike_the_others(
    gain: float, condition: str
) -> None:
    nodes = result(made(steady(1, 1, 1, gain, 1, 1, 1, 1))).network.nodes

    assert nodes[3].condition == condition
    assert {n.condition for i, n in enumerate(nodes) if i != 3} == {"normal"}


def test_a_stack_of_which_every_layer_amplifies_has_no_amplifier() -> None:
    nodes = result(made(steady(*11.0 ** np.arange(8)[::-1]))).network.nodes

    assert {n.condition for n in nodes} == {"normal"}


def test_gains_of_two_layers_do_not_say_what_is_usual() -> None:
    assert {n.condition for n in result(made(steady(50, 1, 1))).network.nodes} == {"normal"}


def test_strength_is_the_median_of_the_last_window() -> None:
    norms = np.r_[steady(5, 5), steady(2, 3, records=8)]
    norms[-1] = 99

    nodes = result(made(norms, numel=4), window=8).network.nodes

    assert [n.gradient_strength for n in nodes] == [pytest.approx(1.0), pytest.approx(1.5)]
    missing = made(norms, status=np.zeros(norms.shape, np.uint8))
    assert [n.gradient_strength for n in result(missing).network.nodes] == [None, None]


def test_influence_is_the_share_of_the_parameters_behind() -> None:
    sizes = [10, 20, 30, 40]

    found = result(made(steady(1, 1, 1, 1), numel=sizes, edges=DIAMOND, topology="given"))

    assert [n.influence_score for n in found.network.nodes] == [0.1, 0.2, 0.3, 1.0]
    assert {n.influence_score for n in result(made(steady(1, 1))).network.nodes} == {None}
    unsized = made(steady(1, 1, 1, 1), numel=None, edges=DIAMOND, topology="given")
    assert {n.influence_score for n in result(unsized).network.nodes} == {None}


def test_neighbours_of_a_kind_are_found_past_other_kinds() -> None:
    kinds = ["matrix", "norm", "bias", "matrix", "norm", "matrix"]
    s = series(made(noise(5, 6), kinds=kinds))
    graph = graph_of(s)

    assert kin(s, 3, graph.before) == [0]
    assert kin(s, 0, graph.after) == [3]
    assert kin(s, 1, graph.after) == [4]
    assert kin(s, 2, graph.after) == []


def test_a_bottleneck_lies_below_the_lower_of_both_sides() -> None:
    edges = np.array([[-1, 0], [-1, 1], [0, 2], [1, 2], [2, 3], [2, 4], [3, 5], [4, 5]])
    s = series(made(steady(1e4, 1e2, 1, 1e1, 1e3), numel=1, edges=edges, topology="given"))
    graph = graph_of(s)

    found = recent(s, graph, levels(s, graph), 8)

    # Medians of log10: 3 before, 2 after.
    assert found.bottleneck[2] == pytest.approx(2 / 3)
    assert np.isnan(found.bottleneck[[0, 1, 3, 4]]).all()


def test_the_deficit_is_in_decades_below_the_loss_side() -> None:
    norms = steady(1e-2, 1, 1, 1, records=30)
    norms[:22, 0] = 7
    norms[25, 0] = 0
    s = series(made(norms, numel=1))
    graph = graph_of(s)

    found = recent(s, graph, levels(s, graph), 8)

    np.testing.assert_allclose(found.deficit, [2, 0, 0, 0], atol=1e-6)


# --- edges ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flow", "kind"),
    [
        (np.r_[np.ones(1), np.zeros(9)], "intermittent"),
        (np.r_[np.ones(1), np.zeros(10)], "blocked"),
        (np.r_[np.ones(9), np.zeros(1)], "strong"),
        (np.r_[np.ones(8), np.zeros(1)], "intermittent"),
        (np.full(10, 0.099), "weak"),
        (np.full(10, 0.1), "strong"),
        (np.full(10, 1e-3), "blocked"),
        (np.full(10, 1.01e-3), "weak"),
        (np.ones(4), "unknown"),
        (np.ones(5), "strong"),
    ],
)
def test_edges_are_told_by_how_often_and_how_much_they_carry(flow: np.ndarray, kind: str) -> None:
    assert edge_type(flow) == kind


def test_without_recorded_flow_an_edge_carries_the_lesser_of_its_ends() -> None:
    norms = steady(4, 1, 2, 3)
    norms[3, 1], norms[4, 2] = 0, np.nan
    s = series(made(norms, numel=1, edges=DIAMOND, topology="given"))

    found = flows(s, graph_of(s), 10)

    assert not found.recorded
    assert {edge: c for edge, c in found.capacity.items() if edge[1] >= 0} == {
        (0, 1): 1,
        (0, 2): 2,
        (1, 3): 1,
        (2, 3): 2,
    }
    assert found.capacity[3, -2] == 3
    assert found.rms[found.edges.index((0, 1)), 3] == 0
    assert np.isnan(found.rms[found.edges.index((2, 3)), 4])


def test_recorded_flow_comes_first_and_strength_is_over_the_median_edge() -> None:
    flow = np.tile([9.0, 1.0, 4.0, 1.0, 0.05, 7.0], (20, 1))

    network = result(
        made(steady(1, 1, 1, 1), edges=DIAMOND, topology="given", edge_flow=flow)
    ).network

    edges = {(e.from_layer[-1], e.to_layer[-1]): e for e in network.edges}
    assert {pair: e.flow_strength for pair, e in edges.items()} == {
        ("0", "1"): 1.0,
        ("0", "2"): 4.0,
        ("1", "3"): 1.0,
        ("2", "3"): pytest.approx(0.05),
    }
    assert {e.basis for e in network.edges} == {"recorded"}
    assert edges["2", "3"].edge_type == "weak"
    proxy = made(steady(1, 1, 1, 1), edges=DIAMOND, topology="given")
    assert {e.basis for e in result(proxy).network.edges} == {"proxy"}


def test_edges_that_carry_nothing_do_not_count_for_the_median() -> None:
    norms = steady(1, 0, 0, 0, 2, 2)

    edges = result(made(norms, numel=1)).network.edges

    assert [e.flow_strength for e in edges] == [0, 0, 0, 0, 1]
    assert [e.edge_type for e in edges] == ["blocked"] * 4 + ["strong"]


def test_the_strength_of_an_edge_is_that_of_the_last_window_and_its_type_that_of_the_run() -> None:
    norms = np.r_[steady(1, 1, 1, 1, 1e-9, records=12), steady(1, 1, 1, 1, 1, records=8)]

    edge = result(made(norms), window=8).network.edges[-1]

    assert edge.flow_strength == 1
    assert edge.edge_type == "intermittent"


def mad(values: np.ndarray) -> float:
    return float(np.median(np.abs(values - np.median(values))))


@pytest.mark.parametrize("every", [1, 2, 3])
def test_the_consistency_of_an_edge_is_that_of_its_share_over_all_records(every: int) -> None:
    """exp(-1.4826 MAD(ln phi)), phi the edge's smaller RMS over the median edge at that record."""
    norms = noise(120, 6, 0.2, seed=3)[::every]
    rms = norms.astype(np.float32).astype(np.float64) / 10
    carried = np.array([[min(row[i], row[i + 1]) for i in range(5)] for row in rms])
    shares = np.array([np.log(row / np.median(row)) for row in carried])

    edges = result(made(norms), window=8).network.edges

    wanted = [math.exp(-1.4826 * mad(shares[:, i])) for i in range(5)]
    assert [e.flow_consistency for e in edges] == pytest.approx(wanted, rel=1e-9)


def test_an_edge_that_loses_its_share_smoothly_is_not_consistent() -> None:
    norms = np.ones((100, 5))
    norms[:, 0] = np.exp(-np.linspace(0, 2, 100))

    first, *others = result(made(norms)).network.edges

    assert first.flow_consistency == pytest.approx(
        math.exp(-1.4826 * mad(np.linspace(0, 2, 100))), rel=1e-6
    )
    assert all(edge.flow_consistency == 1 for edge in others)


# --- metrics --------------------------------------------------------------------------------------


def test_efficiency_is_the_geometric_mean_over_entries_of_widths() -> None:
    edges = np.array([[-1, 0], [-1, 1], [0, 2], [1, 2], [2, 3]])

    metrics = result(
        made(steady(0.1, 0.4, 1.0), numel=1, edges=edges, topology="given")
    ).network.metrics

    assert metrics.overall_flow_efficiency == pytest.approx(math.sqrt(0.1 * 0.4))
    dead = made(steady(0.0, 0.4, 1.0), numel=1, edges=edges, topology="given")
    assert result(dead).network.metrics.overall_flow_efficiency == 0
    none = made(steady(0.1, 0.4, 0.0), numel=1, edges=edges, topology="given")
    assert result(none).network.metrics.overall_flow_efficiency is None


def test_connectivity_is_the_share_of_parameters_that_open_edges_reach() -> None:
    norms = steady(1, 1, 1e-6, 1, 1)
    sizes = [10, 20, 30, 40, 100]
    edges = np.array([[-1, 0], [0, 1], [1, 2], [2, 3], [3, 4], [4, 5]])

    metrics = result(made(norms, numel=sizes, edges=edges, topology="given")).network.metrics

    assert metrics.network_connectivity == pytest.approx(140 / 200)
    assert metrics.bottleneck_density == pytest.approx(1 / 5)
    assert result(made(norms, numel=sizes)).network.metrics.network_connectivity is None
    unsized = made(norms, numel=None, edges=edges, topology="given")
    assert result(unsized).network.metrics.network_connectivity is None


def test_an_empty_network_has_no_metric() -> None:
    metrics = result(made(np.empty((5, 0)))).network.metrics

    assert set(metrics.model_dump().values()) == {None}


# --- depth ----------------------------------------------------------------------------------------


def depth(norms: np.ndarray, **fields: Any):
    s = series(made(norms, numel=1, **fields))
    return depth_of(s, graph_of(s))


def test_depth_is_the_robust_slope_of_median_logs_against_the_distance_to_the_loss() -> None:
    logs = -np.array([9.0, 7, 6.5, 4, 3.2, 2, 1.1, 0])
    away = np.arange(8)[::-1]

    found = depth(np.exp(logs) * noise(31, 8, 1e-4))

    fit = stats.theilslopes(logs, away)
    assert found.nats_per_layer == pytest.approx(-fit.slope, abs=1e-3)
    rest = logs - (fit.slope * away + np.median(logs - fit.slope * away))
    assert found.r_squared == pytest.approx(
        1 - (rest**2).sum() / ((logs - logs.mean()) ** 2).sum(), abs=1e-3
    )
    assert found.layers == 8


@pytest.mark.parametrize(
    ("factor", "layers", "systemic"),
    [
        (3.1, 8, "vanishing"),
        (2.9, 12, None),
        (1 / 3.1, 8, "exploding"),
        # Fewer than three decades from end to end.
        (3.1, 7, None),
        (10.1, 4, "vanishing"),
        (9.9, 4, None),
    ],
)
def test_a_stack_is_systemic_by_a_factor_of_three_a_layer_over_three_decades(
    factor: float, layers: int, systemic: str | None
) -> None:
    found = depth(steady(*factor ** -np.arange(float(layers))[::-1]) * (1 + 1e-9))

    assert found.systemic == systemic
    assert found.nats_per_layer == pytest.approx(math.log(factor), rel=1e-5)


def test_a_deep_stack_may_lose_as_much_little_by_little() -> None:
    assert depth(steady(*1.06 ** -np.arange(150.0)[::-1])).gradual  # 3.8 decades
    assert not depth(steady(*1.06 ** -np.arange(90.0)[::-1])).gradual
    assert not depth(steady(*np.r_[np.full(75, 1e-4), np.ones(75)])).gradual  # in one place


def test_a_stack_that_no_line_explains_is_not_systemic() -> None:
    logs = -np.array([12.0, 1, 9, 0, 8, 2, 7, 0])

    found = depth(steady(*np.exp(logs)))

    assert found.r_squared < 0.8
    assert found.systemic is None


def test_depth_takes_four_weights_with_a_gradient() -> None:
    assert depth(steady(1, 2, 3)) is None
    assert depth(steady(1, 2, 3, 4)) is not None
    assert depth(steady(1, 2, 3, 0)) is None
    assert depth(steady(1, 2, 3, 4), kinds=["matrix", "matrix", "matrix", "bias"]) is None
    assert depth(np.empty((5, 0))) is None


def test_layers_side_by_side_have_no_depth() -> None:
    edges = np.array([[-1, i] for i in range(4)] + [[i, 4] for i in range(4)])

    assert depth(steady(1, 2, 3, 4), edges=edges, topology="given") is None


# --- rows of layers -------------------------------------------------------------------------------


def test_a_layer_tells_the_medians_of_the_last_window() -> None:
    norms = np.r_[steady(1, 1), steady(2, 4, records=8)]
    norms[-1] = 0
    updates = np.full((28, 2), 0.5)
    updates[-8:] = [0.01, 0.02]
    zeros = np.full((28, 2), 0.9)
    zeros[-8:] = [0.1, np.nan]
    status = np.full((28, 2), Status.RECORDED, np.uint8)
    status[:3, 1] = Status.NOT_RECORDED
    history = made(
        norms,
        numel=4,
        param_l2=np.ones((28, 2)),
        update_l2=updates,
        zero_fraction=zeros,
        status=status,
    )

    first, second = result(history, window=8).layers

    assert [first.rms, second.rms] == pytest.approx([1, 2])
    assert first.deficit == pytest.approx(math.log10(2))
    assert [first.update_ratio, second.update_ratio] == pytest.approx([0.01, 0.02])
    assert first.zero_fraction == pytest.approx(0.1)
    assert second.zero_fraction is None
    assert (first.records, first.missing) == (28, 0)
    assert (second.records, second.missing) == (25, 3)
    assert (first.basis, first.gradient_directions) == ("norm", None)


def test_by_norms_consistency_and_rate_are_the_spread_and_the_median_of_changes() -> None:
    steps = np.arange(40) * 2
    norms = noise(40, 1)
    norms[30] = 0

    (flow,) = result(made(norms, steps=steps, numel=1)).layers

    known = np.flatnonzero(norms[:, 0] > 0)
    known = known[known >= 8]
    changes = np.diff(np.log(norms[known, 0])) / np.diff(steps[known])
    expected = math.exp(-1.4826 * stats.median_abs_deviation(changes))
    assert flow.flow_consistency == pytest.approx(expected, rel=1e-4)
    assert flow.information_flow_rate == pytest.approx(np.median(np.abs(changes)), rel=1e-4)


@pytest.mark.parametrize(("records", "known"), [(4, False), (5, True)])
def test_five_records_make_a_rate(records: int, known: bool) -> None:
    (flow,) = result(made(noise(records, 1))).layers

    assert (flow.information_flow_rate is not None) is known


def test_the_rate_of_a_signal_is_half_a_logarithm_and_bounded() -> None:
    def rate(cosine: float) -> float:
        values = np.full((40, 1), cosine)
        lags = np.ones((40, 1), np.int64)
        (flow,) = result(made(np.ones((40, 1)), exact=Exact(values, lags))).layers
        assert flow.information_flow_rate is not None
        return flow.information_flow_rate

    assert rate(0.5) == pytest.approx(0.5 * math.log2(2))
    assert rate(0.75) == pytest.approx(1.0)
    assert rate(-0.5) == 0
    assert rate(1.0) == pytest.approx(0.5 * math.log2(1000))


def test_a_noise_scale_takes_a_signal_above_two_errors_and_below_one() -> None:
    rng = np.random.default_rng(0)

    def scale(centre: float, wide: float) -> float | None:
        values = np.clip(centre + wide * rng.normal(size=(40, 1)), -1, 1)
        lags = np.ones((40, 1), np.int64)
        history = made(np.ones((40, 1)), exact=Exact(values, lags), meta={"batch_size": 10})
        return result(history).layers[0].noise_scale

    assert scale(0.5, 0.01) == pytest.approx(10, rel=0.05)
    assert scale(0.05, 0.5) is None
    assert scale(1.0, 0.0) is None
    assert scale(-0.5, 0.01) is None


def test_directions_are_told_for_records_with_a_cosine_or_a_sketch() -> None:
    rng = np.random.default_rng(0)
    vectors = [[rng.normal(size=30), np.zeros(20)] for _ in range(20)]

    first, second = result(of_vectors(vectors, steps=np.arange(20) * 3), window=8).layers

    found = first.gradient_directions
    assert [d.step for d in found] == [3 * t for t in range(20)]
    assert [d.direction_vector is not None for d in found] == [t >= 12 for t in range(20)]
    assert (found[0].consistency_score, found[0].standard_error, found[0].lag) == (None, None, None)
    assert found[1].lag == 3
    assert found[1].standard_error > 0
    assert {d.direction_vector for d in second.gradient_directions} == {None}
    assert {d.consistency_score for d in second.gradient_directions} == {None}
    assert first.basis == "sketch"
    assert second.basis == "norm"


def test_records_without_a_direction_are_left_out() -> None:
    values = np.random.default_rng(0).normal(size=(3, 1, 16))
    history = made(np.ones((9, 1)), sketches=Sketches(values, np.array([2, 4, 8])))

    (flow,) = result(history).layers

    assert [d.step for d in flow.gradient_directions] == [2, 4, 8]
    assert [d.lag for d in flow.gradient_directions] == [None, 2, None]
    assert flow.basis == "norm"


def test_five_sketches_make_a_consistency() -> None:
    def basis(sketches: int) -> str:
        values = np.ones((sketches, 1, 16)) / 4
        history = made(np.ones((9, 1)), sketches=Sketches(values, np.arange(sketches)))
        return result(history).layers[0].basis

    assert basis(4) == "norm"
    assert basis(5) == "sketch"


# --- norms over the history -----------------------------------------------------------------------


def test_norms_are_summed_up_over_finite_records_alone() -> None:
    norms = noise(50, 4)
    norms[7, 2], norms[9, 1] = np.inf, np.nan
    norms[20, 3] = 77
    history = made(norms, steps=np.arange(50) * 2)

    found = result(history).explosion

    finite = history.l2[np.isfinite(history.l2)].astype(float)
    assert found.max_gradient_norm == 77
    assert (found.max_layer, found.max_step) == ("layers.3", 40)
    assert found.mean_gradient_norm == pytest.approx(finite.mean())
    assert found.std_gradient_norm == pytest.approx(finite.std())
    assert found.median_gradient_norm == pytest.approx(np.median(finite))
    assert found.mad_gradient_norm == pytest.approx(stats.median_abs_deviation(finite))
    assert found.explosion_ratio == 0.5
    assert found.parameter_ratio == 0.5
    assert [layer.layer_name for layer in found.exploding_layers] == ["layers.1", "layers.2"]
    first = found.exploding_layers[0]
    assert first.gradient_norm == pytest.approx(np.nanmax(norms[:, 1]))
    assert first.ratio == pytest.approx(np.nanmax(norms[:, 1]) / np.nanmedian(norms[:, 1]))
    assert first.step == 2 * np.nanargmax(norms[:, 1])


def test_a_history_without_a_finite_norm_has_no_statistic_of_norms() -> None:
    found = result(made(np.full((20, 2), np.nan))).explosion

    assert (found.max_gradient_norm, found.max_layer, found.max_step) == (None, None, None)
    assert found.mean_gradient_norm is found.mad_gradient_norm is None
    assert found.overall_severity == "critical"
    assert math.isnan(found.exploding_layers[0].gradient_norm)
    assert found.exploding_layers[0].step is found.exploding_layers[0].ratio is None
    empty = result(made(np.empty((5, 0)))).explosion
    assert empty.explosion_ratio is empty.parameter_ratio is None
    unsized = result(made(noise(20, 2), numel=None)).explosion
    assert (unsized.explosion_ratio, unsized.parameter_ratio) == (0, None)


@pytest.mark.parametrize("recorded", [True, False])
def test_the_norm_to_clip_at_is_the_ninetieth_percentile_of_the_calmer_half(recorded: bool) -> None:
    norms = noise(200, 4, scale=0.05)
    norms[120:] *= 300
    total = np.sqrt((norms**2).sum(axis=1)) * (2 if recorded else 1)
    fields = {"total_l2": np.where(np.arange(200) % 7, total, np.nan)} if recorded else {}

    (region,) = result(made(norms, **fields)).exploding_regions

    known = np.sort(fields["total_l2"][np.isfinite(fields["total_l2"])] if recorded else total)
    expected = np.quantile(known[: len(known) // 2], 0.9)
    assert region.facts[0].usual_norm == pytest.approx(expected, rel=1e-5)
    assert f"{expected:.3g}" in region.mitigation_suggestions[0]
