"""Rules about gradients that are too large, for good or for a moment."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from gradscope.flow import judgement
from gradscope.flow.limits import (
    CRITICAL_RATIO,
    DEPTH_RATIO,
    MODERATE_RATIO,
    SEVERE_RATIO,
    SPIKE_RATIO,
    UPDATE_HIGH,
    UPDATE_WILD,
)
from gradscope.flow.records.events import Spike
from gradscope.flow.records.regions import Region
from gradscope.flow.result import FlowResult, Need
from gradscope.flow.rules.alike import again, by_cause, evidence, layers_of, worst_of
from gradscope.flow.rules.say import SEVERITY, endless, own, place, several, span, spikes
from gradscope.report.rules import Observation, rule
from gradscope.report.severity import Severity
from gradscope.text import listed, plural

_STEPS_SHOWN = 5


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
    a tall input side alone is at most medium. Non-finite gradients are left to F101, and those of a
    loss that falls without a bound to F111.
    """
    if endless(result):
        return
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
    for alike in by_cause(own(result, regions, always=high)):
        yield _exploding(alike)


def _exploding(regions: Sequence[Region]) -> Observation:
    worst = worst_of(regions)
    peak = (
        f", up to {worst.peak.value:.3g} in {worst.peak.layer_name} at step {worst.peak.step}"
        if worst.peak
        else ""
    )
    return Observation(
        place(layers_of(regions)),
        f"gradients explode in {several(layers_of(regions))}{peak}, {span(worst.extent)}: "
        f"{worst.cause}{again(regions)}",
        "; ".join(worst.mitigation_suggestions),
        evidence(worst, len(regions)),
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
