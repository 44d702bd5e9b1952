"""Rules about what the optimizer makes of the gradients."""

from __future__ import annotations

from collections.abc import Iterator

from gradscope.flow import judgement
from gradscope.flow.limits import ATTENUATED
from gradscope.flow.records.optimizer import Captures
from gradscope.flow.result import FlowResult, Need
from gradscope.flow.rules.say import place, several
from gradscope.report.model import Fact
from gradscope.report.rules import Observation, Unknown, rule
from gradscope.report.severity import Severity
from gradscope.text import plural


@rule("F112", "not-in-optimizer", Severity.MEDIUM, reads=FlowResult, needs=Need.NORMS)
def not_in_optimizer(result: FlowResult) -> Iterator[Observation | Unknown]:
    """Layers get gradients, but no optimizer holds their parameters: they never learn.

    Told by the parameter groups in the file, where other layers have one. Such gradients are not
    zeroed by the optimizer either, so they add up; that is not reported as an explosion.
    """
    found = result.unoptimized
    if found is None:
        if Need.GROUPS not in result.measured:
            yield Unknown("needs the optimizer's parameter groups, which the recorder writes")
        return
    yield Observation(
        place(found.named),
        f"{several(found.named)} {'gets' if len(found.named) == 1 else 'get'} gradients and "
        f"{'is' if len(found.named) == 1 else 'are'} in no parameter group of the optimizer "
        f"({found.share:.0%} of the parameters)",
        "pass these parameters to the optimizer (were they made after it, or filtered out?); to "
        "freeze them, set requires_grad to False",
        {"layers": len(found.layers), "share_of_parameters": found.share}
        | ({} if found.parameters is None else {"parameters": found.parameters}),
    )


@rule("F114", "always-clipped", Severity.LOW, reads=FlowResult, needs=Need.RECORDS)
def always_clipped(
    result: FlowResult, *, share: float = 0.99, short: float = 0.1, stuck: float = 0.9
) -> Iterator[Observation | Unknown]:
    """Every step is clipped: the limit sets the length of the steps, not the gradients.

    Told by the recorded clip coefficients, or by a total norm that stays at its greatest value, in
    more than a ``share`` of the records. Common and often harmless with an adaptive optimizer;
    with SGD the limit then acts as a learning rate: medium where it makes the median step
    ``short`` and the loss ends above ``stuck`` times where it began.
    """
    found = result.clipping
    if found is None:
        yield Unknown("needs clip coefficients, or 16 records with a total norm")
        return
    if found.share <= share:
        return
    by = f", by the median to {found.median:.3g} of their length" if found.median else ""
    at = f": the total norm stays at {found.limit:.3g}" if found.limit is not None else ""
    facts: dict[str, Fact] = {"share": found.share}
    facts |= {k: v for k, v in (("median", found.median), ("limit", found.limit)) if v is not None}
    frozen = found.proportional and (found.median or 1.0) < short and _stuck(result, stuck)
    yield Observation(
        "network",
        f"{found.share:.0%} of the steps are clipped{by}{at}"
        + ("; the loss does not fall" if frozen else ""),
        "raise the limit to what the norms usually are, or lower it knowingly and tune the "
        "learning rate for it",
        facts,
        threshold=share,
        severity=Severity.MEDIUM if frozen else None,
    )


def _stuck(result: FlowResult, share: float) -> bool:
    """Whether a positive loss ends as high as it began, or nearly."""
    loss = result.loss
    return loss is not None and loss.first > 0 and loss.last >= share * loss.first


@rule("F115", "carried-over", Severity.MEDIUM, reads=FlowResult, needs=Need.NORMS)
def carried_over(
    result: FlowResult,
    *,
    unfinished: float = 1.5,
    cosine: float = 0.97,
    growth: float = 5.0,
    added: float = 5.0,
    steady: float = 0.6,
    doubled: float = 1.25,
) -> Iterator[Observation | Unknown]:
    """Gradients add up from step to step, as they do without `zero_grad`, or from record to record.

    A recorder that was called ``unfinished`` times as often as the optimizer stepped saw the sums
    of some micro-batches, not the gradient of a step; the file counts both.

    Else by the first records: successive gradients agree to more than ``cosine``, their norm climbs
    more than ``growth`` times, and what each step adds stays as large as the first gradient
    (within ``added`` times). A gradient that grows by itself grows in what it adds, too (as the
    norm to the power ``steady`` and more), and does not grow ``doubled``-fold at the first step,
    where the sum of two batches is up to twice the first.
    """
    if result.captures and judgement.captured_unfinished(result.captures, unfinished):
        if result.stagnation is None or result.stagnation.reason != "unstepped":
            yield _unfinished(result.captures, unfinished)
        return
    if Need.DIRECTIONS not in result.measured:
        yield Unknown("needs the directions of gradients: a recording with sketches, or vectors")
        return
    found = result.accumulation
    limits = {"cosine": cosine, "growth": growth, "added": added, "steady": steady}
    limits |= {"doubled": doubled, "unfinished": unfinished}
    if found is None or not judgement.adds_up(found, None, **limits):
        return
    yield Observation(
        "network",
        f"gradients add up: each agrees with the one before (cosine {found.cosine:.3f}), the norm "
        f"grew {found.growth:.3g} times, and every step adds about one batch's gradient",
        "call optimizer.zero_grad() after each step; if gradients are accumulated on purpose, "
        "capture once per optimizer step",
        {"cosine": found.cosine, "growth": found.growth, "added": found.added},
        threshold=cosine,
    )


def _unfinished(found: Captures, limit: float) -> Observation:
    what = "these are gradients that still add up over micro-batches, not those of a step"
    remedy = "call capture() once a step, after the last micro-batch, and record again: trends and "
    remedy += "levels of this history mix full and partial sums"
    if not found.steps:
        what = "whether they add up over micro-batches is not known"
        remedy = "give the recorder the optimizer that steps, call capture() once a step, after "
        remedy += "the last micro-batch, and record again"
    return Observation(
        "network",
        f"capture() was called {found.calls:,} times for {plural(found.steps, 'optimizer step')}: "
        f"{what}",
        remedy,
        {"captures": found.calls, "optimizer_steps": found.steps},
        threshold=limit,
    )


@rule("F116", "epsilon-damped", Severity.MEDIUM, reads=FlowResult, needs=Need.NORMS)
def epsilon_damped(
    result: FlowResult, *, most: float = 0.5, left: float = ATTENUATED
) -> Iterator[Observation | Unknown]:
    """The optimizer's epsilon outweighs the gradients of the whole network.

    An Adam-like step is divided by RMS + epsilon: where the RMS gradient lies below epsilon, less
    than half of the step is ``left``. Reported when that holds at the end for ``most`` of the
    parameters; single layers are `vanishing-gradient`. Clipping counts: a tight limit can push
    every gradient below epsilon.
    """
    found = result.damping
    if found is None:
        yield Unknown("needs an Adam-like optimizer's epsilon and the layers' sizes")
        return
    if found.share <= most or not found.left or found.left >= left:
        return
    cause = " after clipping" if found.clipped else ""
    yield Observation(
        "network",
        f"the optimizer's epsilon ({found.epsilon:g}) outweighs the gradients{cause}: the median "
        f"layer's step keeps {found.left:.2g} of its size",
        (
            "raise the clipping limit, or lower epsilon"
            if found.clipped
            else f"lower epsilon well below {found.epsilon:g}, or scale the loss up (a mean over "
            "too many elements?)"
        ),
        {"left": found.left, "epsilon": found.epsilon, "share_of_parameters": found.share},
        threshold=left,
    )
