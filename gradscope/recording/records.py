"""One record of a run, from the capture of gradients until it is in a shard."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from gradscope.histories.history import Status

Array = np.ndarray[Any, Any]
Tensor = torch.Tensor
Number = Tensor | float
#: Names of statistics, and their values, [rows, names].
Table = tuple[tuple[str, ...], Tensor]


@dataclass(slots=True)
class Part:
    """What one record says of the parameters of one optimizer that were measured together."""

    owner: int
    #: Rows of the file, and the ``Status`` of each.
    rows: Array
    status: Array
    #: A block of records on the host, [records, rows, ``flat.CELLS`` and k of a sketch], and which.
    block: Array | None = None
    slot: int = 0
    #: The lot that is to measure the step that follows.
    awaits: Any = None
    #: Without a block: which of the rows have values, statistics of those, sketches [values, k].
    place: Sequence[int] = ()
    tables: tuple[Table, ...] = ()
    sketch: Tensor | None = None
    #: The loss scale that the gradients still carried, None when they did not.
    scale: Number | None = None

    @property
    def valued(self) -> bool:
        """Whether there is a table of values, which a row without a gradient has none in."""
        return self.block is not None or bool(self.tables)


@dataclass(slots=True)
class Record:
    """What the host knows of a capture without asking, and what is still on the device."""

    #: The caller's number, and the optimizer whose step it is; both may be known later.
    step: int | None
    owner: int | None
    #: Whether mixed precision may skip the step.
    may_skip: bool
    #: The learning rates of all parameter groups.
    rates: Sequence[float] = ()
    parts: Sequence[Part] = ()
    loss: Number | None = None
    #: The loss scale, and what is known of clipping.
    scalars: Sequence[tuple[str, Number]] = ()
    #: The optimizers that have stepped since.
    stepped: tuple[int, ...] = ()
    #: Once the step was seen: the loss of each optimizer, whether all of them have a part, and
    #: whether the step was skipped.
    losses: Sequence[tuple[int, Number]] = ()
    whole: bool = True
    skipped: bool = False


def status_of(parameters: Sequence[Tensor]) -> Array:
    """``Status`` of each parameter now, uint8."""
    return np.array(
        [
            Status.RECORDED if p.grad is not None
            else Status.NONE if p.requires_grad else Status.FROZEN
            for p in parameters
        ],
        dtype=np.uint8,
    )  # fmt: skip


def known(value: Any) -> Number:
    """What was given: a number where the host has it, else a tensor, left where it is."""
    if not isinstance(value, Tensor):
        return float(value)
    if value.numel() != 1:
        value = value.detach().float().mean()
    return float(value.item()) if on_host(value) else value.detach().reshape(()).clone()


def on_host(tensor: Tensor) -> bool:
    """Whether a tensor's numbers can be had without waiting for a device."""
    return tensor.is_cpu and type(tensor) is Tensor
