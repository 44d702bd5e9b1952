"""Rules about the way of the gradient through the network."""

from __future__ import annotations

from collections.abc import Iterator

from gradscope.flow.result import DeadZone, FlowResult, Missing, Need
from gradscope.flow.rules.say import place, plural, some, span
from gradscope.report.rules import Observation, Unknown, rule
from gradscope.report.severity import Severity


@rule("F105", "dead-zone", Severity.HIGH, reads=FlowResult, needs=Need.NORMS)
def dead_zone(result: FlowResult) -> Iterator[Observation]:
    """Adjacent layers get a gradient of zero, or none at all, for five records and more.

    High when it lasts and nothing in the run says that it will end (no earlier recovery, no unit
    alive); medium when it lasts but such zones have ended before; low when it is over.
    """
    for zone in result.dead_zones:
        yield Observation(
            place(zone.affected_layers),
            f"no gradient in {some(zone.affected_layers)} for "
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
            threshold=5.0,
            severity=_dead_severity(zone),
        )


def _dead_severity(zone: DeadZone) -> Severity:
    if zone.intervention_required:
        return Severity.HIGH
    return (
        Severity.MEDIUM
        if zone.extent.ongoing and zone.recovery_potential != "high"
        else Severity.LOW
    )


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
    result: FlowResult, *, decades: float = 2.0, criticality: float = 0.5
) -> Iterator[Observation | Unknown]:
    """A layer's gradient lies far below both its neighbours', or a path hangs on it.

    Low from one decade below both neighbours, medium from ``decades``; medium as well where the
    only way to a layer (``criticality``, from the recorded topology) has a link that ``decades``
    below the others.
    """
    if result.topology == "assumed-chain":
        yield Unknown(
            "ways around a link need a topology; layers are compared in their order alone"
        )
    vanished = {name for r in result.vanishing_regions for name in r.affected_layers}
    dead = {name for zone in result.dead_zones for name in zone.affected_layers}
    scores = {layer.layer_name: layer.bottleneck_score for layer in result.layers}
    for node in result.network.nodes:
        score = scores.get(node.layer_name)
        if node.condition != "bottleneck" or score is None or node.layer_name in vanished | dead:
            continue
        below = 3 * score
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
    seen: set[tuple[str, str]] = set()
    for path in result.critical_paths:
        weak, hard, potential = (
            path.weakest_link,
            path.criticality_score,
            path.optimization_potential,
        )
        if weak is None or weak in seen or set(weak) & (vanished | dead):
            continue
        if (
            hard is not None
            and potential is not None
            and hard > criticality
            and potential >= decades
        ):
            seen.add(weak)
            yield Observation(
                f"{weak[0]} → {weak[1]}",
                f"the only wide way of the gradient to {path.layers[-1]} passes this link, "
                "which carries "
                f"{potential:.1f} decades less than the median one",
                "add a way around it (a residual connection), or find what attenuates there",
                {
                    "criticality_score": hard,
                    "optimization_potential": potential,
                    "path_length": path.path_length,
                },
                threshold=criticality,
            )


@rule("F110", "missing-gradient", Severity.MEDIUM, reads=FlowResult, needs=Need.NORMS)
def missing_gradient(result: FlowResult) -> Iterator[Observation]:
    """A layer that requires a gradient never gets one, or the file leaves records of it out.

    None at every record means that the forward pass does not use the parameter, or a detach() cuts
    it off: it never learns. Layers frozen on purpose are listed as not analysed. Gaps in the
    records are information.
    """
    unused = [m for m in result.missing if m.state == "unused"]
    if unused:
        names = [m.layer_name for m in unused]
        yield Observation(
            place(names),
            f"no gradient at any of {plural(result.steps, 'record')} though one is "
            f"required: {some(names)}",
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
