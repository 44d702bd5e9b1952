"""What the flow rules share: severities, and places and times in words."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence

from gradscope.flow import judgement
from gradscope.flow.limits import LOSS_LEVEL
from gradscope.flow.records.events import Spike
from gradscope.flow.records.loss import Divergence
from gradscope.flow.records.regions import DeadZone, Extent, Level, Region
from gradscope.flow.records.steps import Leap
from gradscope.flow.result import FlowResult
from gradscope.report.severity import Severity
from gradscope.text import listed

#: The levels of the seeds on the scale of the report.
SEVERITY: dict[Level, Severity] = {
    "none": Severity.INFO,
    "mild": Severity.LOW,
    "moderate": Severity.MEDIUM,
    "severe": Severity.HIGH,
    "critical": Severity.CRITICAL,
}
_NAMES = 4
#: Records within which units die of a step that was too large.
_SOON = 32


def place(layers: Sequence[str]) -> str:
    """The subject of a finding about adjacent layers."""
    return layers[0] if len(layers) == 1 else f"{layers[0]} … {layers[-1]}"


def several(layers: Sequence[str]) -> str:
    """A few names, and how many more."""
    return listed(layers, len(layers), _NAMES)


def since(onset: tuple[int | None, int]) -> str:
    """When something began, as an interval."""
    after, until = onset
    if after is None:
        return f"from the first record on (step {until})"
    return f"since step {until}" if until - after == 1 else f"since step {after + 1}–{until}"


def span(extent: Extent) -> str:
    """When something began and whether it lasts."""
    return (
        f"{since(extent.onset)}, {'to the end' if extent.ongoing else f'until step {extent.end}'}"
    )


def _rules() -> tuple[Callable[..., object], Callable[..., object]]:
    """F111 and F115, imported late: they are told with the words of this module."""
    from gradscope.flow.rules.loss import diverged
    from gradscope.flow.rules.optimizer import carried_over

    return diverged, carried_over


def severity_of(found: Divergence | None) -> Severity:
    """How severe a loss that left its level is by the limits of F111; info where it did not."""
    return SEVERITY[judgement.divergence(found, **judgement.limits(_rules()[0])).level]


def told(result: FlowResult) -> Divergence | None:
    """The divergence that `diverged` reports: what begins with it is told there."""
    found = result.loss.divergence if result.loss else None
    return None if severity_of(found) is Severity.INFO else found


#: What to do about a loss without a least value.
BOUNDLESS = "check the sign of the loss and of its terms: what is minimised needs a least value"


def endless(result: FlowResult) -> bool:
    """Whether the loss falls without a bound: gradients, steps and weights grow because of it."""
    return result.loss is not None and result.loss.descent is not None


def overwrites(result: FlowResult, found: Divergence) -> bool:
    """Whether weights were overwritten where a loss rose, which is told by that."""
    other = result.overwritten
    if other is None or (other.loss_factor or 0) < LOSS_LEVEL:
        return False
    return other.onset[0] <= found.onset[1] and (found.onset[0] or 0) <= other.onset[1]


def shatters(result: FlowResult, zone: DeadZone) -> Leap | None:
    """The step that replaced most weights shortly before units died, which is its doing."""
    found, records = result.leap, max(result.steps - 1, 1)
    if found is None or found.ratio <= 1 or not zone.intervention_required:
        return None
    spacing = ((result.last_step or 0) - (result.first_step or 0)) / records
    soon = 0 <= zone.extent.onset[1] - found.step <= _SOON * max(spacing, 1)
    return found if soon else None


def follows(result: FlowResult, zone: DeadZone) -> bool:
    """Whether layers died after a loss had diverged for good, which is told with that."""
    left = told(result)
    if left is None or left.at_once or zone.extent.onset[1] < left.onset[1]:
        return False
    return severity_of(left).rank >= Severity.HIGH.rank


def begins_after(region: Region, found: Divergence) -> bool:
    """Whether a region began when the loss had left its level, or grew until it did."""
    grew = "growth" in region.tests and region.extent.end >= found.onset[1]
    return region.extent.onset[1] >= found.onset[1] or grew


def own(
    result: FlowResult, regions: Iterable[Region], always: Sequence[Region] = ()
) -> Iterator[Region]:
    """The regions that are causes of their own.

    Not those that follow from a loss that diverged or from gradients that add up, unless
    ``always`` has them, nor those of layers that no optimizer holds: other rules tell those.
    """
    left = told(result)
    adds_up = judgement.adds_up(
        result.accumulation, result.captures, **judgement.limits(_rules()[1])
    )
    loose = set(result.unoptimized.layers) if result.unoptimized else set()
    for region in regions:
        follows = (left is not None and begins_after(region, left)) or (
            adds_up and {"growth", "level"} & set(region.tests)
        )
        elsewhere = loose.issuperset(region.affected_layers) or _dies(result, region)
        if (not follows or region in always) and not elsewhere:
            yield region


def _dies(result: FlowResult, region: Region) -> bool:
    """Whether what vanishes does so where it is dead, now and then not quite."""
    return region in result.vanishing_regions and any(
        zone.extent.ongoing
        and zone.extent.onset[1] <= region.extent.onset[1]
        and set(zone.affected_layers).issuperset(region.affected_layers)
        for zone in result.dead_zones
    )


def spikes(result: FlowResult) -> list[Spike]:
    """The spikes that are events of their own, the tallest first.

    Not what follows a loss that diverged or has no least value, nor the jump with which an
    explosion begins, nor those of a run of which a step that was too large left nothing.
    """
    if endless(result) or any(shatters(result, zone) for zone in result.dead_zones):
        return []
    left = told(result)
    signs = () if left is None else (left.onset[1], *(sign.onset[1] for sign in left.precursors))
    alone = (
        spike
        for spike in result.spikes
        if spike.step < min(signs, default=math.inf) and not (spike.stayed and spike.left_a_trace)
    )
    return sorted(alone, key=lambda spike: -spike.ratio)
