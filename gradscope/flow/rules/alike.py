"""Regions that are one finding: put together by cause, and what is told of them as evidence."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

from gradscope.flow.records.regions import LEVELS, Region
from gradscope.flow.rules.say import since
from gradscope.report.model import Fact


def by_cause(regions: Iterable[Region]) -> list[list[Region]]:
    """Regions that one advice answers, wherever and whenever they are."""
    groups: dict[tuple[str, ...], list[Region]] = defaultdict(list)
    for region in regions:
        groups[region.mitigation_suggestions].append(region)
    return list(groups.values())


def layers_of(regions: Sequence[Region]) -> list[str]:
    """Every layer of some regions, once."""
    return list(dict.fromkeys(name for region in regions for name in region.affected_layers))


def worst_of(regions: Sequence[Region]) -> Region:
    """The most severe of some regions, and of those the longest."""
    return max(regions, key=lambda r: (LEVELS.index(r.severity_level), r.extent.records))


def again(regions: Sequence[Region]) -> str:
    """How often a place comes back; places that begin at once are one event."""
    times = max(Counter(region.affected_layers for region in regions).values())
    return f"; {times} times in all" if times > 1 else ""


def evidence(region: Region, times: int) -> dict[str, Fact]:
    """What is measured of a region that is told for so many."""
    facts: dict[str, Fact] = {
        "tests": ", ".join(region.tests),
        "layers": region.extent.layer_count,
        "records": region.extent.records,
        "onset": since(region.extent.onset),
        "times": times,
    }
    if region.extent.affected_parameters is not None:
        facts["parameters"] = region.extent.affected_parameters
    if region.peak is not None:
        facts |= {
            "peak": region.peak.value,
            "peak_layer": region.peak.layer_name,
            "peak_step": region.peak.step,
        }
    if region.update_ratio is not None:
        facts["update_ratio"] = region.update_ratio
    return facts
