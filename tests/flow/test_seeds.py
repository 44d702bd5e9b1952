"""Every structure, enumeration and function of the seeds, at work; each test names its item."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import numpy as np
import pytest

from gradscope import analyze_flow
from gradscope.flow.directions import estimate
from gradscope.flow.network import edge_type
from gradscope.flow.records.layers import FlowDirection
from gradscope.flow.records.network import NodeType
from gradscope.flow.result import FlowResult
from gradscope.histories.arrays import measured
from gradscope.histories.history import Status
from gradscope.histories.open import open_history
from gradscope.histories.sketching import sketch

from .made import made, noise, of_vectors, quadratic

FIXTURES = Path(__file__).parents[2] / "fixtures"


@pytest.fixture(scope="module")
def residual() -> FlowResult:
    result = analyze_flow(open_history(str(FIXTURES / "recorded" / "residual"))).result
    assert result is not None
    return result


def correlated(records: int = 96) -> list[list[np.ndarray]]:
    """Gradients with a lasting part: signal and noise of equal power."""
    rng = np.random.default_rng(0)
    signal = rng.normal(size=200)
    return [[signal + rng.normal(size=200), rng.normal(size=200)] for _ in range(records)]


def test_gradient_flow_visualization_holds_all_its_parts_in_order(residual: FlowResult) -> None:
    assert residual.layers
    assert residual.temporal
    assert residual.network.nodes
    assert residual.critical_paths
    assert residual.vanishing_regions == ()
    assert residual.dead_zones
    assert [x.layer_name for x in residual.layers] == [
        "stem",
        *(f"blocks.{i}" for i in range(6)),
        "head",
    ]


def test_gradient_layer_flow_has_magnitudes_of_its_own_steps(residual: FlowResult) -> None:
    flow = residual.layers[0]

    assert len(flow.gradient_magnitudes) == len(flow.steps) == 240
    assert flow.numel == 64 * 32 + 32


def test_gradient_direction_and_compute_gradient_directions_are_cosines_not_norms() -> None:
    vectors = correlated()

    flow = analyze_flow(of_vectors(vectors)).result.layers[0]

    assert flow.gradient_directions is not None
    last = flow.gradient_directions[-1]
    a, b = vectors[-1][0], vectors[-2][0]
    exact = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
    assert last.consistency_score == pytest.approx(exact, abs=4 * last.standard_error)
    assert len(last.direction_vector) == 128
    assert flow.gradient_directions[0].consistency_score is None


@pytest.mark.parametrize("cosine", [-0.95, 0.0, 0.5, 0.95])
def test_estimated_directions_are_within_four_of_their_standard_errors(cosine: float) -> None:
    rng = np.random.default_rng(4)
    errors = []
    for seed in range(60):
        a, b = np.linalg.qr(rng.normal(size=(2000, 2)))[0].T
        b = cosine * a + np.sqrt(1 - cosine**2) * b
        s, t = sketch(a, seed=seed), sketch(b, seed=seed)
        found = estimate(*(np.array([[x]]) for x in (s @ t, s @ s, t @ t)))[0, 0]
        errors.append((found - cosine) / ((1 - cosine**2) / np.sqrt(128 * (1 + cosine**2))))
    assert np.abs(errors).max() < 4.5
    assert 0.7 < np.std(errors) < 1.4


def test_compute_flow_consistency_is_the_mean_pairwise_cosine() -> None:
    vectors = correlated()
    unit = np.array([v[0] / np.linalg.norm(v[0]) for v in vectors[-32:]])
    pairs = (np.square(unit.sum(axis=0)).sum() - 32) / (32 * 31)

    flows = analyze_flow(of_vectors(vectors)).result.layers

    assert flows[0].flow_consistency == pytest.approx(pairs, abs=0.1)
    assert flows[1].flow_consistency == pytest.approx(0, abs=0.1)


def test_compute_bottleneck_score_is_spatial_not_temporal() -> None:
    norms = noise(60, 5, scale=0.01)
    norms[:, 2] /= 100
    norms[30, 0] = 1e-6

    scores = [x.bottleneck_score for x in analyze_flow(made(norms)).result.layers]

    assert scores[2] == pytest.approx(2 / 3, abs=0.02)
    assert scores[1] == scores[3] == 0
    assert scores[0] is None
    assert scores[4] is None


def test_compute_information_flow_rate_is_that_of_the_signal() -> None:
    flows = analyze_flow(of_vectors(correlated(), meta={"batch_size": 64})).result.layers

    # Signal and noise of equal power: rho 1/2, half a bit; the noise scale is the batch itself.
    assert flows[0].information_flow_rate == pytest.approx(0.5, abs=0.15)
    assert flows[0].noise_scale == pytest.approx(64, rel=0.4)
    assert flows[1].information_flow_rate < 0.1
    assert flows[1].noise_scale is None


def test_temporal_gradient_flow_and_generate_temporal_flows_are_rows_of_their_own_step() -> None:
    norms = noise(20, 3)
    status = np.full(norms.shape, Status.RECORDED, np.uint8)
    status[15:, 1], norms[15:, 1] = Status.NOT_RECORDED, np.nan

    rows = analyze_flow(made(norms, status=status, steps=np.arange(20) * 5)).result.temporal

    assert len(rows) == 20 * 3 - 5
    assert max(row.step for row in rows if row.layer_name == "layers.1") == 70
    assert rows[0].gradient_magnitude == pytest.approx(norms[0, 0], rel=1e-6)


@pytest.mark.parametrize("direction", get_args(FlowDirection))
def test_flow_direction_and_get_latest_flow_direction_reach_every_state(direction: str) -> None:
    rng = np.random.default_rng(1)
    fixed = rng.normal(size=50)
    histories = {
        "forward": lambda: quadratic(0.01),
        "oscillating": lambda: quadratic(1.5, records=40),
        "indeterminate": lambda: of_vectors([[rng.normal(size=50)] for _ in range(80)]),
        # Successive gradients are unrelated, yet this window undoes what the one before did.
        "backward": lambda: of_vectors(
            [[rng.normal(size=50) + 0.33 * fixed * (1 if t < 48 else -1)] for t in range(80)]
        ),
        "stagnant": lambda: made(
            noise(40, 1), param_l2=np.ones((40, 1)), update_l2=np.full((40, 1), 1e-8)
        ),
    }

    result = analyze_flow(histories[direction]()).result

    assert direction in {row.flow_direction for row in result.temporal[-20:]}


def test_compute_stability_score_does_not_depend_on_the_loss_scale() -> None:
    steady, erratic = noise(60, 1, scale=0.01), noise(60, 1, scale=1.0)

    scores = [
        analyze_flow(made(norms * scale)).result.layers[0].stability_score
        for norms in (steady, erratic)
        for scale in (1e-6, 1e6)
    ]

    assert scores[0] == pytest.approx(scores[1], rel=1e-3)
    assert scores[0] > 0.95
    assert scores[2] == pytest.approx(scores[3], rel=1e-3)
    assert scores[2] < 0.6


def test_gradient_flow_network_and_build_gradient_flow_network_have_the_real_edges(
    residual: FlowResult,
) -> None:
    edges = {(e.from_layer, e.to_layer) for e in residual.network.edges}

    assert ("stem", "head") in edges
    assert ("blocks.0", "blocks.5") in edges
    assert ("blocks.5", "blocks.0") not in edges
    assert residual.topology == "recorded"


def test_flow_node_connectivity_counts_its_edges_and_influence_what_must_pass_it() -> None:
    diamond = made(
        noise(30, 4), edges=np.array([[0, 1], [0, 2], [1, 3], [2, 3], [3, 4]]), topology="given"
    )

    nodes = {n.layer_name: n for n in analyze_flow(diamond).result.network.nodes}

    assert [nodes[f"layers.{i}"].connectivity for i in range(4)] == [2, 2, 2, 2]
    assert nodes["layers.3"].influence_score == 1.0
    assert nodes["layers.1"].influence_score == 0.25
    assert nodes["layers.0"].influence_score == 0.25


@pytest.mark.parametrize("kind", get_args(NodeType))
def test_node_type_and_classify_node_type_reach_every_type(kind: str) -> None:
    norms = noise(40, 15, scale=0.01)
    norms[:, 3] /= 300
    norms[:, 10] *= 30

    nodes = analyze_flow(made(norms)).result.network.nodes

    wanted = {"sink": 0, "bottleneck": 3, "amplifier": 10, "source": 14, "normal": 1}
    assert nodes[wanted[kind]].node_type == kind


def test_flow_edge_strength_is_relative_to_the_median_edge() -> None:
    norms = np.tile([1.0, 1.0, 1.0, 1e-2, 1.0, 1.0, 1.0], (20, 1))

    edges = analyze_flow(made(norms)).result.network.edges

    assert edges[0].flow_strength == pytest.approx(1)
    assert edges[2].flow_strength == pytest.approx(1e-2)
    assert (edges[0].edge_type, edges[2].edge_type) == ("strong", "weak")
    assert edges[0].flow_consistency == 1.0


@pytest.mark.parametrize(
    ("flow", "kind"),
    [
        (np.ones(20), "strong"),
        (np.full(20, 0.05), "weak"),
        (np.array([1.0, 0.0] * 10), "intermittent"),
        (np.zeros(20), "blocked"),
        (np.ones(3), "unknown"),
    ],
)
def test_edge_type_and_classify_edge_type_are_a_partition(flow: np.ndarray, kind: str) -> None:
    assert edge_type(flow) == kind


def test_network_metrics_and_compute_network_metrics_have_their_closed_forms() -> None:
    norms = np.tile(np.exp(-0.5 * np.arange(5)[::-1]), (20, 1))
    chain = np.array([[i, i + 1] for i in range(5)])

    metrics = analyze_flow(made(norms, edges=chain, topology="given")).result.network.metrics

    assert metrics.information_propagation_speed == pytest.approx(np.exp(-0.5), rel=1e-6)
    assert metrics.overall_flow_efficiency == pytest.approx(np.exp(-0.5 * 4), rel=1e-6)
    assert metrics.network_connectivity == 1.0
    assert metrics.bottleneck_density == 0.0
    assert metrics.flow_stability == 1.0


def test_critical_gradient_path_and_identify_critical_gradient_paths_find_the_widest() -> None:
    # Two ways from 0 to 3: over 1 (narrow) and over 2 (wide).
    norms = np.tile([4.0, 1.0, 2.0, 4.0], (20, 1))
    edges = np.array([[0, 1], [0, 2], [1, 3], [2, 3], [3, 4]])

    (path,) = analyze_flow(made(norms, edges=edges, topology="given")).result.critical_paths

    assert path.layers == ("layers.3", "layers.2", "layers.0")
    assert path.path_length == 3
    assert path.criticality_score == pytest.approx(1 - 1 / 2)
    assert path.total_flow_strength == pytest.approx(0)
    assert path.optimization_potential == pytest.approx(0)
    assert path.alternatives[0] == (("layers.3", "layers.1", "layers.0"), 0.5)


def test_an_assumed_chain_claims_no_criticality() -> None:
    (path,) = analyze_flow(made(noise(20, 4))).result.critical_paths

    assert path.criticality_score is None


@pytest.mark.parametrize(
    ("decades", "level"), [(3.5, "mild"), (4.5, "moderate"), (5.5, "severe"), (6.5, "critical")]
)
def test_vanishing_region_severity_and_identify_vanishing_regions(
    decades: float, level: str
) -> None:
    norms = noise(60, 8, scale=0.05)
    norms[:, 2] *= 10**-decades

    (region,) = analyze_flow(
        made(norms, numel=[100, 100, 250, *[100] * 5])
    ).result.vanishing_regions

    assert region.severity_level == level
    assert region.affected_layers == ("layers.2",)
    assert region.extent.affected_parameters == 250
    assert region.peak.value == pytest.approx(decades, abs=0.4)


@pytest.mark.parametrize(("factor", "level"), [(20, "moderate"), (70, "severe"), (200, "critical")])
def test_exploding_region_severity_and_identify_exploding_regions(
    factor: float, level: str
) -> None:
    norms = noise(200, 5, scale=0.05)
    norms[120:, :] *= factor

    (region,) = analyze_flow(made(norms)).result.exploding_regions

    assert region.severity_level == level
    assert region.extent.onset == (119, 120)


def test_exploding_severity_mild_is_large_steps() -> None:
    ratio = np.full((60, 3), 0.3)

    (region,) = analyze_flow(
        made(noise(60, 3), param_l2=np.ones((60, 3)), update_l2=ratio)
    ).result.exploding_regions

    assert region.severity_level == "mild"
    assert region.tests == ("update",)


def test_region_extent_counts_steps_parameters_and_layers() -> None:
    norms = noise(100, 6, scale=0.05)
    norms[50:80, 1:3] *= 1e-6

    (region,) = analyze_flow(made(norms, steps=np.arange(100) * 10)).result.vanishing_regions

    assert (region.extent.start_layer, region.extent.end_layer) == ("layers.1", "layers.2")
    assert region.extent.affected_parameters == 200
    assert region.extent.duration_steps == 290
    assert region.extent.onset == (490, 500)
    assert not region.extent.ongoing


def with_zeros(*spans: tuple[int, int]) -> np.ndarray:
    norms = noise(120, 5)
    for first, end in spans:
        norms[first:end, 2] = 0
    return norms


@pytest.mark.parametrize(
    ("norms", "potential", "intervention"),
    [
        (with_zeros((10, 20), (40, 55), (112, 120)), "high", False),
        (with_zeros((10, 20), (100, 120)), "medium", False),
        (with_zeros((60, 120)), "low", True),
        (np.where(np.arange(120)[:, None] < 60, noise(120, 5), 0.0), "none", True),
    ],
)
def test_recovery_potential_and_identify_gradient_dead_zones(
    norms: np.ndarray, potential: str, intervention: bool
) -> None:
    zone = analyze_flow(made(norms)).result.dead_zones[-1]

    assert zone.recovery_potential == potential
    assert zone.intervention_required is intervention


def test_gradient_dead_zone_lasts_as_long_as_its_longest_run() -> None:
    zone = analyze_flow(made(with_zeros((60, 90)), steps=np.arange(120) * 2)).result.dead_zones[0]

    assert zone.dead_duration == 58
    assert zone.affected_layers == ("layers.2",)


def test_gradient_visualization_config_and_its_window_are_honoured() -> None:
    norms = noise(100, 3, scale=0.01)
    norms[:60] *= 100

    short, long = (analyze_flow(made(norms), window=w).result.layers[0].rms for w in (8, 100))

    assert long == pytest.approx(100 * short, rel=0.1)


def test_color_scheme_glyphs_say_what_colours_say() -> None:
    from gradscope.flow.table import trace

    assert trace([1.0, 10.0, 100.0, 0.0, float("nan"), None], 6) == "▁▄█_! "
    assert trace([1.0, 10.0, 100.0], 3, unicode=False) == ".-#"


def test_gradient_flow_visualizer_new_generate_and_create_visualization_are_one_call() -> None:
    a, b = (analyze_flow(made(noise(40, 3))).model_dump_json() for _ in range(2))

    assert a == b


def test_gradient_history_keeps_every_record(residual: FlowResult) -> None:
    assert residual.steps == 240
    assert residual.rows_omitted == 0


# --- the second seed ------------------------------------------------------------------------------


def test_compute_l2_norm_neither_overflows_nor_vanishes() -> None:
    assert measured(np.array([3e200, 4e200]))["l2"] == pytest.approx(5e200)
    assert measured(np.array([3e-200, 4e-200]))["l2"] == pytest.approx(5e-200)


def test_detect_gradient_explosion_and_gradient_explosion_analysis_over_the_whole_history() -> None:
    norms = noise(200, 4, scale=0.05)
    norms[150:, 1] *= 500

    found = analyze_flow(made(norms, numel=[100, 300, 100, 100])).result.explosion

    assert found.max_gradient_norm == pytest.approx(norms.max(), rel=1e-6)
    assert (found.max_layer, found.max_step) == ("layers.1", int(norms[:, 1].argmax()))
    assert found.mean_gradient_norm == pytest.approx(norms.mean(), rel=1e-6)
    assert found.std_gradient_norm == pytest.approx(norms.std(), rel=1e-6)
    assert found.median_gradient_norm == pytest.approx(np.median(norms), rel=1e-6)
    assert found.explosion_ratio == 0.25
    assert found.parameter_ratio == 0.5


def test_exploding_layer_is_named_with_its_step_and_its_tests() -> None:
    norms = noise(200, 4, scale=0.05)
    norms[150:, 1] *= 500

    (layer,) = analyze_flow(made(norms)).result.explosion.exploding_layers

    assert layer.layer_name == "layers.1"
    assert layer.gradient_norm == pytest.approx(norms[:, 1].max(), rel=1e-6)
    assert layer.step == int(norms[:, 1].argmax())
    assert "level" in layer.tests


def test_explosion_severity_and_classify_explosion_severity_do_not_call_none_low() -> None:
    assert analyze_flow(made(noise(60, 4))).result.explosion.overall_severity == "none"
    lost = noise(60, 4)
    lost[30:] = np.nan
    assert analyze_flow(made(lost)).result.explosion.overall_severity == "critical"


def test_recommend_explosion_mitigation_and_generate_explosion_recommendations_when_clean() -> None:
    assert analyze_flow(made(noise(60, 4))).result.explosion.mitigation_recommendations == ()
    norms = noise(200, 4, scale=0.05)
    norms[150:] *= 500
    advice = analyze_flow(made(norms)).result.explosion.mitigation_recommendations
    assert any("learning rate" in line and "clip" in line for line in advice)


def test_the_seeds_absolute_threshold_is_there_for_those_who_want_one() -> None:
    norms = noise(60, 4, level=50.0)
    norms[:, 2] = 10.0

    found = analyze_flow(made(norms), threshold=60.0).result.explosion

    assert [layer.layer_name for layer in found.exploding_layers] == [
        "layers.0",
        "layers.1",
        "layers.3",
    ]
    assert {layer.severity for layer in found.exploding_layers} == {"mild"}
    assert "60" in found.exploding_layers[0].recommended_action
    assert found.overall_severity == "mild"


@pytest.mark.parametrize("size", [5, 40, 3000])
def test_raw_gradients_come_with_their_directions(size: int, tmp_path: Path) -> None:
    """A count-sketch: products of direction vectors are cosines, within their standard errors."""
    rng = np.random.default_rng(size)
    signal = rng.normal(size=size)
    gradients = np.array([(signal + rng.normal(size=size)) * 10.0**t for t in range(-6, 6)])
    np.savez(tmp_path / "grads.npz", w=gradients.astype(np.float64), steps=np.arange(12) * 5)

    flow = analyze_flow(tmp_path / "grads.npz", as_="vectors").result.layers[0]

    assert flow.gradient_directions is not None
    assert [d.step for d in flow.gradient_directions] == list(range(0, 60, 5))
    unit = gradients / np.linalg.norm(gradients, axis=1, keepdims=True)
    exact = unit @ unit.T
    assert [d.consistency_score for d in flow.gradient_directions[1:]] == pytest.approx(
        np.diagonal(exact, 1), abs=1e-6
    )
    vectors = np.array([d.direction_vector for d in flow.gradient_directions])
    assert vectors.shape == (12, 128)
    np.testing.assert_allclose(vectors @ vectors.T, exact, atol=4.5 * np.sqrt(2 / 128))
