"""Rules about how far the gradient reaches on its way through the network."""

from __future__ import annotations

from collections.abc import Iterator

from gradscope.flow import judgement
from gradscope.flow.limits import BOTTLENECK_DECADES, BOTTLENECK_FROM, SHORTEST_ZONE
from gradscope.flow.result import DeadZone, FlowResult, Missing, Need
from gradscope.flow.rules.say import place, several, span
from gradscope.report.rules import Observation, Unknown, rule
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
    zones ended and a ``share`` of those that reached its age.
    """
    for zone in judgement.dead_zones(
        result.dead_zones,
        records=records,
        recoveries=recoveries,
        share=share,
        outlived=outlived,
    ):
        yield Observation(
            place(zone.affected_layers),
            f"no gradient in {several(zone.affected_layers)} for "
            f"{plural(zone.extent.records, 'record')}, "
            f"{span(zone.extent)}; recovery potential {zone.recovery_potential}",
            _revive(zone),
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


def _dead_severity(zone: DeadZone) -> Severity:
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
            {"bottleneck_score": score, "connectivity": node.connectivity or 0},
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
    detach() cuts it off: it never learns. Layers frozen on purpose are listed as not analysed.
    Gaps in the records are reported as info.
    """
    unused = [m for m in result.missing if m.state == "unused"]
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
    partly = [m for m in result.missing if m.state == "partly"]
    if partly:
        yield _gaps(result, partly)


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
