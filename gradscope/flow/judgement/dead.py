"""Whether zones without gradient recover, and whether anyone has to act."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from gradscope.flow.facts import Candidate, DeadFacts
from gradscope.flow.records.regions import DeadZone, Recovery


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
