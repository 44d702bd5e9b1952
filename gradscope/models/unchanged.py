"""Whether a model still is what it was, so that what was made of it still answers for it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True, eq=False, slots=True)
class Looks:
    """Which tensors a model holds, a sample of their numbers, and what its modules are made of.

    Whatever PyTorch records as written in place is noticed, and so is a new tensor. What is written
    past that record (through ``.data`` or NumPy) is noticed where it meets the sample: any vector,
    any whole row of a weight, so a filter, and most of what changes many numbers, but seldom a
    single number of a matrix.
    """

    stamps: tuple[Any, ...]
    numbers: tuple[Tensor, ...]
    structure: tuple[Any, ...]

    def same(self, other: Looks) -> bool:
        """Whether nothing changed in between, as far as both tell."""
        return (
            self.stamps == other.stamps
            and self.structure == other.structure
            and all(map(torch.equal, self.numbers, other.numbers))
        )


def looks(module: nn.Module) -> Looks:
    """How a model looks now.

    Few of its numbers are read: reading all costs as much as one pass by a copy saves.
    """
    held = [t.detach() for t in (*module.parameters(), *module.buffers()) if t.numel()]
    sampled: dict[torch.dtype, list[Tensor]] = {}
    for tensor in held:
        sampled.setdefault(tensor.dtype, []).append(_sample(tensor))
    numbers = tuple(map(torch.cat, sampled.values()))
    return Looks(tuple(map(_stamp, held)), numbers, tuple(_structure(module)))


def _stamp(tensor: Tensor) -> tuple[Any, ...]:
    # Tensors made in inference mode count no versions; ``_sample`` reads them whole.
    version = None if tensor.is_inference() else tensor._version
    return tensor.data_ptr(), version, tensor.dtype, tensor.shape, tensor.stride()


def _sample(tensor: Tensor) -> Tensor:
    """One number of each row or more, in another column each time; a vector whole."""
    row = tensor[0].numel() if tensor.dim() > 1 else 1
    # One less than a row: no row is passed over, and columns take turns.
    return tensor.flatten()[:: 1 if tensor.is_inference() else max(1, row - 1)]


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
