"""The rule about the loss."""

from __future__ import annotations

from collections.abc import Iterator

from gradscope.flow import judgement
from gradscope.flow.limits import CLIMBING, LOSS_LEVEL
from gradscope.flow.records.loss import Descent, Divergence, LossLevel
from gradscope.flow.result import FlowResult, Need
from gradscope.flow.rules.say import (
    BOUNDLESS,
    SEVERITY,
    begins_after,
    follows,
    overwrites,
    several,
    since,
)
from gradscope.report.model import Fact
from gradscope.report.rules import Observation, rule
from gradscope.report.severity import Severity


@rule("F111", "diverged", Severity.HIGH, reads=FlowResult, needs=Need.LOSS)
def diverged(
    result: FlowResult,
    *,
    level: float = LOSS_LEVEL,
    adversarial: float = 10.0,
    steered: float = 3.0,
    wild: float = 0.02,
    undone: float = 0.85,
) -> Iterator[Observation]:
    """The loss left its best level upwards and did not come back.

    Levels are medians of windows of a tenth of the run: eight robust deviations, a tenth of what
    had been gained, and (where it is positive) ``level`` times the best one. High where it stays
    there or ends no better than it began, medium where it came back or has undone nine tenths of
    the rise and still falls, critical where it ends non-finite, from a higher level or while the
    gradients are finite. What vanishes, dies or spikes from then on, and what explodes mildly,
    follows from it and is told here alone.

    A loss that never fell and rises may belong to one of two networks that compete: it takes
    evidence of overshooting (learning rate or gradient norm ``steered`` times as large, steps of
    more than a ``wild`` share of the weights, steps up the gradient); without it only a loss
    ``adversarial`` times as high is reported, as medium. A loss that rises at one record, after
    steps and weights as usual, is that of other data or labels, and told so: medium where
    ``undone`` of the rise is made good, as on a harder stage, and low where it is learnt as well as
    what was before.

    A loss that is one value to the bit is told as well, unless it came down to that: medium where
    nothing else was logged, low beside gradients that go on. So is one that falls below zero
    without a bound, no slower than before, while gradients grow with it: medium, or as severe as
    their explosion.
    """
    if result.loss and result.loss.descent:
        if not result.nonfinite:
            yield _endless(result, result.loss.descent)
        return
    found = result.loss.divergence if result.loss else None
    limits = {"level": level, "adversarial": adversarial, "steered": steered, "wild": wild}
    limits |= {"undone": undone}
    course = judgement.divergence(found, **limits)
    unmoved = result.loss is not None and result.loss.constant is not None
    if course.level == "none" and result.loss and unmoved and not _explained(result):
        yield _constant(result, result.loss)
    if course.level == "none" and result.loss and result.loss.lost and not result.nonfinite:
        yield _not_finite(result.loss.lost, bool(result.layers))
    if found is None or course.level == "none" or overwrites(result, found):
        return
    layers = [n for r in result.regions if begins_after(r, found) for n in r.affected_layers]
    went = f"; gradients went with it in {several(list(dict.fromkeys(layers)))}" if layers else ""
    dead = [z for z in result.dead_zones if z.intervention_required and follows(result, z)]
    if dead:
        gone = dict.fromkeys(name for zone in dead for name in zone.affected_layers)
        went += f"; no gradient is left in {several(list(gone))}"
    evidence = ("steps and weights were as usual before",) if found.at_once else course.evidence
    why = f": {', '.join(evidence)}" if evidence else ""
    yield Observation(
        "loss",
        f"the loss {_course(found)}, {since(found.onset)}{why}{_order(found)}{went}",
        _advice(found, steered),
        _facts(found),
        threshold=level,
        severity=SEVERITY[course.level],
    )


def _explained(result: FlowResult) -> bool:
    """A loss that came down to its least value is done; what does not move has its own rules."""
    assert result.loss is not None
    dead = any(zone.extent.ongoing for zone in result.dead_zones)
    return result.loss.reached or dead or result.stagnation is not None


def _constant(result: FlowResult, loss: LossLevel) -> Observation:
    said = f"the loss is {loss.constant:g} to the bit since step {loss.constant_since}, to the end"
    return Observation(
        "loss",
        f"{said}, though gradients are not zero" if result.layers else said,
        "is what is logged the loss that is minimised, or a copy that is made once or rounded?"
        if result.layers
        else "look at how the loss is computed: are all labels masked or ignored, is it multiplied "
        "by zero, does it depend on the parameters at all?",
        {"constant": loss.constant or 0.0, "since": loss.constant_since or 0},
        severity=Severity.LOW if result.layers else Severity.MEDIUM,
    )


def _endless(result: FlowResult, found: Descent) -> Observation:
    levels = [SEVERITY[region.severity_level] for region in result.exploding_regions]
    return Observation(
        "loss",
        f"the loss falls without a bound, from {found.first:.3g} to {found.last:.3g} (step "
        f"{found.step}), no slower than before, and the gradient norm grew "
        f"{found.gradient_factor:.3g} times with it",
        f"{BOUNDLESS}; a critic needs a penalty on its slope or clipped weights",
        {"first": found.first, "last": found.last, "gradient_factor": found.gradient_factor},
        severity=max([Severity.MEDIUM, *levels], key=lambda severity: severity.rank),
    )


def _not_finite(lost: tuple[int, int], compared: bool) -> Observation:
    """``compared`` says whether gradients were recorded beside the loss."""
    though = ", though the gradients are" if compared else ""
    cause = (
        "a term without gradient (a metric, a penalty, a logged mean) is NaN or infinite, or the "
        "gradients were replaced"
        if compared
        else "record gradients too (gradscope.GradientRecorder) to see where it began"
    )
    return Observation(
        "loss",
        f"the loss is not finite {since(lost)}, to the end{though}",
        f"look at how the loss of step {lost[1]} is computed: {cause}",
        {"last_finite_step": lost[0]},
        severity=Severity.CRITICAL,
    )


def _course(found: Divergence) -> str:
    rise = f"rose from {found.before:.3g} to {found.peak:.3g} (step {found.peak_step})"
    if found.ends == "non-finite":
        return f"{rise} and ends non-finite"
    if found.ends == "returned":
        return f"{rise} and came back to {found.after:.3g}" + (
            "" if found.progressed else ", no better than it began"
        )
    if found.recovers:
        return f"{rise}, is {found.after:.3g} and falls"
    return f"{rise} and is still {found.after:.3g}"


def _order(found: Divergence) -> str:
    """Which of steps, gradients and loss left its range before the others, where that is sure."""
    first, *later = found.precursors or (None,)
    if first is None or not later or any(p.onset[0] < first.onset[1] for p in later):
        return ""
    rest = ", ".join(f"{p.what} {since(p.onset)}" for p in later)
    return f"; out of range first: {first.what} {since(first.onset)}, then {rest}"


def _advice(found: Divergence, steered: float) -> str:
    if found.descent is not None and found.descent < CLIMBING:
        return "check the sign of the loss and the optimizer's maximize"
    sound = min([found.onset[0] or 0, *(p.onset[0] for p in found.precursors)])
    back = f"go back to a checkpoint of step {sound} or before; " if sound else ""
    if found.at_once and found.ends != "non-finite":
        before = f"; unless it is meant, {back.removesuffix('; ')}" if back else ""
        return (
            f"look at what begins at step {found.onset[1]}: other data, labels, preprocessing, or "
            f"another term of the loss{before}"
        )
    if (found.learning_rate_factor or 0) >= steered:
        return f"{back}check the schedule: raise the learning rate slowly, or not so far"
    first = "warm the learning rate up, or " if (found.onset[0] or 0) < 10 else ""
    return f"{back}{first}lower the learning rate, and clip the total norm as a guard"


def _facts(found: Divergence) -> dict[str, Fact]:
    facts: dict[str, Fact] = {
        "before": found.before,
        "after": found.after,
        "peak": found.peak,
        "onset": since(found.onset),
        "ends": found.ends,
    }
    if found.precursors:
        facts["precursors"] = ", ".join(f"{p.what} {p.onset[1]}" for p in found.precursors)
    known = {
        "learning_rate_factor": found.learning_rate_factor,
        "gradient_factor": found.gradient_factor,
        "update_ratio": found.update_ratio,
        "descent": found.descent,
    }
    return facts | {name: value for name, value in known.items() if value is not None}
