"""How bad exploding gradients are, why, and what to do."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from gradscope.flow.facts import Candidate, ExplodingFacts
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
from gradscope.flow.records.regions import LEVELS, Level, Region


def exploding(
    found: Iterable[Candidate[ExplodingFacts] | Region], **limits: float
) -> tuple[Region, ...]:
    """Regions of exploding gradients, judged by the limits of F103; harmless ones are left out."""
    judged = (
        again(region, exploding_level, limits)
        if isinstance(region, Region)
        else region_of(region, lambda facts: exploding_level(facts, **limits), exploding_cause)
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
        rank(facts.own_ratio, mild, moderate, severe, critical),
        rank(facts.depth_nats, *depths),
        steps,
        MILD if "growth" in facts.held_tests else 0,
    )
    if "growth" in facts.tests:
        level = max(level, _growth_level(facts.growth, doubling_moderate, doubling_severe))
    if facts.systemic:
        return LEVELS[max(level, SEVERE)]
    if "update" in facts.tests and level >= SEVERE:
        return LEVELS[level]
    if facts.loss_rises is False:
        calm = MILD if {"depth", "update"} & set(facts.tests) else 0
        wild = rank(facts.own_ratio / falling, mild, moderate, severe, critical)
        return LEVELS[max(min(level, calm), min(wild, SEVERE))]
    if facts.loss_rises is None and not {"growth", "level"} & set(facts.tests):
        return LEVELS[min(level, MODERATE)]
    return LEVELS[level]


def _steps_level(ratio: float, mild: float, severe: float, critical: float) -> int:
    if ratio >= critical:
        return CRITICAL
    return SEVERE if ratio > severe else MILD if ratio >= mild else 0


def _growth_level(rate: float | None, moderate: float, severe: float) -> int:
    """By the steps in which the norm doubles."""
    if rate is None or rate <= 0:
        return MILD
    doubling = math.log(2) / rate
    return SEVERE if doubling < severe else MODERATE if doubling < moderate else MILD


#: How many times as large a learning rate is that was raised.
_RAISED = 3.0


def exploding_cause(facts: ExplodingFacts) -> tuple[Words, Words]:
    """What the evidence points at, and what to do about that."""
    causes, advice = [], []
    if "non-finite" in facts.tests:
        causes.append("gradients have NaN or Inf elements")
        advice.append(
            "go back to the last checkpoint before the onset; look at the batch, the loss, "
            "and divisions, logs and roots at the origin"
        )
    if (facts.rate_factor or 0) >= _RAISED and "non-finite" not in facts.tests:
        causes.append(f"the learning rate had just been raised {facts.rate_factor:.3g} times")
        advice.append("check the schedule: raise the learning rate slowly, or not so far")
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
