"""How the network moves: large steps, none, and such as overshoot."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from gradscope.flow.records.layers import Basis
from gradscope.report.model import Record

Standstill = Literal[
    "unstepped", "rate", "schedule", "starved", "unmoved", "rounded", "update", "epsilon", "repeats"
]


class LearningRateAdvice(Record):
    """What the growth of oscillating gradients says about the learning rate."""

    #: Divide by this; None when only "lower it" can be said.
    divide_by: float | None
    current: float | None
    suggested: float | None
    growth_per_step: float
    cosine: float
    why: str


class Oscillation(Record):
    """Windows in which successive gradients oppose each other."""

    layers: tuple[str, ...]
    share_of_layers: float
    cosine: float | None
    growth_per_step: float | None
    onset: tuple[int | None, int]
    ongoing: bool
    basis: Basis


class Stagnation(Record):
    """A network that no longer moves."""

    onset: tuple[int | None, int]
    update_ratio: float | None
    reason: Standstill
    converged: bool
    #: The greatest median update ratio of its records, where they tell; not part of the report.
    fastest: float | None = Field(default=None, exclude=True, repr=False)


class UpdateRatio(Record):
    """A layer whose steps are large against its weights."""

    layer_name: str
    median: float
    peak: float
    step: int
    numel: int | None


class Leap(Record):
    """The step that changed the median layer most, against its weights."""

    ratio: float
    step: int
    #: Among the records at the start that nothing is compared with.
    first: bool


class Overwritten(Record):
    """Weights that became others without a step of the optimizer."""

    #: After the first and by the second of these steps.
    onset: tuple[int, int]
    layers: tuple[str, ...]
    #: The median change of their norms, as a share.
    change: float
    #: How many times as high the loss is just after as before; 1 within its noise.
    loss_factor: float | None
    #: How often that happened.
    times: int


class Convergence(Record):
    """The whole network's gradients fell together."""

    decades: float
    loss_fell: bool | None
