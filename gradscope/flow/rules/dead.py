"""The rule about layers that get no gradient for a while."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from gradscope.flow import judgement
from gradscope.flow.limits import SHORTEST_ZONE
from gradscope.flow.records.regions import DeadZone
from gradscope.flow.result import FlowResult, Need
from gradscope.flow.rules.missing import idle_layers
from gradscope.flow.rules.say import follows, place, several, shatters, span
from gradscope.report.rules import Observation, rule
from gradscope.report.severity import Severity
from gradscope.text import plural


@rule("F105", "dead-zone", Severity.HIGH, reads=FlowResult, needs=Need.NORMS)
def dead_zone(
    result: FlowResult,
    *,
    records: int = SHORTEST_ZONE,
    recoveries: int = 2,
    share: float = 0.5,
    outlived: float = 10.0,
) -> Iterator[Observation]:
    """Adjacent layers get a gradient of zero, or none at all, for five records and more.

    Reported from a length of ``records``. High when it lasts and nothing in the run says that it
    will end: no earlier recovery that it has not ``outlived``, and not a unit alive. Medium when
    it lasts but such zones have ended before. Low when it is over, or when ``recoveries`` such
    zones ended and a ``share`` of those that reached its age; such zones are one finding. What
    dies after a loss that diverged for good is told with that.
    """
    zones = judgement.dead_zones(
        result.dead_zones,
        records=records,
        recoveries=recoveries,
        share=share,
        outlived=outlived,
    )
    idle = idle_layers(result)
    told = [zone for zone in zones if not _told_elsewhere(result, zone, idle)]
    passing = [zone for zone in told if _dead_severity(zone) is Severity.LOW]
    for zone in told:
        if zone not in passing:
            yield _zone(result, zone, records)
    if passing:
        yield _passing(result, passing, records)


def _told_elsewhere(result: FlowResult, zone: DeadZone, idle: frozenset[str]) -> bool:
    """Experts that idle, underflow, divergence and what vanished first have their own rules."""
    underflowed = zone.facts is not None and zone.facts.underflowed
    idles = idle.issuperset(zone.affected_layers)
    return idles or underflowed or follows(result, zone) or _vanished(result, zone)


def _vanished(result: FlowResult, zone: DeadZone) -> bool:
    """Whether these layers were vanishing before, as part of what still does and is high."""
    return any(
        region.extent.ongoing
        and region.severity_level in ("severe", "critical")
        and region.extent.onset[1] < zone.extent.onset[1]
        and set(region.affected_layers).issuperset(zone.affected_layers)
        for region in result.vanishing_regions
    )


def _zone(result: FlowResult, zone: DeadZone, records: int) -> Observation:
    constant = result.loss.constant if result.loss else None
    cause, remedy = _cause(zone, constant)
    if step := shatters(result, zone):
        cause = f"; the step of record {step.step} had changed the median layer by "
        cause += f"{step.ratio:.0%} of its norm"
        remedy = "lower the learning rate, or warm it up; scale the inputs and the loss to about 1"
    return Observation(
        place(zone.affected_layers),
        f"no gradient in {several(zone.affected_layers)} for "
        f"{plural(zone.extent.records, 'record')}, "
        f"{span(zone.extent)}{cause}; recovery potential {zone.recovery_potential}",
        remedy,
        {
            "origin": zone.origin,
            "dead_duration": zone.dead_duration,
            "recovery_potential": zone.recovery_potential,
            "past_recoveries": zone.past_recoveries,
            "layers": zone.extent.layer_count,
        },
        threshold=records,
        severity=_dead_severity(zone),
    )


def _passing(result: FlowResult, zones: list[DeadZone], records: int) -> Observation:
    """Zones that ended, or will, as one: the longest is told, and how many there were."""
    longest = max(zones, key=lambda zone: zone.extent.records)
    found = _zone(result, longest, records)
    if len(zones) == 1:
        return found
    layers = list(dict.fromkeys(name for zone in zones for name in zone.affected_layers))
    return replace(
        found,
        subject=place(layers),
        message=f"no gradient now and then in {several(layers)}: {len(zones)} zones, the longest "
        f"{plural(longest.extent.records, 'record')} in {several(longest.affected_layers)}, "
        f"{span(longest.extent)}",
        evidence={**found.evidence, "zones": len(zones)},
    )


def _cause(zone: DeadZone, constant: float | None) -> tuple[str, str]:
    """Why layers are dead, where that is known, and what to do."""
    if zone.facts is not None and zone.facts.learnt:
        return "; the loss has come down to 0", _STOP
    if constant is not None:
        said = f"; the loss is {constant:g} to the bit, to the end"
        return said, _COMPUTE_LOSS if zone.extent.ongoing else _revive(zone)
    if zone.facts is not None and zone.facts.weights != "kept" and zone.extent.ongoing:
        cause, remedy = judgement.WEIGHTLESS[zone.facts.weights]
        return f": {cause}", remedy
    return "", _revive(zone)


_COMPUTE_LOSS = (
    "look at how the loss is computed: are all labels masked or ignored, is it multiplied by zero, "
    "does it depend on the parameters at all?"
)


_STOP = "nothing is left to learn of this loss: stop here, or take one that goes on falling"


def _dead_severity(zone: DeadZone) -> Severity:
    if zone.facts is not None and zone.facts.learnt:
        return Severity.INFO
    if zone.intervention_required:
        return Severity.HIGH
    lasts = zone.extent.ongoing and zone.recovery_potential != "high"
    return Severity.MEDIUM if lasts else Severity.LOW


def _revive(zone: DeadZone) -> str:
    if not zone.extent.ongoing:
        return (
            "nothing now; if it comes back, look at what the batches of those steps have in common"
        )
    return (
        f"look at {zone.origin} first, the layer nearest the loss: units that died (lower the "
        "learning rate, use a leaky activation, initialise again), a multiplication by zero, a "
        "detach(), an empty mask; the layers behind it only inherit"
    )
