"""What happens at single records, and layers that have none."""

from __future__ import annotations

from typing import Literal

from gradscope.report.model import Record

Absence = Literal["unused", "frozen", "not-recorded", "partly"]


class Spike(Record):
    """A jump that most affected layers share and that is over soon."""

    step: int
    layer_name: str
    layers: int
    #: Norm over the median of the records before, and its modified z.
    ratio: float
    z: float
    left_a_trace: bool
    #: The records after it are as high: what began is no spike.
    stayed: bool = False


class NonFinite(Record):
    """Gradients with NaN or Inf elements."""

    step: int
    #: The layer nearest the loss among the first to turn; None when the loss did before.
    origin: str | None
    inherited_by: tuple[str, ...]
    loss_nonfinite: bool
    records: int
    #: The last finite record before.
    last_finite_step: int | None
    #: The last finite total norm over its level after warm-up, where it had grown fourfold, and
    #: between which steps it left that level: what diverges grows before it overflows.
    growth_before: float | None
    growing_since: tuple[int, int] | None


class Missing(Record):
    """A layer without gradients."""

    layer_name: str
    state: Absence
    records: int
    numel: int | None
