"""Rules about the size of gradients."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

from gradscope.flow.result import LEVELS, FlowResult, Need, NonFinite, Region, Spike
from gradscope.flow.rules.say import place, plural, severity, since, some, span
from gradscope.report.model import Fact
from gradscope.report.rules import Observation, Unknown, rule
from gradscope.report.severity import Severity


@rule("F101", "non-finite-gradient", Severity.CRITICAL, reads=FlowResult, needs=Need.NORMS)
def non_finite_gradient(result: FlowResult) -> Iterator[Observation]:
    """A gradient has NaN or Inf elements on a step that was not skipped.

    The update it makes destroys the weights. The origin is, of the layers that turned at the
    earliest step, the one nearest the loss: backpropagation reaches it first and every layer
    behind it inherits. Steps that mixed precision skipped are how a loss scaler works and raise
    no more than a note.
    """
    if result.nonfinite:
        yield _non_finite(result.nonfinite)
    if result.skipped_steps:
        yield Observation(
            "network",
            f"mixed precision skipped {plural(result.skipped_steps, 'step')} of {result.steps:,}",
            "nothing, unless it goes on: a loss scale that never settles hides a real overflow",
            {"skipped_steps": result.skipped_steps, "records": result.steps},
            severity=Severity.INFO,
        )


def _non_finite(stretches: Sequence[NonFinite]) -> Observation:
    first, later = stretches[0], len(stretches) - 1
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
    known = {"last_finite_step": first.last_finite_step, "growth_before": first.growth_before}
    facts |= {name: value for name, value in known.items() if value is not None}
    return Observation(first.origin or "loss", said, _where_to_look(first), facts)


#: Grown by this much just before, gradients overflowed because the run diverged.
_DIVERGED = 100.0


def _where_to_look(first: NonFinite) -> str:
    back = ""
    if first.last_finite_step is not None:
        back = f"go back to a checkpoint of step {first.last_finite_step} or before; "
    if (first.growth_before or 0) > _DIVERGED:
        return (
            f"{back}the run diverged (norms had grown {first.growth_before:.2g} times just "
            "before): "
            "lower the learning rate, warm it up, or clip the total norm"
        )
    if first.loss_nonfinite:
        return (
            f"{back}the loss itself was not finite: look at that batch, and at logs, divisions and "
            "overflow in the forward pass"
        )
    return (
        f"{back}the loss was finite, so look at the backward pass of {first.origin}: a root "
        "or norm "
        "at zero, a masked division, overflow in half precision"
    )


@rule("F102", "vanishing-gradient", Severity.HIGH, reads=FlowResult, needs=Need.NORMS)
def vanishing_gradient(result: FlowResult) -> Iterator[Observation | Unknown]:
    """Layers get so little gradient that they do not learn, measured without any absolute norm.

    Three decades below the loss side of their kind (AutoTrainer's 1e-3), steps below 1e-6 of the
    weights while the network moves, three decades below their own earlier level while the network
    is not, or underflow in half precision. A whole stack that loses more than a factor of three a
    layer is one finding. Small gradients of layers that still learn are at most medium, and a
    network whose gradients fall together with its loss converges, which is none.
    """
    if Need.COMPARABLE not in result.measured and not result.vanishing_regions:
        yield Unknown("needs two layers of one kind to compare with each other")
    systemic = [r for r in result.vanishing_regions if r.systemic]
    if systemic:
        yield _stack(result, systemic)
    for regions in _by_place(r for r in result.vanishing_regions if not r.systemic):
        yield _vanishing(regions)


def _stack(result: FlowResult, regions: Sequence[Region]) -> Observation:
    layers = _layers(regions)
    worst = _worst(regions)
    rate = 2.718281828459045 ** (result.depth.nats_per_layer if result.depth else 0)
    lost = max((r.peak.value for r in regions if r.peak), default=0.0)
    return Observation(
        place(layers),
        f"the whole stack vanishes: each layer divides the gradient by {rate:.1f}, and "
        f"{plural(len(layers), 'layer')} lie up to {lost:.1f} decades below the loss side, "
        f"{span(worst.extent)}",
        "; ".join(worst.mitigation_suggestions),
        _evidence(worst, len(regions)) | {"factor_per_layer": rate},
        threshold=3.0,
        severity=severity(worst.severity_level),
    )


def _vanishing(regions: Sequence[Region]) -> Observation:
    worst = _worst(regions)
    lost = f" by {worst.peak.value:.1f} decades" if worst.peak else ""
    learns = (
        " (they still learn: the optimizer rescales)"
        if worst.severity_level in ("mild", "moderate") and (worst.update_ratio or 0) > 1e-5
        else ""
    )
    return Observation(
        place(_layers(regions)),
        f"gradients vanish{lost} in {some(_layers(regions))}, {span(worst.extent)}: "
        f"{worst.cause}{learns}{_again(regions)}",
        "; ".join(worst.mitigation_suggestions),
        _evidence(worst, len(regions)),
        threshold=3.0,
        severity=severity(worst.severity_level),
    )


@rule("F103", "exploding-gradient", Severity.HIGH, reads=FlowResult, needs=Need.NORMS)
def exploding_gradient(result: FlowResult) -> Iterator[Observation]:
    """Gradients or steps grow out of their range and stay there, measured without absolute norms.

    Steady growth by more than four out of the layer's earlier range, a level ten times above it,
    steps of more than a tenth of the weights, or 70 times the loss side's RMS. What follows
    decides: growth under a falling loss is at most low, a tall input side without large steps at
    most medium. Non-finite gradients are F101's.
    """
    own = (r for r in result.exploding_regions if "non-finite" not in r.tests)
    for regions in _by_place(own):
        worst = _worst(regions)
        peak = (
            f", up to {worst.peak.value:.3g} in {worst.peak.layer_name} at step {worst.peak.step}"
            if worst.peak
            else ""
        )
        yield Observation(
            place(_layers(regions)),
            f"gradients explode in {some(_layers(regions))}{peak}, {span(worst.extent)}: "
            f"{worst.cause}{_again(regions)}",
            "; ".join(worst.mitigation_suggestions),
            _evidence(worst, len(regions)),
            severity=severity(worst.severity_level),
        )


@rule("F104", "gradient-spike", Severity.LOW, reads=FlowResult, needs=Need.RECORDS)
def gradient_spike(result: FlowResult, *, tall: float = 50.0) -> Iterator[Observation]:
    """A gradient jumps far above the records before it and comes back.

    Six robust standard deviations and four times the median of the 128 records before (six sigma
    as OLMo-core). Heavy-tailed gradients do that now and then, so small spikes are information,
    those above 10 times low and those above ``tall`` times (SPAM) medium: one that leaves no trace
    is never more. One that stays is an exploding gradient.
    """
    if not result.spikes:
        return
    worst = max(result.spikes, key=lambda s: s.ratio)
    steps = some([str(s.step) for s in sorted(result.spikes, key=lambda s: -s.ratio)], 5)
    count = len(result.spikes)
    many = f"{count} spikes, the tallest" if count > 1 else "a spike"
    yield Observation(
        worst.layer_name if worst.layers == 1 else "network",
        f"{many} {worst.ratio:.3g} times the records before (z {worst.z:.1f}), in "
        f"{plural(worst.layers, 'layer')}, most in {worst.layer_name}, at step {worst.step}"
        + (f" (tallest first: {steps})" if count > 1 else ""),
        "log the batches of these steps; if the loss follows, clip the total norm",
        {"step": worst.step, "ratio": worst.ratio, "z": worst.z, "spikes": count},
        threshold=tall,
        severity=_spike_severity(worst, tall),
    )


def _spike_severity(worst: Spike, tall: float) -> Severity:
    return (
        Severity.MEDIUM
        if worst.ratio > tall
        else Severity.LOW
        if worst.ratio > 10
        else Severity.INFO
    )


def _by_place(regions: Iterator[Region]) -> list[list[Region]]:
    """Regions of one cause: the same layers again and again, or single ones alike at once."""
    groups: dict[tuple[object, ...], list[Region]] = defaultdict(list)
    for region in regions:
        place: tuple[object, ...] = region.affected_layers
        if len(place) == 1:
            place = (region.severity_level, region.extent.onset, region.extent.end)
        groups[region.tests, region.mitigation_suggestions, place].append(region)
    return list(groups.values())


def _layers(regions: Sequence[Region]) -> list[str]:
    return list(dict.fromkeys(name for region in regions for name in region.affected_layers))


def _worst(regions: Sequence[Region]) -> Region:
    return max(regions, key=lambda r: (LEVELS.index(r.severity_level), r.extent.records))


def _again(regions: Sequence[Region]) -> str:
    times = len({region.extent.onset for region in regions})
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
