"""How bad it is that a loss left its best level."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from gradscope.flow.judgement.levels import Words
from gradscope.flow.limits import CLIMBING
from gradscope.flow.records.loss import Divergence
from gradscope.flow.records.regions import Level


@dataclass(frozen=True, slots=True)
class Course:
    """What is made of a loss that left its best level: how bad, and the signs of overshooting."""

    level: Level
    evidence: Words


def divergence(
    found: Divergence | None,
    *,
    level: float,
    adversarial: float,
    steered: float,
    wild: float,
    undone: float,
) -> Course:
    """A loss that rose for good is severe, one that came back moderate, by the limits of F111.

    One that jumped under weights that had not moved and came back is mild: what it was asked from
    there on is learnt.

    One that never fell and rises without a sign of overshooting may be that of a network which
    another one competes with: it is moderate when it is ``adversarial`` times as high, else none.
    """
    if found is None or (found.ends == "higher" and 0 < found.after < level * found.before):
        return Course("none", ())
    evidence = () if found.at_once else tuple(_overshooting(found, steered, wild))
    if found.ends == "non-finite":
        return Course("critical", evidence)
    if not found.fell and not evidence:
        height = found.peak if found.ends == "returned" else found.after
        far = found.before > 0 and height >= adversarial * found.before
        return Course("moderate" if far else "none", evidence)
    left = (found.after - found.before) / (found.peak - found.before)
    if found.at_once and left <= 1 - undone and (found.progressed or found.ends == "returned"):
        return Course("mild" if found.ends == "returned" else "moderate", evidence)
    mended = (found.ends == "returned" or found.recovers) and found.progressed
    return Course("moderate" if mended else "severe", evidence)


def _overshooting(found: Divergence, steered: float, wild: float) -> Iterator[str]:
    """What happened with it, in the order in which it matters."""
    if (found.learning_rate_factor or 0) >= steered:
        yield f"the learning rate had just been raised {found.learning_rate_factor:.3g} times"
    if found.descent is not None and found.descent < CLIMBING:
        yield "steps go up the gradient"
    if (found.update_ratio or 0) > wild:
        yield f"steps change the weights by {found.update_ratio:.0%} of their norm"
    if (found.gradient_factor or 0) >= steered:
        yield f"the gradient norm is {found.gradient_factor:.3g} times what it was"
