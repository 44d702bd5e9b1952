"""Rules about gradients that are too small: for learning, and for their type."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from gradscope.flow import judgement
from gradscope.flow.limits import ATTENUATED, DEPTH_DECADES, MOVING
from gradscope.flow.records.regions import Region
from gradscope.flow.result import FlowResult, Need
from gradscope.flow.rules.alike import again, by_cause, evidence, layers_of, worst_of
from gradscope.flow.rules.say import SEVERITY, own, place, several, span
from gradscope.report.rules import Observation, Unknown, rule
from gradscope.report.severity import Severity
from gradscope.text import plural


@rule("F102", "vanishing-gradient", Severity.HIGH, reads=FlowResult, needs=Need.NORMS)
def vanishing_gradient(
    result: FlowResult,
    *,
    decades: float = DEPTH_DECADES,
    moderate: float = 4.0,
    severe: float = 5.0,
    critical: float = 6.0,
    learning: float = MOVING,
    attenuated: float = ATTENUATED,
    faint: float = 0.01,
) -> Iterator[Observation | Unknown]:
    """Layers get so little gradient that they do not learn, measured without any absolute norm.

    They lie three ``decades`` below the loss side of their kind (AutoTrainer's 1e-3), their steps
    are below 1e-6 of the weights while the network moves, they lie three decades below their own
    earlier level while the network does not, or they underflow in half precision. Medium from
    ``moderate`` decades, high from ``severe``, critical from ``critical`` or where epsilon leaves
    less than ``faint`` of an adaptive step. Layers that still learn (updates above ``learning``,
    or more than ``attenuated`` of the step left) are at most medium. A whole stack that loses more
    than a factor of three a layer is one finding, at least high. A network whose gradients fall
    together with its loss converges, which is not a finding.
    """
    if Need.COMPARABLE not in result.measured and not result.vanishing_regions:
        yield Unknown("needs two layers of one kind to compare with each other")
    regions = judgement.vanishing(
        result.vanishing_regions,
        decades=decades,
        moderate=moderate,
        severe=severe,
        critical=critical,
        learning=learning,
        attenuated=attenuated,
        faint=faint,
    )
    systemic = [region for region in regions if region.systemic]
    if systemic:
        yield _stack(result, systemic, decades)
    for alike in by_cause(own(result, (r for r in regions if not r.systemic and not _numeric(r)))):
        yield _vanishing(alike, decades, learning)


def _stack(result: FlowResult, regions: Sequence[Region], decades: float) -> Observation:
    layers = layers_of(regions)
    worst = worst_of(regions)
    rate = math.e ** (result.depth.nats_per_layer if result.depth else 0)
    lost = max((r.peak.value for r in regions if r.peak), default=0.0)
    return Observation(
        place(layers),
        f"the whole stack vanishes: each layer divides the gradient by {rate:.1f}, and "
        f"{plural(len(layers), 'layer')} lie up to {lost:.1f} decades below the loss side, "
        f"{span(worst.extent)}",
        "; ".join(worst.mitigation_suggestions),
        evidence(worst, len(regions)) | {"factor_per_layer": rate},
        threshold=decades,
        severity=SEVERITY[worst.severity_level],
    )


def _vanishing(regions: Sequence[Region], decades: float, learning: float) -> Observation:
    worst = worst_of(regions)
    lost = f" by {worst.peak.value:.1f} decades" if worst.peak else ""
    learns = (
        " (they still learn: the optimizer rescales)"
        if worst.severity_level in ("mild", "moderate") and (worst.update_ratio or 0) > learning
        else ""
    )
    return Observation(
        place(layers_of(regions)),
        f"gradients vanish{lost} in {several(layers_of(regions))}, {span(worst.extent)}: "
        f"{worst.cause}{learns}{again(regions)}",
        "; ".join(worst.mitigation_suggestions),
        evidence(worst, len(regions)),
        threshold=decades,
        severity=SEVERITY[worst.severity_level],
    )


def _numeric(region: Region) -> bool:
    return "numeric" in region.tests


@rule("F113", "underflow", Severity.MEDIUM, reads=FlowResult, needs=Need.NORMS)
def underflow(result: FlowResult) -> Iterator[Observation]:
    """Float16 gradients are too small for their type: more than half of the elements are zero.

    Or their RMS lies within ten times its smallest normal number (6e-5). What is zero then is lost
    to rounding and no dead unit. High where whole layers have no gradient left.
    """
    regions = [region for region in result.vanishing_regions if _numeric(region)]
    zones = [zone for zone in result.dead_zones if zone.facts and zone.facts.underflowed]
    extents = [*(r.extent for r in regions), *(zone.extent for zone in zones)]
    if not extents:
        return
    places = [*(r.affected_layers for r in regions), *(zone.affected_layers for zone in zones)]
    layers = list(dict.fromkeys(name for place_ in places for name in place_))
    gone = {name for zone in zones for name in zone.affected_layers}
    lost = f"; nothing is left in {several(sorted(gone, key=layers.index))}" if gone else ""
    yield Observation(
        place(layers),
        f"float16 gradients underflow in {several(layers)}, "
        f"{span(min(extents, key=lambda extent: extent.onset[1]))}{lost}",
        "use a gradient scaler (a larger loss scale), or bfloat16",
        {"layers": len(layers), "layers_without_gradient": len(gone)},
        severity=Severity.HIGH if gone else Severity.MEDIUM,
    )
