"""What findings say: where, since when, how much, and what to do."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from gradscope import analyze_flow
from gradscope.flow.records.regions import Extent
from gradscope.flow.result import FlowResult
from gradscope.flow.rules import exploding, motion, nonfinite, paths
from gradscope.flow.rules.say import place, several, since, span
from gradscope.histories.history import Exact, History, Sketches, Status
from gradscope.report.model import Finding
from gradscope.report.rules import Observation

from .made import made, noise, quadratic


def finding(history: History, name: str) -> Finding:
    (found,) = [f for f in analyze_flow(history, select=[name]).findings if f.name == name]
    return found


def seen(rule: Any, result: FlowResult) -> list[Observation]:
    return [o for o in rule(result) if isinstance(o, Observation)]


def moved(updates: np.ndarray, **fields: Any) -> History:
    norms = fields.pop("l2", noise(*updates.shape))
    return made(norms, numel=1, param_l2=np.ones(updates.shape), update_l2=updates, **fields)


# --- places and times -----------------------------------------------------------------------------


def test_places_and_times_in_words() -> None:
    assert place(["a"]) == "a"
    assert place(["a", "b", "c"]) == "a … c"
    assert several(["a", "b", "c", "d"]) == "a, b, c, d"
    assert several(list("abcdef")) == "a, b, c, d and 2 more"
    assert since((None, 4)) == "from the first record on (step 4)"
    assert since((3, 4)) == "since step 4"
    assert since((3, 8)) == "since step 4–8"


@pytest.mark.parametrize(("ongoing", "end"), [(True, "to the end"), (False, "until step 9")])
def test_a_span_tells_whether_it_lasts(ongoing: bool, end: str) -> None:
    where = Extent(
        start_layer="a", end_layer="a", layer_count=1, affected_parameters=None, duration_steps=5,
        records=5, onset=(3, 4), end=9, ongoing=ongoing,
    )  # fmt: skip

    assert span(where) == f"since step 4, {end}"


# --- non-finite gradients -------------------------------------------------------------------------


def test_gradients_that_are_not_finite_are_told_by_origin_heirs_and_how_often() -> None:
    norms = noise(80, 4)
    norms[40:43, :2] = np.nan
    norms[60, 3] = np.nan

    found = finding(made(norms), "non-finite-gradient")

    assert found.message == (
        "gradients are not finite from step 40 on, for 3 records, beginning at layers.1; "
        "inherited by 1 layer; and again 1 time"
    )
    assert found.subject == "layers.1"
    assert found.recommendation.startswith("go back to a checkpoint of step 39 or before; the loss")
    assert found.evidence["stretches"] == 2
    assert found.evidence["inherited_by"] == 1
    assert found.evidence["loss_nonfinite"] == "false"
    assert found.evidence["last_finite_step"] == 39


def test_one_burst_is_not_told_as_several_and_without_a_record_before_there_is_no_way_back() -> (
    None
):
    norms = noise(40, 3)
    norms[0, 1] = np.nan

    found = finding(made(norms), "non-finite-gradient")

    assert "again" not in found.message
    assert "inherited" not in found.message
    assert found.recommendation.startswith("the loss was finite")
    assert "last_finite_step" not in found.evidence
    assert "growth_before" not in found.evidence


@pytest.mark.parametrize(("height", "diverged"), [(19.0, False), (21.0, True)])
def test_growth_twentyfold_just_before_is_a_run_that_diverged(
    height: float, diverged: bool
) -> None:
    norms = np.ones((60, 3))
    norms[29] = height
    norms[30:] = np.nan
    loss = np.where(np.arange(60) >= 30, np.nan, 1.0)

    found = finding(made(norms, loss=loss), "non-finite-gradient")

    assert ("diverging since step 29" in found.message) is diverged
    assert ("the loss itself was not finite" in found.recommendation) is not diverged
    assert found.recommendation.startswith("go back to a checkpoint of step 28 or") is diverged


def test_skipped_steps_are_counted() -> None:
    skipped = np.zeros(40, np.uint8)
    skipped[[3, 7]] = 1

    found = finding(made(noise(40, 2), skipped=skipped), "non-finite-gradient")

    assert found.message == "mixed precision skipped 2 steps of 40"
    assert found.severity == "info"
    assert found.evidence == {"skipped_steps": 2, "records": 40}


# --- vanishing and exploding ----------------------------------------------------------------------


def test_a_stack_is_told_by_its_factor_and_the_most_that_is_lost() -> None:
    norms = np.tile(10.0 ** (-0.8 * np.arange(8.0)[::-1]), (60, 1))

    found = finding(made(norms, numel=1), "vanishing-gradient")

    assert found.message == (
        "the whole stack vanishes: each layer divides the gradient by 6.3, and 3 layers lie up to "
        "5.2 decades below the loss side, from the first record on (step 0), to the end"
    )
    assert found.subject == "layers.0 … layers.2"
    assert found.threshold == 3.0
    assert found.evidence["parameters"] == 3


def test_layers_that_vanish_again_and_again_are_one_finding() -> None:
    norms = np.ones((400, 8))
    norms[120:140, 2:4] = 1e-5
    norms[200:230, 2:4] = 1e-4
    norms[210:220, 6] = 1e-5

    first, second = analyze_flow(made(norms), select=["vanishing-gradient"]).findings

    assert "in layers.2, layers.3, since step 120, until step 139" in first.message
    assert "by 5.0 decades" in first.message
    assert first.message.endswith("; 2 times in all")
    assert (first.evidence["times"], first.evidence["records"]) == (2, 20)
    assert first.evidence["peak"] == pytest.approx(5)
    assert first.evidence["peak_layer"] == "layers.2"
    assert second.subject == "layers.6"
    assert "times in all" not in second.message


def test_single_layers_that_vanish_alike_at_once_are_one_finding() -> None:
    norms = np.ones((60, 12))
    norms[20:40, [1, 5, 9]] = 1e-5
    edges = np.array([[0, 12], [1, 12], [5, 12], [9, 12], [11, 12]])

    found = finding(made(norms, edges=edges, topology="given"), "vanishing-gradient")

    assert "in layers.1, layers.5, layers.9" in found.message
    assert found.evidence["times"] == 3
    assert "times in all" not in found.message


@pytest.mark.parametrize(("ratio", "learns"), [(1e-3, True), (1e-6, False)])
def test_layers_that_still_learn_are_said_to(ratio: float, learns: bool) -> None:
    norms = np.ones((60, 8))
    norms[:, 2] = 1e-4

    found = finding(
        made(norms, param_l2=norms * 0 + 1, update_l2=norms * 0 + ratio), "vanishing-gradient"
    )

    assert ("they still learn" in found.message) is learns
    assert found.evidence["update_ratio"] == pytest.approx(ratio)


def test_an_explosion_is_told_by_its_peak_and_onset() -> None:
    norms = np.ones((200, 6))
    norms[100:, 2] = 20
    norms[150, 2] = 25

    found = finding(made(norms, steps=np.arange(200) * 2), "exploding-gradient")

    assert found.subject == "layers.2"
    assert (
        "in layers.2, up to 25 in layers.2 at step 300, since step 199–200, to the end"
        in found.message
    )
    assert found.recommendation.startswith("lower the learning rate; clip the total norm at ")
    assert found.evidence["onset"] == "since step 199–200"
    assert found.threshold is None


def test_the_tallest_spikes_are_listed_first() -> None:
    norms = np.ones((400, 3))
    heights = {50: 12.0, 100: 30.0, 150: 9.0, 200: 20.0, 250: 8.0, 300: 7.0}
    for record, height in heights.items():
        norms[record, 1:] = height
        norms[record, 2] += 1

    found = finding(made(norms), "gradient-spike")

    assert found.subject == "network"
    assert found.message.startswith("6 spikes, the tallest 31 times the records before (z ")
    assert "in 2 layers, most in layers.2, at step 100" in found.message
    assert found.message.endswith("(tallest first: 100, 200, 50, 150, 250 and 1 more)")
    alone = np.ones((100, 3))
    alone[50, 1] = 12
    found = finding(made(alone), "gradient-spike")
    assert found.subject == "layers.1"
    assert found.message.startswith("a spike 12 times")
    assert "tallest first" not in found.message


@pytest.mark.parametrize(
    ("height", "severity"), [(9, "info"), (11, "low"), (49, "low"), (51, "medium")]
)
def test_a_spike_is_as_severe_as_it_is_tall(height: float, severity: str) -> None:
    norms = np.ones((100, 3))
    norms[50] = height

    assert finding(made(norms), "gradient-spike").severity == severity


# --- dead zones and bottlenecks -------------------------------------------------------------------


def test_a_zone_that_lasts_points_at_its_origin_and_one_that_is_over_at_nothing() -> None:
    norms = noise(60, 5)
    norms[30:, 1:3] = 0
    found = finding(made(norms), "dead-zone")
    assert found.message == (
        "no gradient in layers.1, layers.2 for 30 records, since step 30, to the end; recovery "
        "potential low"
    )
    assert found.recommendation.startswith("look at layers.2 first")
    assert found.threshold == 5
    norms[50:, 1:3] = 1
    found = finding(made(norms), "dead-zone")
    assert (found.severity, found.recommendation[:11]) == ("low", "nothing now")


@pytest.mark.parametrize(
    ("spans", "severity"),
    [
        ([(30, 60)], "high"),
        ([(10, 15), (30, 60)], "medium"),
        ([(5, 15), (20, 26), (54, 60)], "low"),
        ([(30, 50)], "low"),
    ],
)
def test_a_zone_is_as_severe_as_its_end_is_unlikely(
    spans: list[tuple[int, int]], severity: str
) -> None:
    norms = noise(60, 5)
    for first, end in spans:
        norms[first:end, 2] = 0

    found = [f for f in analyze_flow(made(norms)).findings if f.name == "dead-zone"]

    assert found[0].severity == severity


def chain(layers: int) -> np.ndarray:
    return np.array([[i, i + 1] for i in range(layers)])


def test_a_link_that_a_path_hangs_on_is_told_once() -> None:
    edges = np.array([[0, 2], [1, 2], [2, 3], [3, 4], [4, 5], [5, 6], [6, 7], [7, 8]])
    flow = np.tile([1.0, 1, 1, 1, 1e-2, 1, 1, 1], (40, 1))

    result = analyze_flow(
        made(np.ones((40, 8)), edges=edges, topology="given", edge_flow=flow)
    ).result

    (found,) = seen(paths.bottleneck, result)
    assert found.subject == "layers.4 → layers.5"
    assert "path of the gradient to layers.0 leads over this link" in found.message
    assert "2.0 decades" in found.message
    assert found.evidence["criticality_score"] == 1.0


def test_a_link_with_a_way_around_or_one_that_carries_enough_is_not_told() -> None:
    edges = np.array([*chain(6).tolist(), [2, 4]])
    around = np.tile([1.0, 1, 1e-2, 1, 1, 1, 1], (40, 1))
    wide = np.tile([1.0, 1, 1, 1, 2e-2, 1, 1], (40, 1))

    for flow in (around, wide):
        history = made(np.ones((40, 6)), edges=edges, topology="given", edge_flow=flow)
        assert seen(paths.bottleneck, analyze_flow(history).result) == []


def test_layers_that_are_dead_or_vanish_are_not_bottlenecks_too() -> None:
    norms = np.ones((60, 9))
    norms[:, 2] = 1e-4
    norms[30:, 6] = 0

    names = {f.name for f in analyze_flow(made(norms, edges=chain(9), topology="given")).findings}

    assert names == {"vanishing-gradient", "dead-zone"}


def test_a_bottleneck_beyond_the_scale_is_at_least_that() -> None:
    norms = np.ones((40, 9))
    norms[:, 3] = 10**-2.9
    found = finding(made(norms), "bottleneck")
    assert "lies 2.9 decades below both" in found.message
    assert (found.threshold, found.evidence["connectivity"]) == (2.0, 2)
    norms[:, 3] = 10**-1.5
    assert finding(made(norms), "bottleneck").severity == "low"


# --- missing gradients ----------------------------------------------------------------------------


def test_unused_layers_are_one_finding_and_gaps_another() -> None:
    status = np.full((20, 5), Status.RECORDED, np.uint8)
    status[:, 1:3] = Status.NONE
    status[5:7, 3], status[5:10, 4] = Status.NOT_RECORDED, Status.FROZEN

    unused, gaps = analyze_flow(
        made(noise(20, 5), status=status, numel=[1, 20, 300, 1, 1]), select=["missing-gradient"]
    ).findings

    assert unused.subject == "layers.1 … layers.2"
    assert unused.message == (
        "no gradient at any of 20 records though one is required: layers.1, layers.2"
    )
    assert unused.evidence == {"layers": 2, "records": 20, "parameters": 320}
    assert (gaps.severity, gaps.subject) == ("info", "layers.3 … layers.4")
    assert gaps.message == ("2 layers without a gradient at some records, most layers.4 (5 of 20)")


# --- how the network moves ------------------------------------------------------------------------


def test_an_oscillation_tells_its_growth_and_what_to_divide_by() -> None:
    found = finding(quadratic(2.2), "oscillation")
    assert "mean cosine -1.00, growing +0.182 nats a step" in found.message
    assert found.message.endswith(", to the end")
    assert found.recommendation.startswith("divide the learning rate by 2.2 (to 0.5): plain")
    assert found.evidence["divide_learning_rate_by"] == pytest.approx(2.2, rel=1e-3)
    assert found.threshold == -0.5
    falling = finding(quadratic(1.5), "oscillation")
    assert "growing" not in falling.message
    assert falling.evidence["growth_per_step"] < 0


def test_without_a_factor_the_advice_is_to_lower_the_rate() -> None:
    history = quadratic(1.5, steps=np.arange(80) * 2)
    assert finding(history, "oscillation").recommendation.startswith("lower the learning rate; ")
    weak = made(np.ones((64, 3)), exact=Exact(np.full((64, 3), -0.3), np.ones((64, 3), np.int64)))
    found = finding(weak, "oscillation")
    assert found.severity == "low"
    assert found.recommendation.startswith("lower the learning rate if the loss does not fall")
    assert "divide_learning_rate_by" not in found.evidence


def test_an_oscillation_of_a_few_parameters_is_low_and_named_by_layer() -> None:
    cosine = np.tile([0.9, -0.9, 0.9], (64, 1))
    history = made(np.ones((64, 3)), exact=Exact(cosine, np.ones((64, 3), np.int64)))

    found = finding(history, "oscillation")

    assert (found.severity, found.subject) == ("low", "layers.1")
    assert found.evidence["share"] == pytest.approx(1 / 3)


def test_the_worst_oscillation_is_told() -> None:
    at = np.arange(160)
    cosine = np.where(at < 64, -0.9, np.where(at < 96, 0.9, -0.3))[:, None] * np.ones((1, 2))

    found = finding(
        made(np.ones((160, 2)), exact=Exact(cosine, np.ones((160, 2), np.int64))), "oscillation"
    )

    assert found.severity == "medium"
    assert "mean cosine -0.90" in found.message
    assert not found.message.endswith("to the end")


def test_norms_that_swing_oscillate_without_a_cosine() -> None:
    norms = np.where(np.arange(64) % 2, 3.0, 1.0)[:, None] * noise(64, 2, 0.01)

    found = finding(made(norms), "oscillation")

    assert "alternating norms" in found.message
    assert "cosine" not in found.evidence
    assert (found.severity, found.evidence["basis"]) == ("low", "norm")


@pytest.mark.parametrize(
    ("history", "said", "advice"),
    [
        (lambda: moved(np.full((60, 3), 1e-8)), "less than 1e-06 of their norm", "raise"),
        (
            lambda: moved(np.full((60, 3), 1e-8), lr=np.geomspace(1e-3, 1e-12, 60)[:, None]),
            "the learning rate fell",
            "schedule",
        ),
        (
            lambda: moved(
                np.full((60, 3), 1e-8),
                l2=np.geomspace(1, 1e-9, 60)[:, None] * [1, 1, 1],
                loss=np.full(60, 0.7),
            ),
            "gradients fell by three decades",
            "saturates",
        ),
        (
            lambda: moved(np.zeros((60, 3)), meta={"precision": {"param": "torch.bfloat16"}}),
            "rounded away",
            "master weights",
        ),
        (lambda: made(np.ones((60, 3))), "repeats to the bit", "optimizer.step()"),
    ],
)
def test_a_standstill_tells_its_reason_and_remedy(history: Any, said: str, advice: str) -> None:
    found = finding(history(), "stagnation")

    assert found.message.startswith("the network stands still ")
    assert said in found.message
    assert advice in found.recommendation
    assert "converged" not in found.message
    assert found.threshold == 1e-6


def test_a_network_that_converged_may_stop() -> None:
    norms = noise(200, 3, 0.01)
    norms[150:] *= 1e-3
    updates = np.where(np.arange(200)[:, None] < 150, 1e-3, 1e-8) * np.ones((1, 3))

    found = finding(moved(updates, l2=norms), "stagnation")

    assert (found.severity, found.recommendation) == ("info", "stop here")
    assert found.message.endswith("; it has converged")
    assert found.evidence["converged"] == "true"
    assert found.evidence["update_ratio"] == pytest.approx(1e-8)


def test_a_dead_zone_or_a_vanished_stack_explains_a_standstill() -> None:
    dead = noise(60, 4)
    dead[20:] = 0
    dead[20:, 3] = 1.0
    explained = analyze_flow(moved(np.full((60, 4), 1e-8), l2=dead))
    assert [f.name for f in explained.findings] == ["dead-zone"]
    stack = np.tile(10.0 ** (-0.7 * np.arange(8.0)[::-1]), (60, 1)) * noise(60, 8, 0.01)
    explained = analyze_flow(moved(np.full((60, 8), 1e-8), l2=stack))
    assert [f.name for f in explained.findings] == ["vanishing-gradient"]
    over = stack.copy()
    over[40:] = 1.0 * noise(20, 8, 0.01)
    assert "stagnation" in {
        f.name for f in analyze_flow(moved(np.full((60, 8), 1e-8), l2=over)).findings
    }


def test_large_steps_are_told_by_layer_and_share() -> None:
    updates = np.tile([0.2, 0.07, 1e-3], (40, 1))
    updates[20, 0] = 0.9

    found = finding(moved(updates), "update-ratio")

    assert found.message == (
        "the median step changes 2 layers by more than 5% of the weights: layers.0, layers.1 "
        "(most 0.2, peak 0.9 at step 20)"
    )
    assert (found.subject, found.severity) == ("network", "medium")
    assert found.evidence["share_of_parameters"] == pytest.approx(1 / 3)
    few = finding(
        made(
            noise(40, 40),
            param_l2=np.ones((40, 40)),
            update_l2=np.tile(np.where(np.arange(40) == 7, 0.9, 1e-3), (40, 1)),
        ),
        "update-ratio",
    )
    assert (few.subject, few.severity) == ("layers.7", "low")


def test_without_sizes_every_layer_counts_as_all_of_the_parameters() -> None:
    updates = {"param_l2": np.ones((40, 3)), "update_l2": np.tile([0.2, 1e-3, 1e-3], (40, 1))}

    found = finding(made(noise(40, 3), numel=None, **updates), "update-ratio")

    assert found.evidence["share_of_parameters"] == 1.0
    assert found.severity == "medium"


# --- what is not known ----------------------------------------------------------------------------


def reasons(history: History) -> dict[str, str]:
    return {n.rule: n.reason for n in analyze_flow(history).coverage.not_evaluated}


def test_what_was_not_measured_is_not_evaluated_and_says_why() -> None:
    bare = reasons(made(noise(60, 3)))
    assert set(bare) == {
        *("oscillation", "stagnation", "bottleneck", "update-ratio"),
        *("diverged", "not-in-optimizer", "carried-over", "epsilon-damped", "overwritten-weights"),
    }
    assert "losses" in bare["diverged"]
    assert "groups" in bare["not-in-optimizer"]
    assert "epsilon" in bare["epsilon-damped"]
    assert "directions" in bare["oscillation"]
    assert "update norms" in bare["stagnation"]
    assert "topology" in bare["bottleneck"]
    alone = reasons(made(noise(60, 2), kinds=["matrix", "bias"]))
    assert "two layers of one kind" in alone["vanishing-gradient"]
    short = reasons(made(noise(7, 3)))
    assert "8 records" in short["gradient-spike"]
    assert "gradient-spike" not in reasons(made(noise(8, 3)))


def test_what_was_measured_is_listed() -> None:
    rng = np.random.default_rng(0)
    history = made(
        noise(60, 3),
        edges=chain(3),
        topology="given",
        param_l2=np.ones((60, 3)),
        update_l2=np.full((60, 3), 1e-3),
        zero_fraction=np.zeros((60, 3)),
        sketches=Sketches(rng.normal(size=(60, 3, 8)) / np.sqrt(8), np.arange(60)),
        loss=np.ones(60),
        meta={"optimizer": {"class": "Adam", "eps": 1e-8}},
    )
    history = replace(history, layers=tuple(replace(row, group=0) for row in history.layers))

    result = analyze_flow(history).result

    assert set(result.measured) == {
        "norms",
        "8 records of gradients",
        "comparable layers",
        "directions",
        "update norms",
        "a recorded topology",
        "zero fractions",
        "8 losses",
        "parameter groups",
    }
    assert reasons(history) == {}


def test_a_burst_of_nan_is_left_to_the_rule_for_it() -> None:
    norms = noise(200, 4, 0.05)
    norms[100, 1] = np.nan
    result = analyze_flow(made(norms)).result

    assert [r.tests for r in result.exploding_regions] == [("non-finite",)]
    assert seen(exploding.exploding_gradient, result) == []
    assert len(seen(nonfinite.non_finite_gradient, result)) == 1
    assert seen(motion.stagnation, result) == []
