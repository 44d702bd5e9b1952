"""What the recorder holds between a capture and its step, and what it asks of torch's objects."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from gradscope.recording.optimizers import Optimizers
from gradscope.recording.shards import Number, Part

Tensor = torch.Tensor


@dataclass(slots=True)
class Pending:
    """A capture whose step has not been seen yet."""

    step: int | None
    owner: int | None
    may_skip: bool
    #: The learning rates of all parameter groups.
    rates: Sequence[float] = ()
    parts: list[Part] = field(default_factory=list)
    scalars: dict[str, Number] = field(default_factory=dict)
    loss: Number | None = None
    #: The optimizers that have stepped since.
    stepped: list[int] = field(default_factory=list)


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


def carried(scaler: Any, optimizers: Optimizers, owner: int) -> Number | None:
    """The loss scale that gradients still carry; None once ``unscale_`` has taken it out.

    Told by the scaler's own state, which is private to torch; unknown is taken for unscaled.
    """
    if scaler is None:
        return None
    states = getattr(scaler, "_per_optimizer_states", None)
    scale = getattr(scaler, "_scale", None)
    if not isinstance(scale, Tensor) or states is None or not len(optimizers):
        return None
    state = states.get(id(optimizers.all[owner]))
    ready = state is None or getattr(state.get("stage"), "name", "") == "READY"
    return known(scale) if ready else None


def inner(model: torch.nn.Module) -> torch.nn.Module:
    """The module itself inside torch.compile's and data parallel wrappers."""
    while True:
        found = getattr(model, "_orig_mod", None)
        if found is None and type(model).__name__ in ("DistributedDataParallel", "DataParallel"):
            found = getattr(model, "module", None)
        if not isinstance(found, torch.nn.Module):
            return model
        model = found


def rank() -> int:
    """This process's among those that train together."""
    available = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_rank() if available else 0
