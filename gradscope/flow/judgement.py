"""What measured facts mean: how severe, why, and what to do about it.

The only place that decides. Functions here know no default: every limit is a keyword-only
parameter of the rule that reports the matter, so that ``limits(rule)`` gives the limits that the
result is judged by, and a rule called with others judges the same facts anew.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from inspect import Parameter, signature
from typing import Any, TypeVar

from gradscope.flow.facts import Candidate, DeadFacts, ExplodingFacts, VanishingFacts, Weights
from gradscope.flow.limits import CLIMBING, LEAVE_DECADES
from gradscope.flow.result import (
    LEVELS,
    Accumulation,
    Captures,
    DeadZone,
    Divergence,
    LearningRateAdvice,
    Level,
    Oscillation,
    Recovery,
    Region,
)

Words = tuple[str, ...]
F = TypeVar("F", VanishingFacts, ExplodingFacts)
_MILD, _MODERATE, _SEVERE, _CRITICAL = 1, 2, 3, 4


def limits(rule: Callable[..., object]) -> dict[str, Any]:
    """The limits that a rule judges by: its keyword-only parameters."""
    parameters = signature(rule).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is Parameter.KEYWORD_ONLY}


def worst(levels: Iterable[Level]) -> Level:
    """The highest of some levels; "none" without any."""
    return max(levels, key=LEVELS.index, default="none")


def _rank(value: float, *bounds: float) -> int:
    """How many of some rising bounds a value reaches."""
    return sum(value >= bound for bound in bounds)


def _region(
    found: Candidate[F], level: Callable[[F], Level], explain: Callable[[F], tuple[Words, Words]]
) -> Region:
    """A region is as bad as its worst layer, and for that layer's reasons."""
    levels = [level(facts) for facts in found.facts]
    most = worst(levels)
    said = [explain(f) for f, reached in zip(found.facts, levels, strict=True) if reached == most]
    causes = dict.fromkeys(part for cause, _ in said for part in cause)
    return Region(
        region_id=found.region_id,
        affected_layers=found.affected_layers,
        severity_level=most,
        extent=found.extent,
        tests=tuple(dict.fromkeys(test for facts in found.facts for test in facts.tests)),
        systemic=any(facts.systemic for facts in found.facts),
        peak=found.peak,
        update_ratio=found.update_ratio,
        cause="; ".join(causes),
        mitigation_suggestions=tuple(dict.fromkeys(part for _, advice in said for part in advice)),
        facts=found.facts,
    )


def _again(region: Region, level: Callable[..., Level], limits: Any) -> Region:
    """The same facts under other limits; a region read back from a report keeps its level."""
    if not region.facts:
        return region
    levels = (level(facts, **limits) for facts in region.facts)
    return region.model_copy(update={"severity_level": worst(levels)})


# --- vanishing ------------------------------------------------------------------------------------


def vanishing(
    found: Iterable[Candidate[VanishingFacts] | Region], **limits: float
) -> tuple[Region, ...]:
    """Regions of vanishing gradients, judged by the limits of F102."""
    return tuple(
        _again(region, vanishing_level, limits)
        if isinstance(region, Region)
        else _region(region, lambda facts: vanishing_level(facts, **limits), _vanishing_cause)
        for region in found
    )


def vanishing_level(
    facts: VanishingFacts,
    *,
    decades: float,
    moderate: float,
    severe: float,
    critical: float,
    learning: float,
    attenuated: float,
    faint: float,
) -> Level:
    """By decades lost; what follows decides: a layer that still learns is at most moderate.

    ``decades`` is where a region begins, so it is mild a little below. A bias before a
    normalisation has no effect and its gradient is what rounding leaves: at most mild.
    """
    level = _rank(facts.decades, decades - LEAVE_DECADES, moderate, severe, critical)
    if facts.attenuation_held < faint:
        level = _CRITICAL
    if {"update", "numeric"} & set(facts.held_tests):
        level = max(level, _MODERATE)
    if facts.systemic:
        level = max(level, _SEVERE)
    elif still_learns(facts, learning, attenuated) and "numeric" not in facts.tests:
        level = min(level, _MODERATE)
    return LEVELS[min(level, _MILD) if facts.only_biases else level]


def still_learns(facts: VanishingFacts, learning: float, attenuated: float) -> bool:
    """Whether steps move the weights of a region, or epsilon does not hold them back."""
    if facts.update_ratio is not None:
        return facts.update_ratio > learning
    return facts.attenuation is not None and facts.attenuation > attenuated


#: Why weights that are nothing pass nothing on, and what to do.
WEIGHTLESS: Mapping[Weights, tuple[str, str]] = {
    "zero": (
        "their weights are zero since the first record",
        "initialise these weights at random: through zeros no gradient passes, and units that "
        "begin alike stay alike (only biases, heads and the last layer of a branch may begin at "
        "zero)",
    ),
    "shrunk": (
        "their weights have shrunk to less than a thousandth",
        "lower the weight decay, which outweighs the gradient, or whatever else pulls these "
        "weights to zero",
    ),
}


def _vanishing_cause(facts: VanishingFacts) -> tuple[Words, Words]:
    """What the evidence points at, and what to do about that; never clipping."""
    if facts.weights != "kept":
        cause, remedy = WEIGHTLESS[facts.weights]
        return (cause,), (remedy,)
    causes, advice = [], []
    if facts.systemic and facts.nats_per_layer is not None:
        causes.append(
            "every layer of the backward pass divides the gradient by "
            f"{math.exp(facts.nats_per_layer):.1f}"
        )
        advice += [
            "use an activation that does not saturate (ReLU, GELU) or an initialisation that keeps "
            "the variance (He, Xavier, orthogonal)",
            "add normalisation or residual connections",
        ]
    elif "depth" in facts.tests and facts.gradual and facts.nats_per_layer is not None:
        causes.append(
            f"every layer keeps {math.exp(-facts.nats_per_layer):.2g} of the gradient, and the "
            "stack is deep"
        )
        advice += [
            "give the gradient a way around: residual connections that nothing normalises "
            "(pre-norm instead of post-norm)",
            "warm the learning rate up, or scale the residual branches down with depth",
        ]
    elif "depth" in facts.tests:
        causes.append("the gradient drops here, not along the whole stack")
        advice.append(
            "look at what these layers feed: a saturated activation, a detach(), a tiny gain or "
            "initial scale"
        )
    if "time" in facts.tests:
        causes.append("these layers fell far below their own earlier level, the others did not")
        advice.append(
            "compare activations and weights before and after the onset: saturation, a "
            "schedule that froze them, a collapsed norm gain"
        )
    if "numeric" in facts.tests:
        causes.append("float16 cannot represent gradients this small")
        advice.append("use a gradient scaler (a larger loss scale) or bfloat16")
    if "update" in facts.tests:
        causes.append(_standstill_cause(facts))
        advice.append(_standstill_advice(facts))
    if facts.only_biases:
        advice.append(
            "a bias before a normalisation layer has no effect: leave it out (bias=False)"
        )
    return tuple(causes), tuple(dict.fromkeys(advice))


def _standstill_cause(facts: VanishingFacts) -> str:
    if facts.update_ratio is not None:
        return f"steps change the weights by {facts.update_ratio:.1g} of their norm"
    return f"the optimizer's epsilon ({facts.epsilon:g}) outweighs the gradient"


def _standstill_advice(facts: VanishingFacts) -> str:
    if facts.epsilon is not None:
        return f"lower the optimizer's epsilon below {facts.epsilon:g}, or scale the loss up"
    return "check the learning rate of the parameter group"


# --- exploding ------------------------------------------------------------------------------------


def exploding(
    found: Iterable[Candidate[ExplodingFacts] | Region], **limits: float
) -> tuple[Region, ...]:
    """Regions of exploding gradients, judged by the limits of F103; harmless ones are left out."""
    judged = (
        _again(region, exploding_level, limits)
        if isinstance(region, Region)
        else _region(region, lambda facts: exploding_level(facts, **limits), _exploding_cause)
        for region in found
    )
    return tuple(region for region in judged if region.severity_level != "none")


def exploding_level(
    facts: ExplodingFacts,
    *,
    mild: float,
    moderate: float,
    severe: float,
    critical: float,
    doubling_moderate: float,
    doubling_severe: float,
    depth_mild: float,
    depth_moderate: float,
    depth_severe: float,
    update_mild: float,
    update_severe: float,
    update_critical: float,
    falling: float,
) -> Level:
    """What follows decides: growth under a falling loss, or a tall input side, does no harm yet.

    Growth beyond all measure does: while the loss falls it takes ``falling`` times as much.
    """
    if "non-finite" in facts.tests:
        return "critical"
    depths = [math.log(bound) for bound in (depth_mild, depth_moderate, depth_severe)]
    steps = _steps_level(facts.update_ratio, update_mild, update_severe, update_critical)
    level = max(
        _rank(facts.own_ratio, mild, moderate, severe, critical),
        _rank(facts.depth_nats, *depths),
        steps,
        _MILD if "growth" in facts.held_tests else 0,
    )
    if "growth" in facts.tests:
        level = max(level, _growth_level(facts.growth, doubling_moderate, doubling_severe))
    if facts.systemic:
        return LEVELS[max(level, _SEVERE)]
    if "update" in facts.tests and level >= _SEVERE:
        return LEVELS[level]
    if facts.loss_rises is False:
        calm = _MILD if {"depth", "update"} & set(facts.tests) else 0
        wild = _rank(facts.own_ratio / falling, mild, moderate, severe, critical)
        return LEVELS[max(min(level, calm), min(wild, _SEVERE))]
    if facts.loss_rises is None and not {"growth", "level"} & set(facts.tests):
        return LEVELS[min(level, _MODERATE)]
    return LEVELS[level]


def _steps_level(ratio: float, mild: float, severe: float, critical: float) -> int:
    if ratio >= critical:
        return _CRITICAL
    return _SEVERE if ratio > severe else _MILD if ratio >= mild else 0


def _growth_level(rate: float | None, moderate: float, severe: float) -> int:
    """By the steps in which the norm doubles."""
    if rate is None or rate <= 0:
        return _MILD
    doubling = math.log(2) / rate
    return _SEVERE if doubling < severe else _MODERATE if doubling < moderate else _MILD


def _exploding_cause(facts: ExplodingFacts) -> tuple[Words, Words]:
    causes, advice = [], []
    if "non-finite" in facts.tests:
        causes.append("gradients have NaN or Inf elements")
        advice.append(
            "go back to the last checkpoint before the onset; look at the batch, the loss, "
            "and divisions, logs and roots at the origin"
        )
    if facts.systemic and facts.nats_per_layer is not None:
        causes.append(
            "every layer of the backward pass multiplies the gradient by "
            f"{math.exp(-facts.nats_per_layer):.1f}"
        )
        advice.append(
            "use an initialisation that keeps the variance, normalisation, or residual "
            "branches scaled by 1/sqrt(depth)"
        )
    elif "depth" in facts.tests:
        causes.append("these layers get far larger gradients than the loss side of their kind")
        advice.append(
            "look at what multiplies the gradient after them: a large gain, an unscaled "
            "branch, a sum over many positions"
        )
    if {"growth", "level"} & set(facts.tests):
        causes.append(
            "the norm grew out of its earlier range"
            if "growth" in facts.tests
            else "the norm stays far above its earlier level"
        )
        advice.append(
            f"lower the learning rate; clip the total norm at {facts.usual_norm:.3g} (the 90th "
            "percentile of the calmer half of the run) as a guard"
        )
    if "update" in facts.tests:
        causes.append("steps change the weights by more than a tenth of their norm")
        advice.append(
            "lower the learning rate of these layers, or find out why their weights are so small"
        )
    return tuple(causes), tuple(dict.fromkeys(advice))


def lasting(regions: Sequence[Region]) -> list[Region]:
    """The regions that are bad enough to be the trace of a spike."""
    return [r for r in regions if r.severity_level in ("severe", "critical")]


@dataclass(frozen=True, slots=True)
class LayerVerdict:
    """What is said of one layer whose gradients explode."""

    level: Level
    tests: tuple[str, ...]
    advice: str


def exploding_layers(
    regions: Sequence[Region], above: Sequence[str], threshold: float | None
) -> Mapping[str, LayerVerdict]:
    """The worst that any region says of each layer; mild for those ``above`` a ``threshold``."""
    found: dict[str, LayerVerdict] = {}
    for region in sorted(regions, key=lambda r: -LEVELS.index(r.severity_level)):
        advice = region.mitigation_suggestions[0] if region.mitigation_suggestions else ""
        verdict = LayerVerdict(region.severity_level, region.tests, advice)
        for name in region.affected_layers:
            found.setdefault(name, verdict)
    for name in above:
        advice = f"its norm exceeds the limit of {threshold:g} that was asked for"
        found.setdefault(name, LayerVerdict("mild", ("threshold",), advice))
    return found


# --- dead zones -----------------------------------------------------------------------------------


def dead_zones(
    found: Iterable[Candidate[DeadFacts] | DeadZone], *, records: int, **limits: Any
) -> tuple[DeadZone, ...]:
    """Zones without gradient of so many records, judged by the limits of F105."""
    return tuple(_dead_zone(zone, limits) for zone in found if zone.extent.records >= records)


def _dead_zone(found: Candidate[DeadFacts] | DeadZone, limits: Any) -> DeadZone:
    if isinstance(found, DeadZone) and found.facts is None:  # read back from a report
        return found
    facts = found.facts if isinstance(found, DeadZone) else found.facts[0]
    assert facts is not None
    potential = recovery(facts, **limits)
    verdict: dict[str, Any] = {
        "recovery_potential": potential,
        "intervention_required": intervention(facts, potential),
    }
    if isinstance(found, DeadZone):
        return found.model_copy(update=verdict)
    return DeadZone(
        zone_id=found.region_id,
        affected_layers=found.affected_layers,
        origin=found.affected_layers[-1],
        dead_duration=facts.duration,
        extent=found.extent,
        past_recoveries=len(facts.ended),
        facts=facts,
        **verdict,
    )


def recovery(facts: DeadFacts, *, recoveries: int, share: float, outlived: float) -> Recovery:
    """How likely a dead zone ends, from what share of past ones of this age did (Kaplan-Meier).

    The current one is censored, so it counts among those at risk and not among those that ended.
    High takes ``recoveries`` past ones and a ``share``; one ``outlived`` times longer than any
    that ended is of another sort.
    """
    if facts.was_nonfinite or facts.everything:
        return "none"
    if facts.age is None:
        return "high"
    survivors = sum(length >= facts.age for length in facts.ended)
    if len(facts.ended) >= recoveries and survivors / (survivors + 1) >= share:
        return "high"
    recovers = facts.age <= outlived * max(facts.ended, default=0)
    return "medium" if recovers or facts.partly_alive else "low"


def intervention(facts: DeadFacts, potential: Recovery) -> bool:
    """Whether a zone lasts, will not end by itself, and should.

    The gradient of a bias before a normalisation layer is rightly zero, and so is every gradient
    once a hinge loss has come down to zero.
    """
    rightly = facts.only_biases or facts.learnt
    return facts.age is not None and potential in ("low", "none") and not rightly


# --- the loss -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Course:
    """What is made of a loss that left its best level: how bad, and the signs of overshooting."""

    level: Level
    evidence: Words


def divergence(
    found: Divergence | None,
    *,
    level: float,
    adversarial: float,
    steered: float,
    wild: float,
    undone: float,
) -> Course:
    """A loss that rose for good is severe, one that came back moderate, by the limits of F111.

    One that never fell and rises without a sign of overshooting may be that of a network which
    another one competes with: it is moderate when it is ``adversarial`` times as high, else none.
    """
    if found is None or (found.ends == "higher" and 0 < found.after < level * found.before):
        return Course("none", ())
    evidence = () if found.at_once else tuple(_overshooting(found, steered, wild))
    if found.ends == "non-finite":
        return Course("critical", evidence)
    if not found.fell and not evidence:
        height = found.peak if found.ends == "returned" else found.after
        far = found.before > 0 and height >= adversarial * found.before
        return Course("moderate" if far else "none", evidence)
    left = (found.after - found.before) / (found.peak - found.before)
    mended = found.ends == "returned" or found.recovers or (found.at_once and left <= 1 - undone)
    mended &= found.progressed
    return Course("moderate" if mended else "severe", evidence)


def _overshooting(found: Divergence, steered: float, wild: float) -> Iterator[str]:
    """What happened with it, in the order in which it matters."""
    if (found.learning_rate_factor or 0) >= steered:
        yield f"the learning rate had just been raised {found.learning_rate_factor:.3g} times"
    if found.descent is not None and found.descent < CLIMBING:
        yield "steps go up the gradient"
    if (found.update_ratio or 0) > wild:
        yield f"steps change the weights by {found.update_ratio:.0%} of their norm"
    if (found.gradient_factor or 0) >= steered:
        yield f"the gradient norm is {found.gradient_factor:.3g} times what it was"


# --- steps ----------------------------------------------------------------------------------------

#: Nearer to -1 than this the closed form of gradient descent on a quadratic holds.
_NEARLY_OPPOSED = -0.9


def learning_rate(
    found: Sequence[Oscillation],
    plain_descent: bool,
    current: float | None,
    *,
    opposed: float,
) -> LearningRateAdvice | None:
    """What the last oscillation says about the learning rate; None when it says nothing.

    For plain gradient descent on a quadratic g' = (1 - eta h) g: opposed gradients that grow by
    e^gamma a step have eta h = 1 + e^gamma, so dividing the rate by that reaches eta h = 1, where
    the sharpest direction is solved in one step. With momentum, Adam or noise only the sign holds.
    """
    for last in reversed(found):
        if last.cosine is not None and last.growth_per_step is not None:
            break
    else:
        return None
    if last.cosine > opposed:
        return None
    exact = plain_descent and last.cosine < _NEARLY_OPPOSED
    factor = 1 + math.exp(last.growth_per_step) if exact else None
    return LearningRateAdvice(
        divide_by=factor,
        current=current,
        suggested=current / factor if current is not None and factor else None,
        growth_per_step=last.growth_per_step,
        cosine=last.cosine,
        why=_why(factor, last.growth_per_step),
    )


def _why(factor: float | None, growth: float) -> str:
    if factor is None:
        return (
            "steps overshoot; with momentum, an adaptive optimizer or noisy batches no "
            "factor follows"
        )
    state = "diverges" if growth > 0 else "still converges"
    return (
        f"plain gradient descent at {factor:.3g} times the rate that would not overshoot; "
        f"it {state}"
    )


# --- accumulation ---------------------------------------------------------------------------------


def adds_up(
    found: Accumulation | None,
    counted: Captures | None,
    *,
    unfinished: float,
    cosine: float,
    growth: float,
    added: float,
    steady: float,
    doubled: float,
) -> bool:
    """Whether gradients carry over from record to record, by the limits of F115."""
    if captured_unfinished(counted, unfinished):
        return True
    if found is None or found.cosine <= cosine or found.growth <= growth:
        return False
    adds = found.added_growth is not None and found.added_growth < steady
    adds |= found.doubled is not None and found.doubled > doubled
    return 1 / added < found.added < added and adds


def captured_unfinished(counted: Captures | None, unfinished: float) -> bool:
    """Whether records are of gradients that still added up over micro-batches."""
    if counted is None:
        return False
    return counted.calls * (1 - counted.skipped) > unfinished * max(counted.steps, 1)
