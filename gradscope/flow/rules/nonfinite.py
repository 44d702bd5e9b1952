"""The rule about gradients with NaN or Inf elements."""

from __future__ import annotations

from collections.abc import Iterator

from gradscope.flow.records.events import NonFinite
from gradscope.flow.result import FlowResult, Need
from gradscope.flow.rules.say import BOUNDLESS, since
from gradscope.report.model import Fact
from gradscope.report.rules import Observation, rule
from gradscope.report.severity import Severity
from gradscope.text import plural


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
    if result.loss and result.loss.descent:
        said += f"; the loss had fallen without a bound, to {result.loss.descent.last:.3g}"
        advice = BOUNDLESS
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
