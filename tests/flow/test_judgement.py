"""What facts mean: every limit, from both sides, and what a rule makes of other limits."""

from __future__ import annotations

import math
from dataclasses import replace
from inspect import signature
from typing import Any

import numpy as np
import pytest

from gradscope import analyze_flow
from gradscope.flow import judgement
from gradscope.flow.facts import DeadFacts, ExplodingFacts, VanishingFacts
from gradscope.flow.records.regions import Extent, Region
from gradscope.flow.records.steps import Oscillation
from gradscope.flow.result import FlowResult
from gradscope.flow.rules import dead, motion, paths
from gradscope.flow.rules.exploding import exploding_gradient, gradient_spike
from gradscope.flow.rules.vanishing import vanishing_gradient

from .made import made, noise, quadratic

LOST = VanishingFacts(
    tests=("depth",),
    held_tests=("depth",),
    systemic=False,
    nats_per_layer=0.1,
    gradual=False,
    decades=3.5,
    attenuation_held=math.inf,
    attenuation=None,
    update_ratio=None,
    epsilon=None,
    only_biases=False,
)
BLOWN = ExplodingFacts(
    tests=("level",),
    held_tests=("level",),
    systemic=False,
    nats_per_layer=0.1,
    own_ratio=20.0,
    depth_nats=-math.inf,
    update_ratio=-math.inf,
    growth=None,
    loss_rises=None,
    usual_norm=1.5,
)
DEAD = DeadFacts(
    duration=20,
    age=10,
    ended=(),
    partly_alive=False,
    was_nonfinite=False,
    everything=False,
    underflowed=False,
    only_biases=False,
)


def vanishing(**changed: Any) -> str:
    limits = judgement.limits(vanishing_gradient)
    return judgement.vanishing_level(replace(LOST, **changed), **limits)


def exploding(**changed: Any) -> str:
    limits = judgement.limits(exploding_gradient)
    return judgement.exploding_level(replace(BLOWN, **changed), **limits)


def recovery(**changed: Any) -> str:
    limits = judgement.limits(dead.dead_zone)
    del limits["records"]
    return judgement.recovery(replace(DEAD, **changed), **limits)


@pytest.mark.parametrize(
    ("judge", "rule"),
    [
        (judgement.vanishing_level, vanishing_gradient),
        (judgement.exploding_level, exploding_gradient),
    ],
)
def test_the_limits_of_a_judgement_are_the_parameters_of_its_rule(judge: Any, rule: Any) -> None:
    needed = {p.name for p in signature(judge).parameters.values() if p.kind is p.KEYWORD_ONLY}

    assert set(judgement.limits(rule)) == needed
    assert all(p.default is p.empty for p in signature(judge).parameters.values())


# --- vanishing ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("decades", "level"),
    [
        (2.49, "none"),
        (2.5, "mild"),
        (3.99, "mild"),
        (4.0, "moderate"),
        (5.0, "severe"),
        (6.0, "critical"),
        (math.inf, "critical"),
        (-math.inf, "none"),
    ],
)
def test_vanishing_is_as_bad_as_the_decades_lost(decades: float, level: str) -> None:
    assert vanishing(decades=decades) == level


@pytest.mark.parametrize(("ratio", "level"), [(1e-5, "critical"), (1.1e-5, "moderate")])
def test_a_layer_whose_steps_move_it_is_at_most_moderate(ratio: float, level: str) -> None:
    assert vanishing(decades=9, update_ratio=ratio) == level


@pytest.mark.parametrize(("left", "level"), [(0.5, "critical"), (0.51, "moderate")])
def test_a_layer_that_an_adaptive_optimizer_makes_up_for_is_at_most_moderate(
    left: float, level: str
) -> None:
    assert vanishing(decades=9, attenuation=left) == level
    # Recorded steps are better evidence than epsilon.
    assert vanishing(decades=9, attenuation=left, update_ratio=1e-7) == "critical"


def test_underflow_loses_gradients_however_the_layer_moves() -> None:
    tests = {"tests": ("depth", "numeric"), "held_tests": ("depth",)}

    assert vanishing(decades=9, update_ratio=1.0, **tests) == "critical"


@pytest.mark.parametrize("test", ["update", "numeric"])
def test_standing_still_and_underflow_are_at_least_moderate(test: str) -> None:
    assert vanishing(decades=-math.inf, tests=(test,), held_tests=(test,)) == "moderate"
    assert vanishing(decades=-math.inf, tests=(test,), held_tests=()) == "none"
    assert vanishing(decades=5.5, tests=(test,), held_tests=(test,)) == "severe"


@pytest.mark.parametrize(("left", "level"), [(0.01, "moderate"), (0.0099, "critical")])
def test_a_step_of_which_epsilon_leaves_less_than_a_hundredth_is_critical(
    left: float, level: str
) -> None:
    tests = {"tests": ("update",), "held_tests": ("update",)}

    assert vanishing(decades=-math.inf, attenuation_held=left, **tests) == level


def test_a_stack_that_vanishes_is_at_least_severe_and_its_biases_mild() -> None:
    assert vanishing(systemic=True, update_ratio=1.0) == "severe"
    assert vanishing(systemic=True, decades=7) == "critical"
    assert vanishing(systemic=True, only_biases=True) == "mild"
    assert vanishing(decades=2.0, only_biases=True) == "none"


def test_the_causes_of_vanishing_are_those_of_its_tests_each_with_its_remedy() -> None:
    def cause(**changed: Any) -> tuple[str, str]:
        text, advice = judgement.vanished.vanishing_cause(replace(LOST, **changed))
        return "; ".join(text), "; ".join(advice)

    assert "not along the whole stack" in cause()[0]
    text, advice = cause(gradual=True, nats_per_layer=0.05)
    assert "keeps 0.95 of the gradient" in text
    assert "pre-norm" in advice
    text, advice = cause(systemic=True, nats_per_layer=math.log(7))
    assert "divides the gradient by 7.0" in text
    assert "does not saturate" in advice
    assert "residual" in advice
    assert "earlier level" in cause(tests=("time",))[0]
    assert "onset" in cause(tests=("time",))[1]
    assert "loss scale" in cause(tests=("numeric",))[1]
    assert "2e-08" in cause(tests=("update",), update_ratio=2e-8)[0]
    assert "learning rate" in cause(tests=("update",), update_ratio=2e-8)[1]
    text, advice = cause(tests=("update",), epsilon=1e-4)
    assert "0.0001" in text
    assert "epsilon below 0.0001" in advice
    assert "bias=False" in cause(only_biases=True)[1]
    assert "bias=False" not in cause()[1]
    assert "units are dead" in cause(zeros=0.95)[0]
    assert "units are dead" not in cause(zeros=0.85)[0]
    assert "units are dead" not in cause(zeros=0.95, systemic=True, nats_per_layer=1.2)[0]
    assert "units are dead" not in cause(zeros=0.95, tests=("numeric",))[0]
    every = cause(tests=("depth", "time", "numeric", "update"), epsilon=1.0)
    assert every[0].count(";") == 3
    assert "clip" not in every[1]


# --- exploding ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ratio", "level"),
    [
        (3.9, "none"),
        (4, "mild"),
        (10, "moderate"),
        (50, "severe"),
        (99, "severe"),
        (100, "critical"),
    ],
)
def test_exploding_is_as_bad_as_the_ratio_to_its_own_level(ratio: float, level: str) -> None:
    assert exploding(own_ratio=ratio) == level


@pytest.mark.parametrize(
    ("ratio", "level"), [(69, "none"), (71, "mild"), (1001, "moderate"), (1.1e5, "severe")]
)
def test_a_tall_input_side_is_judged_by_its_ratio_to_the_loss_side(
    ratio: float, level: str
) -> None:
    tall = {"tests": ("depth",), "own_ratio": -math.inf, "depth_nats": math.log(ratio)}

    assert exploding(**tall, loss_rises=True) == level
    assert exploding(**tall, loss_rises=None) == ("moderate" if level == "severe" else level)
    assert exploding(**tall, loss_rises=False) == ("none" if level == "none" else "mild")


@pytest.mark.parametrize(
    ("ratio", "level"),
    [(0.09, "none"), (0.1, "mild"), (0.5, "mild"), (0.51, "severe"), (1.0, "critical")],
)
@pytest.mark.parametrize("rises", [True, None])
def test_large_steps_are_judged_by_the_share_of_the_weights(
    ratio: float, level: str, rises: bool | None
) -> None:
    steps = {"tests": ("update",), "own_ratio": -math.inf, "update_ratio": ratio}

    assert exploding(**steps, loss_rises=rises) == level


def test_steps_that_replace_the_weights_are_severe_under_a_falling_loss_too() -> None:
    steps = {"tests": ("update",), "own_ratio": -math.inf, "loss_rises": False}

    assert exploding(**steps, update_ratio=0.6) == "severe"
    assert exploding(**steps, update_ratio=0.3) == "mild"


@pytest.mark.parametrize(
    ("doubling", "level"), [(9.9, "severe"), (10.1, "moderate"), (99, "moderate"), (101, "mild")]
)
def test_growth_is_as_bad_as_it_doubles_fast(doubling: float, level: str) -> None:
    grown = {"tests": ("growth",), "own_ratio": -math.inf, "growth": math.log(2) / doubling}

    assert exploding(**grown) == level
    assert exploding(**grown, loss_rises=False) == "none"
    assert exploding(**(grown | {"tests": ("level",), "own_ratio": 5.0})) == "mild"


@pytest.mark.parametrize("growth", [None, 0.0, -1.0])
def test_growth_without_a_rate_is_mild(growth: float | None) -> None:
    assert exploding(tests=("growth",), own_ratio=-math.inf, growth=growth) == "mild"
    assert exploding(tests=(), held_tests=("growth",), own_ratio=-math.inf) == "mild"


def test_a_level_under_a_falling_loss_does_no_harm_short_of_ten_times_as_much() -> None:
    assert exploding(own_ratio=39, loss_rises=False) == "none"
    assert exploding(own_ratio=41, loss_rises=False) == "mild"
    assert exploding(own_ratio=1e9, loss_rises=False) == "severe"
    assert exploding(own_ratio=1000, loss_rises=None) == "critical"
    assert exploding(own_ratio=39, loss_rises=False, tests=("level", "depth")) == "mild"


def test_a_stack_that_explodes_is_at_least_severe_and_non_finite_gradients_are_critical() -> None:
    assert exploding(systemic=True, own_ratio=0, loss_rises=False) == "severe"
    assert exploding(systemic=True, own_ratio=200) == "critical"
    assert exploding(tests=("non-finite",), own_ratio=0, loss_rises=False) == "critical"


def test_the_causes_of_explosion_are_those_of_its_tests_each_with_its_remedy() -> None:
    def cause(*tests: str, **changed: Any) -> tuple[str, str]:
        text, advice = judgement.exploded.exploding_cause(replace(BLOWN, tests=tests, **changed))
        return "; ".join(text), "; ".join(advice)

    assert "NaN or Inf" in cause("non-finite")[0]
    assert "checkpoint" in cause("non-finite")[1]
    assert "earlier level" in cause("level")[0]
    assert "earlier range" in cause("growth", "level")[0]
    assert "clip the total norm at 1.5" in cause("growth")[1]
    assert "loss side" in cause("depth")[0]
    text, advice = cause("depth", systemic=True, nats_per_layer=-math.log(4))
    assert "multiplies the gradient by 4.0" in text
    assert "1/sqrt(depth)" in advice
    assert "loss side" not in text
    assert "tenth" in cause("update")[0]
    assert "learning rate" in cause("update")[1]
    assert "raised 30 times" in cause("growth", rate_factor=30.0)[0]
    assert cause("growth", rate_factor=30.0)[1].startswith("check the schedule")
    assert "raised" not in cause("growth", rate_factor=2.9)[0]
    assert "raised" not in cause("non-finite", rate_factor=30.0)[0]
    assert cause("spike") == ("", "")


# --- dead zones -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("facts", "potential"),
    [
        ({}, "low"),
        ({"age": None}, "high"),
        ({"was_nonfinite": True, "age": None}, "none"),
        ({"everything": True}, "none"),
        ({"partly_alive": True}, "medium"),
        # One of two that reached this age ended, and the current one is censored: a half.
        ({"ended": (10, 4)}, "high"),
        ({"ended": (9, 9)}, "medium"),
        ({"ended": (10,)}, "medium"),
        ({"ended": (1,)}, "medium"),
        ({"ended": (1,), "age": 11}, "low"),
    ],
)
def test_recovery_is_as_likely_as_the_past_says(facts: dict[str, Any], potential: str) -> None:
    assert recovery(**facts) == potential


def test_one_must_act_where_a_zone_lasts_and_will_not_end() -> None:
    assert judgement.intervention(DEAD, "low")
    assert judgement.intervention(DEAD, "none")
    assert not judgement.intervention(DEAD, "medium")
    assert not judgement.intervention(replace(DEAD, age=None), "none")
    assert not judgement.intervention(replace(DEAD, only_biases=True), "low")


# --- steps ----------------------------------------------------------------------------------------


def wave(cosine: float | None = -0.95, growth: float | None = 0.2) -> Oscillation:
    return Oscillation(
        layers=("a",),
        share_of_layers=1.0,
        cosine=cosine,
        growth_per_step=growth,
        onset=(None, 0),
        ongoing=True,
        basis="exact",
    )


def test_the_learning_rate_follows_from_the_growth_of_opposed_gradients() -> None:
    found = judgement.learning_rate([wave()], True, 0.3, opposed=-0.5)

    assert found is not None
    assert found.divide_by == pytest.approx(1 + math.exp(0.2))
    assert found.suggested == pytest.approx(0.3 / (1 + math.exp(0.2)))
    assert found.why.endswith("it diverges")
    falling = judgement.learning_rate([wave(growth=-0.2)], True, None, opposed=-0.5)
    assert falling is not None
    assert falling.suggested is None
    assert falling.why.endswith("it still converges")


@pytest.mark.parametrize(("plain", "cosine"), [(False, -0.95), (True, -0.9), (True, -0.5)])
def test_without_plain_descent_or_opposed_gradients_only_the_sign_holds(
    plain: bool, cosine: float
) -> None:
    found = judgement.learning_rate([wave(cosine)], plain, 0.3, opposed=-0.5)

    assert found is not None
    assert found.divide_by is None
    assert found.suggested is None
    assert "no factor" in found.why


def test_the_last_oscillation_with_a_cosine_and_a_growth_counts() -> None:
    def rate(*waves: Oscillation) -> object:
        return judgement.learning_rate(waves, True, 1.0, opposed=-0.5)

    assert rate() is None
    assert rate(wave(cosine=None), wave(growth=None)) is None
    assert rate(wave(), wave(cosine=None)) == rate(wave())
    assert rate(wave(), wave(cosine=-0.4)) is None
    assert rate(wave(cosine=-0.4), wave()) == rate(wave())


# --- layers and regions ---------------------------------------------------------------------------


def region(
    level: Any, layers: tuple[str, ...] = ("a",), advice: tuple[str, ...] = ("x", "y")
) -> Region:
    where = Extent(
        start_layer=layers[0],
        end_layer=layers[-1],
        layer_count=len(layers),
        affected_parameters=None,
        duration_steps=1,
        records=3,
        onset=(None, 0),
        end=2,
        ongoing=False,
    )
    return Region(
        region_id="r",
        affected_layers=layers,
        severity_level=level,
        extent=where,
        tests=("level",),
        systemic=False,
        peak=None,
        update_ratio=None,
        cause="",
        mitigation_suggestions=advice,
    )


def test_a_layer_has_the_verdict_of_its_worst_region() -> None:
    regions = [region("mild", ("a", "b")), region("severe", ("b", "c"), ()), region("moderate")]

    found = judgement.exploding_layers(regions, ["c", "d"], 5.0)

    assert {name: v.level for name, v in found.items()} == {
        "a": "moderate",
        "b": "severe",
        "c": "severe",
        "d": "mild",
    }
    assert found["a"].advice == "x"
    assert found["b"].advice == ""
    assert found["d"].tests == ("threshold",)
    assert "5" in found["d"].advice


def test_a_trace_is_severe_or_critical() -> None:
    levels = ("none", "mild", "moderate", "severe", "critical")

    assert [r.severity_level for r in judgement.lasting([region(x) for x in levels])] == [
        "severe",
        "critical",
    ]
    assert judgement.worst(levels[:3]) == "moderate"
    assert judgement.worst([]) == "none"


# --- rules with other limits ----------------------------------------------------------------------


def severities(rule: Any, result: FlowResult, **limits: Any) -> list[str]:
    return [str(o.severity) for o in rule(result, **limits) if hasattr(o, "severity")]


def test_a_rule_with_other_limits_judges_the_same_facts_anew() -> None:
    norms = noise(60, 8, scale=0.05)
    norms[:, 2] *= 10**-5.5
    result = analyze_flow(made(norms)).result

    rule = vanishing_gradient
    assert severities(rule, result) == ["high"]
    assert severities(rule, result, severe=5.8) == ["medium"]
    assert severities(rule, result, critical=5.1) == ["critical"]
    assert severities(rule, result, moderate=5.7, severe=5.8) == ["low"]
    assert severities(rule, result, decades=6.5, moderate=7.0, severe=8, critical=9) == ["info"]
    assert next(o for o in rule(result, decades=2.9) if hasattr(o, "threshold")).threshold == 2.9
    assert result.vanishing_regions[0].severity_level == "severe"


def test_an_explosion_under_other_limits_is_judged_anew_or_harmless() -> None:
    norms = noise(200, 5, scale=0.05)
    norms[120:] *= 70
    result = analyze_flow(made(norms)).result

    rule = exploding_gradient
    assert severities(rule, result) == ["high"]
    assert severities(rule, result, severe=90.0) == ["medium"]
    assert severities(rule, result, critical=60.0) == ["critical"]

    steps = {"param_l2": np.ones((60, 3)), "update_l2": np.full((60, 3), 0.3)}
    pushed = analyze_flow(made(noise(60, 3), **steps)).result
    assert severities(rule, pushed) == ["low"]
    assert severities(rule, pushed, update_severe=0.2) == ["high"]
    assert severities(rule, pushed, update_mild=0.4) == []


def test_a_zone_under_other_limits_is_judged_anew() -> None:
    norms = noise(120, 5)
    norms[10:16, 2] = norms[60:, 2] = 0
    result = analyze_flow(made(norms)).result

    rule = dead.dead_zone
    assert severities(rule, result) == ["medium", "low"]
    assert severities(rule, result, records=10) == ["medium"]
    assert severities(rule, result, outlived=5.0) == ["high", "low"]
    # Zones that pass are one finding.
    assert severities(rule, result, recoveries=1, share=0.0) == ["low"]


def test_other_rules_have_limits_that_work() -> None:
    bumped = noise(300, 5, scale=0.1)
    bumped[200] *= 30
    spiked = analyze_flow(made(bumped)).result
    assert severities(gradient_spike, spiked) == ["low"]
    assert severities(gradient_spike, spiked, small=50.0) == ["info"]
    assert severities(gradient_spike, spiked, tall=15.0) == ["medium"]

    ratio = {"param_l2": np.ones((60, 4)), "update_l2": np.tile([0.7, 0.06, 1e-3, 1e-3], (60, 1))}
    pushed = analyze_flow(made(noise(60, 4), **ratio)).result
    assert severities(motion.update_ratio, pushed) == ["high"]
    assert severities(motion.update_ratio, pushed, wild=0.8) == ["medium"]
    assert severities(motion.update_ratio, pushed, high=0.8) == ["low"]
    assert severities(motion.update_ratio, pushed, share=0.3) == ["low"]
    assert severities(motion.update_ratio, pushed, low=0.8) == []
    (only,) = motion.update_ratio(pushed, low=0.1)
    assert only.subject == "layers.0"

    still = {"param_l2": np.ones((60, 4)), "update_l2": np.full((60, 4), 5e-7)}
    standing = analyze_flow(made(noise(60, 4), **still)).result
    assert severities(motion.stagnation, standing) == ["medium"]
    assert severities(motion.stagnation, standing, still=4e-7) == []

    narrow = noise(100, 7, scale=0.01)
    narrow[:, 3] *= 10**-2.5
    starved = analyze_flow(made(narrow)).result
    assert severities(paths.bottleneck, starved) == ["medium"]
    assert severities(paths.bottleneck, starved, decades=2.6) == ["low"]
    assert severities(paths.bottleneck, starved, low=2.6) == []

    waves = analyze_flow(quadratic(2.2)).result
    assert severities(motion.oscillation, waves) == ["high"]
    assert severities(motion.oscillation, waves, growing=1.0) == ["medium"]
    assert severities(motion.oscillation, waves, opposed=-1.0) == ["low"]
    assert severities(motion.oscillation, waves, most=1.1) == ["low"]


def test_a_result_read_back_from_a_report_keeps_its_verdicts() -> None:
    norms = noise(120, 8)
    norms[:, 2] *= 1e-6
    norms[40:, 6] = 0
    norms[80:, 7] *= 1e4
    result = analyze_flow(made(norms)).result
    text = result.model_dump_json()
    again = FlowResult.model_validate_json(text)

    assert "facts" not in text
    assert again.model_dump_json() == text
    for rule in (vanishing_gradient, exploding_gradient, dead.dead_zone):
        assert severities(rule, result)
        assert severities(rule, again) == severities(rule, result)
