"""The optimizers of a run: which parameters each has, at which rates, and what it is called."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from gradscope.errors import UsageError
from gradscope.recording.records import Number, known

Tensor = torch.Tensor
Given = (
    torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | Mapping[str, torch.optim.Optimizer]
)


class Optimizers:
    """One optimizer, several, or none."""

    def __init__(self, given: Given | None) -> None:
        named = (
            dict(given) if isinstance(given, Mapping)
            else {} if given is None
            else {str(i): o for i, o in enumerate(given)} if isinstance(given, list | tuple)
            else {"0": given}
        )  # fmt: skip
        self.names = tuple(map(str, named))
        self.all = tuple(map(unwrapped, named.values()))
        for optimizer in self.all:
            if not hasattr(optimizer, "param_groups"):
                raise UsageError(f"{type(optimizer).__name__} is not an optimizer: no param_groups")
        if len({id(o) for o in self.all}) < len(self.all):
            raise UsageError("the same optimizer was given twice")

    def __len__(self) -> int:
        return len(self.all)

    def index(self, optimizer: Any) -> int:
        """Which one an optimizer is, or the name that it was given; UsageError for another."""
        if isinstance(optimizer, str) and optimizer in self.names:
            return self.names.index(optimizer)
        wanted = unwrapped(optimizer)
        for i, optimizer in enumerate(self.all):
            if optimizer is wanted:
                return i
        raise UsageError("capture() was given an optimizer that the recorder was not made with")

    def groups(self) -> dict[int, tuple[int, int]]:
        """Of each parameter, by its id: its optimizer and its column of the learning rates."""
        found: dict[int, tuple[int, int]] = {}
        column = 0
        for i, optimizer in enumerate(self.all):
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    found.setdefault(id(parameter), (i, column))
                column += 1
        return found

    def rates(self) -> list[float]:
        """Learning rates that the host knows; one kept on the device is not waited for."""
        return [
            rate if type(rate := group.get("lr", math.nan)) is float else _rate(rate)
            for optimizer in self.all
            for group in optimizer.param_groups
        ]

    def described(self) -> dict[str, Any]:
        """For the file's meta: ``optimizer`` is the first, ``optimizers`` has all by name."""
        if not self.all:
            return {"optimizer": None}
        each = {n: _described(o) for n, o in zip(self.names, self.all, strict=True)}
        first = next(iter(each.values()))
        return {"optimizer": first} if len(each) == 1 else {"optimizer": first, "optimizers": each}


def _rate(given: Any) -> float:
    elsewhere = isinstance(given, Tensor) and given.device.type != "cpu"
    return math.nan if elsewhere else float(given)


def unwrapped(optimizer: Any) -> Any:
    """The optimizer that steps, inside what Accelerate and Lightning wrap around it."""
    while type(optimizer).__name__ in ("AcceleratedOptimizer", "LightningOptimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def carried(scaler: Any, optimizer: Any) -> Number | None:
    """The loss scale that an optimizer's gradients still carry; None once ``unscale_`` was called.

    Told by the scaler's own state, which is private to torch; unknown is taken for unscaled.
    """
    states = getattr(scaler, "_per_optimizer_states", None)
    scale = getattr(scaler, "_scale", None)
    if not isinstance(scale, Tensor) or states is None:
        return None
    state = states.get(id(optimizer))
    ready = state is None or getattr(state.get("stage"), "name", "") == "READY"
    return known(scale) if ready else None


def _described(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    first = optimizer.param_groups[0] if optimizer.param_groups else {}
    facts: dict[str, Any] = {"class": type(optimizer).__name__}
    for name in ("eps", "momentum", "weight_decay"):
        if isinstance(first.get(name), int | float):
            facts[name] = first[name]
    if isinstance(first.get("betas"), tuple):
        facts["betas"] = [float(b) for b in first["betas"]]
    return facts
