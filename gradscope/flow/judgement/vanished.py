"""How bad vanishing gradients are, why, and what to do."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from gradscope.flow.facts import Candidate, VanishingFacts, Weights
from gradscope.flow.judgement.levels import (
    CRITICAL,
    MILD,
    MODERATE,
    SEVERE,
    Words,
    again,
    rank,
    region_of,
)
from gradscope.flow.limits import LEAVE_DECADES
from gradscope.flow.records.regions import LEVELS, Level, Region


def vanishing(
    found: Iterable[Candidate[VanishingFacts] | Region], **limits: float
) -> tuple[Region, ...]:
    """Regions of vanishing gradients, judged by the limits of F102."""
    return tuple(
        again(region, vanishing_level, limits)
        if isinstance(region, Region)
        else region_of(region, lambda facts: vanishing_level(facts, **limits), vanishing_cause)
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
    level = rank(facts.decades, decades - LEAVE_DECADES, moderate, severe, critical)
    if facts.attenuation_held < faint:
        level = CRITICAL
    if {"update", "numeric"} & set(facts.held_tests):
        level = max(level, MODERATE)
    if facts.systemic:
        level = max(level, SEVERE)
    elif still_learns(facts, learning, attenuated) and "numeric" not in facts.tests:
        level = min(level, MODERATE)
    return LEVELS[min(level, MILD) if facts.only_biases else level]


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


#: Share of elements without gradient from which a layer that vanishes is one of dead units.
_DYING = 0.9


def vanishing_cause(facts: VanishingFacts) -> tuple[Words, Words]:
    """What the evidence points at, and what to do about that; never clipping."""
    if facts.weights != "kept":
        cause, remedy = WEIGHTLESS[facts.weights]
        return (cause,), (remedy,)
    if (facts.zeros or 0) >= _DYING and not facts.systemic and "numeric" not in facts.tests:
        return (f"{facts.zeros:.0%} of their elements get no gradient: most units are dead",), (
            "lower the learning rate, or warm it up (a step that is too large kills ReLUs); use a "
            "leaky activation, or initialise these layers again",
        )
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
