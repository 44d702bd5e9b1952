"""What every judgement shares: limits, levels, and regions that are as bad as their worst layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from inspect import Parameter, signature
from typing import Any, TypeVar

from gradscope.flow.facts import Candidate, ExplodingFacts, VanishingFacts
from gradscope.flow.records.regions import LEVELS, Level, Region

Words = tuple[str, ...]
F = TypeVar("F", VanishingFacts, ExplodingFacts)
MILD, MODERATE, SEVERE, CRITICAL = 1, 2, 3, 4


def limits(rule: Callable[..., object]) -> dict[str, Any]:
    """The limits that a rule judges by: its keyword-only parameters."""
    parameters = signature(rule).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is Parameter.KEYWORD_ONLY}


def worst(levels: Iterable[Level]) -> Level:
    """The highest of some levels; "none" without any."""
    return max(levels, key=LEVELS.index, default="none")


def rank(value: float, *bounds: float) -> int:
    """How many of some rising bounds a value reaches."""
    return sum(value >= bound for bound in bounds)


def region_of(
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


def again(region: Region, level: Callable[..., Level], limits: Any) -> Region:
    """The same facts under other limits; a region read back from a report keeps its level."""
    if not region.facts:
        return region
    levels = (level(facts, **limits) for facts in region.facts)
    return region.model_copy(update={"severity_level": worst(levels)})
