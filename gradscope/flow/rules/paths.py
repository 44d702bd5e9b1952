"""Rules about how far the gradient reaches on its way through the network."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace

from gradscope.flow import judgement
from gradscope.flow.limits import BOTTLENECK_DECADES, BOTTLENECK_FROM, SHORTEST_ZONE
from gradscope.flow.result import DeadZone, FlowResult, Missing, Need
from gradscope.flow.rules.say import follows, place, several, span
from gradscope.report.rules import Observation, Unknown, rule
from gradscope.report.severity import Severity
from gradscope.text import listed, plural


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
    constant = result.loss.constant if result.loss else None
    told = [zone for zone in zones if not _told_elsewhere(result, zone, idle)]
    passing = [zone for zone in told if _dead_severity(zone) is Severity.LOW]
    for zone in told:
        if zone not in passing:
            yield _zone(zone, constant, records)
    if passing:
        yield _passing(passing, constant, records)


def _told_elsewhere(result: FlowResult, zone: DeadZone, idle: frozenset[str]) -> bool:
    """Experts that idle, gradients that underflow and losses that diverge have their own rules."""
    underflowed = zone.facts is not None and zone.facts.underflowed
    return idle.issuperset(zone.affected_layers) or underflowed or follows(result, zone)


def _zone(zone: DeadZone, constant: float | None, records: int) -> Observation:
    cause, remedy = _cause(zone, constant)
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


def _passing(zones: list[DeadZone], constant: float | None, records: int) -> Observation:
    """Zones that ended, or will, as one: the longest is told, and how many there were."""
    longest = max(zones, key=lambda zone: zone.extent.records)
    found = _zone(longest, constant, records)
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


@rule("F108", "bottleneck", Severity.MEDIUM, reads=FlowResult, needs=Need.NORMS)
def bottleneck(
    result: FlowResult,
    *,
    low: float = BOTTLENECK_FROM,
    decades: float = 2.0,
    criticality: float = 0.5,
) -> Iterator[Observation | Unknown]:
    """A layer's gradient lies far below both its neighbours', or a path hangs on it.

    Low from ``low`` decades below both neighbours, medium from ``decades``. Medium as well where
    the only way to a layer (its ``criticality``, from the recorded topology) has a link that
    carries ``decades`` less than the others. Layers that vanish or are dead are left to F102 and
    F105.
    """
    if result.topology == "assumed-chain":
        yield Unknown(
            "paths around a link need a topology; layers are compared by their order alone"
        )
    known = {name for region in result.vanishing_regions for name in region.affected_layers}
    known |= {name for zone in result.dead_zones for name in zone.affected_layers}
    yield from _narrow_layers(result, known, low, decades)
    yield from _narrow_links(result, known, decades, criticality)


def _narrow_layers(
    result: FlowResult, known: set[str], low: float, decades: float
) -> Iterator[Observation]:
    scores = {layer.layer_name: layer.bottleneck_score for layer in result.layers}
    for node in result.network.nodes:
        score = scores.get(node.layer_name)
        if node.condition != "bottleneck" or score is None or node.layer_name in known:
            continue
        below = BOTTLENECK_DECADES * score
        if below < low:
            continue
        yield Observation(
            node.layer_name,
            f"its RMS gradient lies {'at least ' if score >= 1 else ''}{below:.1f} decades "
            "below both neighbours",
            "look at what it multiplies: a tiny gain or initial scale, a saturated "
            "activation behind it",
            {
                "decades": below,
                "bottleneck_score": score,
                "connectivity": node.connectivity or 0,
            },
            threshold=decades,
            severity=Severity.MEDIUM if below >= decades else Severity.LOW,
        )


def _narrow_links(
    result: FlowResult, known: set[str], decades: float, criticality: float
) -> Iterator[Observation]:
    seen: set[tuple[str, str]] = set()
    for path in result.critical_paths:
        weak, lost = path.weakest_link, path.optimization_potential
        hangs = path.criticality_score is not None and path.criticality_score > criticality
        if weak is None or weak in seen or set(weak) & known:
            continue
        if not hangs or lost is None or lost < decades:
            continue
        seen.add(weak)
        yield Observation(
            f"{weak[0]} → {weak[1]}",
            f"the only wide path of the gradient to {path.layers[-1]} leads over this link, which "
            f"carries {lost:.1f} decades less than the median one",
            "add a path around it (a residual connection), or find what attenuates there",
            {
                "criticality_score": path.criticality_score or 0.0,
                "optimization_potential": lost,
                "path_length": path.path_length,
            },
            threshold=criticality,
        )


@rule("F110", "missing-gradient", Severity.MEDIUM, reads=FlowResult, needs=Need.NORMS)
def missing_gradient(result: FlowResult) -> Iterator[Observation]:
    """A layer that requires a gradient never gets one, or the file leaves out records of it.

    None at every record means that the forward pass does not use the parameter, or that a
    detach() cuts it off: it never learns. Experts that get none while others do are one finding,
    also where they had one before: their router has collapsed. Frozen layers, with their share of
    the parameters, and gaps in the records are info.
    """
    idle = idle_layers(result)
    for name, experts in _idle_experts(result).items():
        yield _idle(name, experts, result)
    unused = [m for m in result.missing if m.state == "unused" and m.layer_name not in idle]
    if unused:
        names = [m.layer_name for m in unused]
        yield Observation(
            place(names),
            f"no gradient at any of {plural(result.steps, 'record')} though one is "
            f"required: {several(names)}",
            "the forward pass does not use these parameters or a detach() cuts them off; use them, "
            "or set requires_grad to False",
            {
                "layers": len(names),
                "records": result.steps,
                "parameters": sum(m.numel or 0 for m in unused),
            },
        )
    if frozen := [m for m in result.missing if m.state == "frozen"]:
        yield _frozen(result, frozen)
    dead = {name for zone in result.dead_zones for name in zone.affected_layers}
    told = idle | dead
    if partly := [m for m in result.missing if m.state == "partly" and m.layer_name not in told]:
        yield _gaps(result, partly)


def _frozen(result: FlowResult, frozen: list[Missing]) -> Observation:
    names = [m.layer_name for m in frozen]
    total = sum(layer.numel or 0 for layer in result.layers)
    share = sum(m.numel or 0 for m in frozen) / total if total else len(names) / len(result.layers)
    return Observation(
        place(names),
        f"{plural(len(names), 'layer')} with {share:.0%} of the parameters "
        f"{'is' if len(names) == 1 else 'are'} frozen: {several(names)}",
        "nothing if that is meant; else set requires_grad before the optimizer is made",
        {"layers": len(names), "share_of_parameters": share},
        severity=Severity.INFO,
    )


#: A layer of one expert of several: what they belong to, and which one it is.
_EXPERT = re.compile(r"^(.*?experts?)[._/]?(\d+)(?=[._/]|$)", re.IGNORECASE)


def _idle_experts(result: FlowResult) -> dict[str, list[int]]:
    """Experts without any gradient at the end, by what they belong to, where others have one."""
    silent = {m.layer_name for m in result.missing if m.state == "unused"}
    silent |= {
        name for zone in result.dead_zones if zone.extent.ongoing for name in zone.affected_layers
    }
    layers: dict[tuple[str, int], list[str]] = defaultdict(list)
    for layer in result.layers:
        if match := _EXPERT.match(layer.layer_name):
            layers[match[1], int(match[2])].append(layer.layer_name)
    idle: dict[str, list[int]] = defaultdict(list)
    for (name, index), parts in layers.items():
        if silent.issuperset(parts):
            idle[name].append(index)
    return {
        name: found
        for name, found in idle.items()
        if len(found) < sum(parent == name for parent, _ in layers)
    }


def idle_layers(result: FlowResult) -> frozenset[str]:
    """The layers of experts that get no gradient while others do."""
    idle = _idle_experts(result)
    matches = ((layer.layer_name, _EXPERT.match(layer.layer_name)) for layer in result.layers)
    return frozenset(name for name, m in matches if m and int(m[2]) in idle.get(m[1], ()))


def _idle(name: str, experts: list[int], result: FlowResult) -> Observation:
    matches = (_EXPERT.match(layer.layer_name) for layer in result.layers)
    total = len({match[2] for match in matches if match and match[1] == name})
    return Observation(
        name,
        f"{len(experts)} of {total} experts get no gradient at the end: "
        f"{listed([f'{name}.{i}' for i in experts], len(experts), 8)}",
        "the router does not choose them: add a load-balancing loss or noise to the router, and "
        "look at how many tokens each expert gets",
        {"idle_experts": len(experts), "experts": total},
    )


def _gaps(result: FlowResult, partly: list[Missing]) -> Observation:
    names = [m.layer_name for m in partly]
    most = max(partly, key=lambda m: m.records)
    return Observation(
        place(names),
        f"{plural(len(names), 'layer')} without a gradient at some records, most {most.layer_name} "
        f"({most.records} of {result.steps})",
        "expected of layers frozen for a while, unfrozen late, or used by some batches only",
        {"layers": len(names), "records": most.records},
        severity=Severity.INFO,
    )
