"""Whether a model still is what it was, so that what was made of it still answers for it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True, eq=False, slots=True)
class Looks:
    """A model's numbers, each row of a matrix as one, and what its modules are made of."""

    numbers: Tensor
    structure: tuple[Any, ...]

    def same(self, other: Looks) -> bool:
        """Whether nothing changed in between, not even through ``.data``."""
        return self.structure == other.structure and torch.equal(self.numbers, other.numbers)


def looks(module: nn.Module) -> Looks:
    """How a model looks now; reads each of its numbers once."""
    held = [t.detach() for t in (*module.parameters(), *module.buffers()) if t.numel()]
    rows = [t.flatten(1) if t.dim() > 1 else t.view(-1, 1) for t in held]
    longest = max((row.shape[1] for row in rows), default=0)
    # Two rows that trade places, or numbers in them, are not what they were.
    weights = torch.randn(longest, generator=torch.Generator().manual_seed(0))
    sums = [row[:, 0] if row.shape[1] == 1 else _summed(row, weights) for row in rows]
    structure = tuple(_structure(module))
    return Looks(torch.cat([weights[:0], *sums]), structure)


def _summed(row: Tensor, weights: Tensor) -> Tensor:
    row = row if row.dtype in (torch.float32, torch.float64) else row.double()
    return row @ weights[: row.shape[1]].to(row.dtype)


def _structure(module: nn.Module) -> Iterator[Any]:
    for name, part in module.named_modules():
        # A ScriptModule's program cannot be changed.
        if not isinstance(part, torch.jit.ScriptModule):
            yield name, type(part)
            for key, value in vars(part).items():
                if value is not None and key != "training":
                    yield key, _told(value)


def _told(value: Any) -> Any:
    """A setting by its value, a container by what it holds, anything else by which it is."""
    kind = type(value)
    if kind in _SETTINGS:
        return value
    if isinstance(value, dict):
        return value and [(key, _told(held)) for key, held in value.items()]
    if kind is tuple or kind is list:
        return [_told(held) for held in value]
    return id(value)


_SETTINGS = frozenset({bool, int, float, str, type(None)})
