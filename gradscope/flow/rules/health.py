"""Rules about how the network moves."""

from __future__ import annotations

from collections.abc import Iterator

from gradscope.flow.result import FlowResult, LearningRateAdvice, Need, Oscillation
from gradscope.flow.rules.say import plural, since, some
from gradscope.report.model import Fact
from gradscope.report.rules import Observation, Unknown, rule
from gradscope.report.severity import Severity


@rule("F106", "oscillation", Severity.MEDIUM, reads=FlowResult, needs=Need.RECORDS)
def oscillation(
    result: FlowResult, *, opposed: float = -0.5, most: float = 0.5
) -> Iterator[Observation | Unknown]:
    """Successive gradients oppose each other: steps overshoot.

    For gradient descent on a quadratic the cosine of successive gradients is -1 exactly when the
    learning rate times the curvature exceeds 1, which diverges from 2 on: the sign shows it before
    the loss does. High when most parameters oscillate below ``opposed`` and their gradients grow,
    medium when they do not grow, low otherwise; a cosine slightly below zero is what sampling
    without replacement gives a network near its optimum.
    """
    if Need.DIRECTIONS not in result.measured and not result.oscillation:
        yield Unknown("needs directions (sketches or cosines); norms alone show only gross swings")
    if result.oscillation:
        worst = max(result.oscillation, key=lambda o: _order(o, opposed, most))
        yield _oscillation(result, worst, opposed, most)


def _order(o: Oscillation, opposed: float, most: float) -> tuple[int, float]:
    return _oscillating(o, opposed, most).rank, o.share_of_layers


def _oscillating(o: Oscillation, opposed: float, most: float) -> Severity:
    strong = o.cosine is not None and o.cosine < opposed and o.share_of_layers >= most
    if not strong:
        return Severity.LOW
    growing = o.growth_per_step is not None and o.growth_per_step > 0.005
    return Severity.HIGH if growing else Severity.MEDIUM


def _oscillation(result: FlowResult, o: Oscillation, opposed: float, most: float) -> Observation:
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
        f"successive gradients oppose each other ({cosine}{growth}) in {some(o.layers)}, "
        f"{since(o.onset)}" + (", to the end" if o.ongoing else ""),
        _lower(advice),
        facts,
        threshold=opposed,
        severity=_oscillating(o, opposed, most),
    )


def _lower(advice: LearningRateAdvice | None) -> str:
    if advice is None:
        return "lower the learning rate if the loss does not fall, or average over larger batches"
    if advice.divide_by is None:
        return "lower the learning rate; " + advice.why
    to = f" (to {advice.suggested:.3g})" if advice.suggested is not None else ""
    return f"divide the learning rate by {advice.divide_by:.3g}{to}: {advice.why}"


@rule("F107", "stagnation", Severity.MEDIUM, reads=FlowResult, needs=Need.RECORDS)
def stagnation(result: FlowResult, *, still: float = 1e-6) -> Iterator[Observation | Unknown]:
    """The network no longer moves at the end of the history.

    Steps below ``still`` of the weights, a gradient below the optimizer's epsilon, or gradients
    that repeat to the bit, for eight records. When its gradients fell with its loss it converged,
    which is information.
    """
    if Need.UPDATES not in result.measured and result.stagnation is None:
        yield Unknown("needs update norms; without them only gradients that repeat are seen")
    found = result.stagnation
    if found is None or _explained(result):
        return
    reasons = {
        "update": f"steps change the weights by less than {still:g} of their norm",
        "epsilon": "the optimizer's epsilon outweighs the gradients",
        "repeats": "every gradient norm repeats to the bit",
    }
    yield Observation(
        "network",
        f"the network stands still {since(found.onset)}: {reasons[found.reason]}"
        + ("; it has converged" if found.converged else ""),
        "stop here" if found.converged else _move(found.reason),
        {"reason": found.reason, "converged": str(found.converged).lower()}
        | ({} if found.update_ratio is None else {"update_ratio": found.update_ratio}),
        threshold=still,
        severity=Severity.INFO if found.converged else Severity.MEDIUM,
    )


def _explained(result: FlowResult) -> bool:
    """A stack that vanishes or a lasting dead zone stands still for its own reason."""
    return any(r.systemic and r.extent.ongoing for r in result.vanishing_regions) or any(
        zone.intervention_required for zone in result.dead_zones
    )


def _move(reason: str) -> str:
    if reason == "repeats":
        return "is optimizer.step() called, and are these the parameters the optimizer holds?"
    if reason == "epsilon":
        return "lower epsilon or scale the loss up"
    return "raise the learning rate, or look at the schedule: is it at zero?"


@rule("F109", "update-ratio", Severity.LOW, reads=FlowResult, needs=Need.UPDATES)
def update_ratio(
    result: FlowResult, *, high: float = 0.1, wild: float = 0.5
) -> Iterator[Observation]:
    """The median step of a layer changes it by more than a twentieth of its norm.

    About 1e-3 is usual. Low from 0.05, medium above ``high`` (half of which is neurolens's upper
    band) for a twentieth of the parameters and more, high above ``wild``: such weights are
    replaced rather than trained.
    """
    if not result.update_ratios:
        return
    total = sum(layer.numel or 0 for layer in result.layers)
    found = sorted(result.update_ratios, key=lambda u: -u.median)
    worst = found[0]
    share = sum(u.numel or 0 for u in found if u.median > high) / total if total else 1.0
    names = [u.layer_name for u in found]
    yield Observation(
        worst.layer_name if len(found) == 1 else "network",
        f"the median step changes {plural(len(found), 'layer')} by more than a twentieth of "
        "the weights: "
        f"{some(names)} (most {worst.median:.2g}, peak {worst.peak:.2g} at step {worst.step})",
        "lower the learning rate of these layers, or warm it up; zero-initialised layers "
        "settle by themselves",
        {
            "median": worst.median,
            "peak": worst.peak,
            "layers": len(found),
            "share_of_parameters": share,
        },
        threshold=high,
        severity=_ratio_severity(worst.median, share, high, wild),
    )


def _ratio_severity(median: float, share: float, high: float, wild: float) -> Severity:
    if share < 0.05 or median <= high:
        return Severity.LOW
    return Severity.HIGH if median > wild else Severity.MEDIUM
