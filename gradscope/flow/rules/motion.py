"""Rules about how the network moves."""

from __future__ import annotations

from collections.abc import Iterator

from gradscope.flow.limits import LOSS_LEVEL, STANDSTILL, UPDATE_HIGH, UPDATE_WARN, UPDATE_WILD
from gradscope.flow.records.steps import Leap, LearningRateAdvice, Oscillation, Standstill
from gradscope.flow.result import FlowResult, Need
from gradscope.flow.rules.say import (
    endless,
    overwrites,
    place,
    several,
    severity_of,
    shatters,
    since,
    told,
)
from gradscope.report.model import Fact
from gradscope.report.rules import Observation, Unknown, rule
from gradscope.report.severity import Severity
from gradscope.text import plural


@rule("F106", "oscillation", Severity.MEDIUM, reads=FlowResult, needs=Need.RECORDS)
def oscillation(
    result: FlowResult, *, opposed: float = -0.5, most: float = 0.5, growing: float = 0.005
) -> Iterator[Observation | Unknown]:
    """Successive gradients oppose each other: steps overshoot.

    For gradient descent on a quadratic the cosine of successive gradients is -1 exactly when the
    learning rate times the curvature exceeds 1, which diverges from 2 on: the sign shows it before
    the loss does. Low, because sampling without replacement gives a network near its optimum a
    cosine slightly below zero; medium when the cosine is below ``opposed`` for ``most`` of the
    parameters, high when their norms also grow by more than ``growing`` nats a step.
    """
    if Need.DIRECTIONS not in result.measured and not result.oscillation:
        yield Unknown("needs directions (sketches or cosines); norms alone show only gross swings")
    if result.oscillation:
        judged = [(_severity(o, opposed, most, growing), o) for o in result.oscillation]
        severity, worst = max(judged, key=lambda pair: (pair[0].rank, pair[1].share_of_layers))
        yield _oscillation(result, worst, severity, opposed, most)


def _severity(o: Oscillation, opposed: float, most: float, growing: float) -> Severity:
    if o.cosine is None or o.cosine >= opposed or o.share_of_layers < most:
        return Severity.LOW
    grows = o.growth_per_step is not None and o.growth_per_step > growing
    return Severity.HIGH if grows else Severity.MEDIUM


def _oscillation(
    result: FlowResult, o: Oscillation, severity: Severity, opposed: float, most: float
) -> Observation:
    cosine = f"mean cosine {o.cosine:.2f}" if o.cosine is not None else "alternating norms"
    growth = (
        f", growing {o.growth_per_step:+.3g} nats a step" if (o.growth_per_step or 0) > 0 else ""
    )
    facts: dict[str, Fact] = {"layers": len(o.layers), "share": o.share_of_layers, "basis": o.basis}
    facts |= {
        k: v
        for k, v in (("cosine", o.cosine), ("growth_per_step", o.growth_per_step))
        if v is not None
    }
    advice = result.learning_rate
    if advice is not None and advice.divide_by is not None:
        facts["divide_learning_rate_by"] = advice.divide_by
    return Observation(
        "network" if o.share_of_layers >= most else o.layers[0],
        f"successive gradients oppose each other ({cosine}{growth}) in {several(o.layers)}, "
        f"{since(o.onset)}" + (", to the end" if o.ongoing else ""),
        _lower(advice),
        facts,
        threshold=opposed,
        severity=severity,
    )


def _lower(advice: LearningRateAdvice | None) -> str:
    if advice is None:
        return "lower the learning rate if the loss does not fall, or average over larger batches"
    if advice.divide_by is None:
        return "lower the learning rate; " + advice.why
    to = f" (to {advice.suggested:.3g})" if advice.suggested is not None else ""
    return f"divide the learning rate by {advice.divide_by:.3g}{to}: {advice.why}"


@rule("F107", "stagnation", Severity.MEDIUM, reads=FlowResult, needs=Need.RECORDS)
def stagnation(result: FlowResult, *, still: float = STANDSTILL) -> Iterator[Observation | Unknown]:
    """The network no longer moves at the end of the history.

    Steps below ``still`` of the weights or none at all, a gradient below the optimizer's epsilon,
    or gradients that repeat to the bit, for eight records (a quarter of short histories). Gradients
    that fell with the loss have converged, which is info. High where the gradients fell by three
    decades and the loss did not: the run is starved.
    """
    if Need.UPDATES not in result.measured and result.stagnation is None:
        yield Unknown("needs update norms; without them only gradients that repeat are seen")
    found = result.stagnation
    if found is None or _explained(result) or (found.fastest or 0) >= still:
        return
    slow = f"steps change the weights by less than {still:g} of their norm"
    reasons = {
        "update": slow,
        "rate": "the learning rate is 0",
        "unstepped": f"in {plural(result.captures.calls, 'capture')} the optimizer never stepped"
        if result.captures
        else "the optimizer never stepped",
        "unmoved": "no step changes any weight, though there are gradients",
        "schedule": f"the learning rate fell to a thousandth and less; {slow}",
        "starved": f"gradients fell by three decades and more; {slow}",
        "rounded": "steps are rounded away: half-precision weights do not change at all",
        "epsilon": "the optimizer's epsilon outweighs the gradients",
        "repeats": "every gradient norm repeats to the bit",
    }
    yield Observation(
        "network",
        f"the network stands still {since(found.onset)}: {reasons[found.reason]}"
        + ("; it has converged" if found.converged else ""),
        "stop here" if found.converged else _MOVE[found.reason],
        {"reason": found.reason, "converged": str(found.converged).lower()}
        | ({} if found.update_ratio is None else {"update_ratio": found.update_ratio}),
        threshold=still,
        severity=Severity.INFO
        if found.converged
        else Severity.HIGH
        if found.reason == "starved"
        else Severity.MEDIUM,
    )


def _explained(result: FlowResult) -> bool:
    """Most of a stack that vanishes or died before, a lasting dead zone and epsilon have rules of
    their own.
    """
    if result.unoptimized and result.unoptimized.share == 1:
        return True
    damped = result.damping is not None and result.damping.share > 0.5
    if result.stagnation and result.stagnation.reason == "epsilon" and damped:
        return True
    starved = {
        name
        for region in result.vanishing_regions
        if region.extent.ongoing and region.severity_level in ("severe", "critical")
        for name in region.affected_layers
    }
    since_ = result.stagnation.onset[1] if result.stagnation else 0
    died = {
        name
        for zone in result.dead_zones
        if zone.extent.ongoing
        and zone.extent.onset[1] <= since_
        and not (zone.facts is not None and zone.facts.learnt)
        for name in zone.affected_layers
    }
    most = 2 * len(starved | died) > len(result.layers)
    return (
        most
        or any(r.systemic and r.extent.ongoing for r in result.vanishing_regions)
        or any(zone.intervention_required for zone in result.dead_zones)
    )


#: What to do about a network that stands still, by reason.
_MOVE: dict[Standstill, str] = {
    "update": "raise the learning rate; if it is what it should be, look at what shortens the "
    "steps: a clipping limit, or gradients that are clipped before they are unscaled",
    "rate": "set it; a warm-up that begins at 0 has to be stepped at every batch",
    "unstepped": "call optimizer.step() after backward(), and give the recorder the optimizer that "
    "steps",
    "unmoved": "are gradients zeroed between backward() and optimizer.step() (zero_grad() in the "
    "wrong place), or the learning rate too small for the weights' type?",
    "schedule": "check the schedule: is a scheduler meant for epochs stepped at every batch?",
    "starved": "the loss saturates: use one that works on logits, and look at what its gradient "
    "passes first (a sigmoid or softmax at its limit; in a GAN, a discriminator that has won)",
    "rounded": "keep float32 master weights (mixed precision), or use stochastic rounding",
    "epsilon": "lower epsilon or scale the loss up",
    "repeats": "is optimizer.step() called, and are these the parameters the optimizer holds?",
}


@rule("F109", "update-ratio", Severity.LOW, reads=FlowResult, needs=Need.UPDATES)
def update_ratio(
    result: FlowResult,
    *,
    low: float = UPDATE_WARN,
    high: float = UPDATE_HIGH,
    wild: float = UPDATE_WILD,
    leap: float = 1.0,
    share: float = 0.05,
) -> Iterator[Observation]:
    """The median step of a layer changes it by more than a twentieth of its norm.

    About 1e-3 is usual. Low above ``low`` (neurolens's upper band); where layers above ``high``
    hold a ``share`` of the parameters, medium, and high above ``wild``: such weights are replaced
    rather than trained. A single step at which the median layer changes by more than ``leap`` of
    its norm is medium, also among the first, where no median shows it.
    """
    if endless(result):
        return
    found = sorted((u for u in result.update_ratios if u.median > low), key=lambda u: -u.median)
    if not found:
        fatal = any(shatters(result, zone) for zone in result.dead_zones)
        known = fatal or told(result) is not None
        if result.leap is not None and result.leap.ratio > leap and not known:
            yield _leap(result.leap, leap)
        return
    total = sum(layer.numel or 0 for layer in result.layers)
    worst = found[0]
    pushed = sum(u.numel or 0 for u in found if u.median > high) / total if total else 1.0
    yield Observation(
        worst.layer_name if len(found) == 1 else "network",
        f"the median step changes {plural(len(found), 'layer')} by more than {low:.0%} of the "
        f"weights: {several([u.layer_name for u in found])} (most {worst.median:.2g}, peak "
        f"{worst.peak:.2g} at step {worst.step})",
        "lower the learning rate of these layers, or warm it up; zero-initialised layers "
        "settle by themselves",
        {
            "median": worst.median,
            "peak": worst.peak,
            "layers": len(found),
            "share_of_parameters": pushed,
        },
        threshold=high,
        severity=Severity.LOW
        if pushed < share or worst.median <= high
        else Severity.HIGH
        if worst.median > wild
        else Severity.MEDIUM,
    )


def _leap(found: Leap, limit: float) -> Observation:
    return Observation(
        "network",
        f"the step of record {found.step} changes the median layer by {found.ratio:.0%} of its "
        "norm: what was there is gone",
        "warm the learning rate up" if found.first else "log what that step's batch was",
        {"ratio": found.ratio, "step": found.step},
        threshold=limit,
        severity=Severity.MEDIUM,
    )


@rule("F117", "overwritten-weights", Severity.MEDIUM, reads=FlowResult, needs=Need.UPDATES)
def overwritten_weights(result: FlowResult, *, level: float = LOSS_LEVEL) -> Iterator[Observation]:
    """Most weights changed further between two records than the steps of the optimizer explain.

    The norm of weights cannot change by more than the norm of the step: something else wrote into
    them. A checkpoint or an average that was loaded, a second initialisation, a resumed run that
    begins from other weights. Medium where the loss then is ``level`` times as high, and as high as
    the loss that does not come back; else info, as pruned or clipped weights are meant to change.
    """
    found = result.overwritten
    if found is None:
        return
    harmful = (found.loss_factor or 0) >= level
    after = f"; the loss is {found.loss_factor:.3g} times as high after it" if harmful else ""
    again = f"; {found.times} times in all" if found.times > 1 else ""
    yield Observation(
        place(found.layers),
        f"weights were overwritten between steps {found.onset[0]} and {found.onset[1]}: the norms "
        f"of {several(found.layers)} changed by {found.change:.0%}, further than the optimizer's "
        f"steps{after}{again}",
        "look at what is loaded or initialised there: a checkpoint of another step, averaged "
        "weights that were not swapped back, a resume that did not restore the model"
        if harmful
        else "nothing if that is meant (pruning, clipped or normalised weights)",
        {"change": found.change, "step": found.onset[1], "times": found.times}
        | ({} if found.loss_factor is None else {"loss_factor": found.loss_factor}),
        severity=_harm(result) if harmful else Severity.INFO,
    )


def _harm(result: FlowResult) -> Severity:
    """As severe as what the loss did from there on, and medium where it has come back."""
    rose = told(result)
    course = severity_of(rose) if rose and overwrites(result, rose) else Severity.MEDIUM
    return max(course, Severity.MEDIUM, key=lambda severity: severity.rank)
