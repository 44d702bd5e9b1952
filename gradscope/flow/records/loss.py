"""What the loss did."""

from __future__ import annotations

from typing import Literal

from gradscope.report.model import Record

Precursed = Literal["updates", "gradients", "loss"]


class Precursor(Record):
    """Something that rose out of its range before or as a loss did."""

    what: Precursed
    #: After the first and by the second of these steps.
    onset: tuple[int, int]


class Divergence(Record):
    """A loss that left its best level upwards."""

    #: After the first and by the second of these steps; None: from the first record on.
    onset: tuple[int | None, int]
    #: Medians of windows: the best one before, and the last one.
    before: float
    after: float
    peak: float
    peak_step: int
    ends: Literal["higher", "returned", "non-finite"]
    #: It had fallen before it rose; it ends below where it began.
    fell: bool
    progressed: bool
    #: Nine tenths of the rise are undone, and it still falls at the end.
    recovers: bool = False
    #: It rose at one record, before which steps were no larger and weights moved no further than
    #: usual: what the weights are asked is another thing.
    at_once: bool = False
    #: By which factor learning rate and total gradient norm changed there.
    learning_rate_factor: float | None
    gradient_factor: float | None
    #: The greatest median update ratio around the onset.
    update_ratio: float | None
    #: Median cosine of the steps from then on to the negative gradient.
    descent: float | None
    #: What rose out of its range on the way, in the order in which it did.
    precursors: tuple[Precursor, ...] = ()


class Descent(Record):
    """A loss that falls below zero without a bound, ever faster, and gradients grow with it."""

    first: float
    #: The lowest one, and its step.
    last: float
    step: int
    #: How many times the total gradient norm has grown.
    gradient_factor: float


class LossLevel(Record):
    """What the loss did; levels are medians of windows."""

    first: float
    last: float
    #: The value that the last eight losses or more repeat to the bit, from which step on, and
    #: whether the loss came down to it instead of being it all at once.
    constant: float | None
    constant_since: int | None = None
    reached: bool = False
    #: Between which steps it became NaN or infinite, to the end.
    lost: tuple[int, int] | None
    divergence: Divergence | None
    descent: Descent | None = None
