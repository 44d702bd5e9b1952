"""What the optimizer makes of gradients."""

from __future__ import annotations

from gradscope.report.model import Record


class Unoptimized(Record):
    """Layers with a gradient of which no optimizer holds all parameters."""

    layers: tuple[str, ...]
    #: The same, by parameter where an optimizer holds the layer's others.
    named: tuple[str, ...]
    parameters: int | None
    #: Of all parameters.
    share: float


class Damping(Record):
    """Layers whose steps an adaptive optimizer's epsilon halves or worse at the end."""

    epsilon: float
    layers: tuple[str, ...]
    #: Of all parameters.
    share: float
    #: What the median layer has left of its full step.
    left: float | None
    #: Gradients were clipped, which is counted in.
    clipped: bool


class Clipping(Record):
    """How many steps were clipped."""

    share: float
    #: Median coefficient of those, where recorded.
    median: float | None
    #: The norm that the total is pinned at, where it is told by that.
    limit: float | None
    #: Steps are as long as gradients, so shorter gradients are shorter steps: SGD.
    proportional: bool = False


class Accumulation(Record):
    """How gradients add up from step to step, over the first records."""

    cosine: float
    #: Norm over the first one; norm of what each step adds over the first; and the power of the
    #: norm that this grows with.
    growth: float
    added: float
    added_growth: float | None
    #: The second norm over the first, at the very beginning of the run.
    doubled: float | None


class Captures(Record):
    """How often a recorder was called, and how many steps of an optimizer followed."""

    calls: int
    steps: int
    #: Share of the records whose step mixed precision skipped.
    skipped: float = 0.0
