"""Rules about the size of gradients."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence

from gradscope.flow import judgement
from gradscope.flow.limits import (
    ATTENUATED,
    CRITICAL_RATIO,
    DEPTH_DECADES,
    DEPTH_RATIO,
    MODERATE_RATIO,
    MOVING,
    SEVERE_RATIO,
    SPIKE_RATIO,
    UPDATE_HIGH,
    UPDATE_WILD,
)
from gradscope.flow.result import LEVELS, FlowResult, Need, NonFinite, Region, Spike
from gradscope.flow.rules.say import SEVERITY, own, place, several, since, span, spikes
from gradscope.report.model import Fact
from gradscope.report.rules import Observation, Unknown, rule
from gradscope.report.severity import Severity
from gradscope.text import listed, plural

_STEPS_SHOWN = 5


@rule("F101", "non-finite-gradient", Severity.CRITICAL, reads=FlowResult, needs=Need.NORMS)
def non_finite_gradient(result: FlowResult, *, diverged: float = 20.0) -> Iterator[Observation]:
    """A gradient has NaN or Inf elements on a step that was not skipped.

    The update it makes destroys the weights. Of the layers that turned at the earliest step, the
    origin is the one nearest the loss: the backward pass reaches it first, and every layer behind
    it inherits. A total norm that had grown ``diverged`` times before, or a loss that had left its
    level, means that the run diverged and not that one batch was bad: what is needed then lies
    before that.
    Steps that mixed precision skipped are how a loss scaler works and are reported as info.
    """
    if result.nonfinite:
        yield _non_finite(result, diverged)
    if result.skipped_steps:
        yield Observation(
            "network",
            f"mixed precision skipped {plural(result.skipped_steps, 'step')} of {result.steps:,}",
            "nothing, unless it goes on: a loss scale that never settles hides a real overflow"
            if result.skipped_steps < result.steps
            else "no step was ever made: gradients are infinite at any loss scale it tried, so "
            "look for an overflow in the forward pass, or begin at a lower scale",
            {"skipped_steps": result.skipped_steps, "records": result.steps},
            severity=Severity.INFO,
        )


def _non_finite(result: FlowResult, diverged: float) -> Observation:
    stretches = result.nonfinite
    first, later = stretches[0], len(stretches) - 1
    onset = _diverging(result, first, diverged)
    said = (
        f"gradients are not finite from step {first.step} on, for "
        f"{plural(first.records, 'record')}, beginning at {first.origin or 'the loss'}"
    )
    if first.inherited_by:
        said += f"; inherited by {plural(len(first.inherited_by), 'layer')}"
    if later:
        said += f"; and again {plural(later, 'time')}"
    facts: dict[str, Fact] = {
        "step": first.step,
        "records": first.records,
        "inherited_by": len(first.inherited_by),
        "stretches": len(stretches),
        "loss_nonfinite": str(first.loss_nonfinite).lower(),
    }
    known = {
        "last_finite_step": first.last_finite_step,
        "growth_before": first.growth_before,
        "diverging_since": None if onset is None else since(onset),
    }
    facts |= {name: value for name, value in known.items() if value is not None}
    if onset is not None:
        said += f"; the run had been diverging {since(onset)}"
    advice = _where_to_look(first) if onset is None else _back_before(onset)
    return Observation(first.origin or "loss", said, advice, facts)


def _diverging(
    result: FlowResult, first: NonFinite, diverged: float
) -> tuple[int | None, int] | None:
    """Since when a run had been diverging before its gradients overflowed; None if it had not."""
    left = result.loss.divergence if result.loss else None
    signs: list[tuple[int | None, int]] = []
    if first.growing_since is not None and (first.growth_before or 0) > diverged:
        signs.append(first.growing_since)
    if left is not None and left.onset[1] < first.step:
        signs.append(left.onset)
    return min(signs, key=lambda onset: onset[1], default=None)


def _back_before(onset: tuple[int | None, int]) -> str:
    back = f"go back to a checkpoint of step {onset[0]} or before; " if onset[0] else ""
    return f"{back}lower the learning rate, warm it up, or clip the total norm"


def _where_to_look(first: NonFinite) -> str:
    back = ""
    if first.last_finite_step is not None:
        back = f"go back to a checkpoint of step {first.last_finite_step} or before; "
    if first.loss_nonfinite:
        return (
            f"{back}the loss itself was not finite: look at that batch, and at logs, divisions and "
            "overflow in the forward pass"
        )
    return (
        f"{back}the loss was finite, so look at the backward pass of {first.origin}: a root or "
        "norm at zero, a masked division, overflow in half precision"
    )


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
    for alike in _by_cause(own(result, (r for r in regions if not r.systemic and not _numeric(r)))):
        yield _vanishing(alike, decades, learning)


def _stack(result: FlowResult, regions: Sequence[Region], decades: float) -> Observation:
    layers = _layers(regions)
    worst = _worst(regions)
    rate = math.e ** (result.depth.nats_per_layer if result.depth else 0)
    lost = max((r.peak.value for r in regions if r.peak), default=0.0)
    return Observation(
        place(layers),
        f"the whole stack vanishes: each layer divides the gradient by {rate:.1f}, and "
        f"{plural(len(layers), 'layer')} lie up to {lost:.1f} decades below the loss side, "
        f"{span(worst.extent)}",
        "; ".join(worst.mitigation_suggestions),
        _evidence(worst, len(regions)) | {"factor_per_layer": rate},
        threshold=decades,
        severity=SEVERITY[worst.severity_level],
    )


def _vanishing(regions: Sequence[Region], decades: float, learning: float) -> Observation:
    worst = _worst(regions)
    lost = f" by {worst.peak.value:.1f} decades" if worst.peak else ""
    learns = (
        " (they still learn: the optimizer rescales)"
        if worst.severity_level in ("mild", "moderate") and (worst.update_ratio or 0) > learning
        else ""
    )
    return Observation(
        place(_layers(regions)),
        f"gradients vanish{lost} in {several(_layers(regions))}, {span(worst.extent)}: "
        f"{worst.cause}{learns}{_again(regions)}",
        "; ".join(worst.mitigation_suggestions),
        _evidence(worst, len(regions)),
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


@rule("F103", "exploding-gradient", Severity.HIGH, reads=FlowResult, needs=Need.NORMS)
def exploding_gradient(
    result: FlowResult,
    *,
    mild: float = SPIKE_RATIO,
    moderate: float = MODERATE_RATIO,
    severe: float = SEVERE_RATIO,
    critical: float = CRITICAL_RATIO,
    doubling_moderate: float = 100.0,
    doubling_severe: float = 10.0,
    depth_mild: float = DEPTH_RATIO,
    depth_moderate: float = 1e3,
    depth_severe: float = 1e5,
    update_mild: float = UPDATE_HIGH,
    update_severe: float = UPDATE_WILD,
    update_critical: float = 1.0,
    falling: float = 10.0,
) -> Iterator[Observation]:
    """Gradients or steps grow out of their range and stay there, measured without absolute norms.

    Steady growth by more than four out of the layer's earlier range, a level ten times above it,
    steps of more than a tenth of the weights, or 70 times the loss side's RMS. Low from ``mild``
    times the layer's own level, medium from ``moderate``, high from ``severe``, critical from
    ``critical``; likewise by ``depth_`` times the loss side and by ``update_`` shares of the
    weights, and by growth that doubles the norm within so many steps (``doubling_``). But for
    steps that replace the weights the loss has the last word: while it falls, growth takes
    ``falling`` times as much and is at most high, and the rest is at most low; where it is unknown,
    a tall input side alone is at most medium. Non-finite gradients are left to F101.
    """
    regions = judgement.exploding(
        (region for region in result.exploding_regions if "non-finite" not in region.tests),
        mild=mild,
        moderate=moderate,
        severe=severe,
        critical=critical,
        doubling_moderate=doubling_moderate,
        doubling_severe=doubling_severe,
        depth_mild=depth_mild,
        depth_moderate=depth_moderate,
        depth_severe=depth_severe,
        update_mild=update_mild,
        update_severe=update_severe,
        update_critical=update_critical,
        falling=falling,
    )
    high = [r for r in regions if SEVERITY[r.severity_level].rank >= Severity.HIGH.rank]
    for alike in _by_cause(own(result, regions, always=high)):
        yield _exploding(alike)


def _exploding(regions: Sequence[Region]) -> Observation:
    worst = _worst(regions)
    peak = (
        f", up to {worst.peak.value:.3g} in {worst.peak.layer_name} at step {worst.peak.step}"
        if worst.peak
        else ""
    )
    return Observation(
        place(_layers(regions)),
        f"gradients explode in {several(_layers(regions))}{peak}, {span(worst.extent)}: "
        f"{worst.cause}{_again(regions)}",
        "; ".join(worst.mitigation_suggestions),
        _evidence(worst, len(regions)),
        severity=SEVERITY[worst.severity_level],
    )


@rule("F104", "gradient-spike", Severity.LOW, reads=FlowResult, needs=Need.RECORDS)
def gradient_spike(
    result: FlowResult, *, small: float = MODERATE_RATIO, tall: float = SEVERE_RATIO
) -> Iterator[Observation]:
    """A gradient jumps far above the records before it and comes back.

    Six robust standard deviations and four times the median of the 128 records before (six sigma
    as OLMo-core), or of the last eight where the norm has left its level for another. Heavy-tailed
    gradients do that now and then, so spikes up to ``small`` times the median are info, taller ones
    low, and those above ``tall`` times (SPAM) medium: a spike that leaves no trace is never more.
    One that stays is an exploding gradient, and told as that alone.
    """
    tallest = spikes(result)
    if not tallest:
        return
    worst, count = tallest[0], len(tallest)
    steps = listed((spike.step for spike in tallest), count, _STEPS_SHOWN)
    many = f"{count} spikes, the tallest" if count > 1 else "a spike"
    yield Observation(
        worst.layer_name if worst.layers == 1 else "network",
        f"{many} {worst.ratio:.3g} times the records before (z {worst.z:.1f}), in "
        f"{plural(worst.layers, 'layer')}, most in {worst.layer_name}, at step {worst.step}"
        + (f" (tallest first: {steps})" if count > 1 else "")
        + ("; it has not come back" if worst.stayed else ""),
        "log the batches of these steps; if the loss follows, clip the total norm",
        {"ratio": worst.ratio, "step": worst.step, "z": worst.z, "spikes": count},
        threshold=tall,
        severity=_spike_severity(worst, small, tall),
    )


def _spike_severity(worst: Spike, small: float, tall: float) -> Severity:
    if worst.ratio > tall:
        return Severity.MEDIUM
    return Severity.LOW if worst.ratio > small else Severity.INFO


def _by_cause(regions: Iterable[Region]) -> list[list[Region]]:
    """Regions that one advice answers, wherever and whenever they are."""
    groups: dict[tuple[object, ...], list[Region]] = defaultdict(list)
    for region in regions:
        groups[region.tests, region.mitigation_suggestions].append(region)
    return list(groups.values())


def _layers(regions: Sequence[Region]) -> list[str]:
    return list(dict.fromkeys(name for region in regions for name in region.affected_layers))


def _worst(regions: Sequence[Region]) -> Region:
    return max(regions, key=lambda r: (LEVELS.index(r.severity_level), r.extent.records))


def _again(regions: Sequence[Region]) -> str:
    """How often a place comes back; places that begin at once are one event."""
    times = max(Counter(region.affected_layers for region in regions).values())
    return f"; {times} times in all" if times > 1 else ""


def _evidence(region: Region, times: int) -> dict[str, Fact]:
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
