"""How many inputs a model sees at a time: as many as fit in memory and, on a CPU, in its cache."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import torch

#: Bytes of main memory to use.
_CPU_BUDGET = 3 << 29
_MOST = 64
#: Bytes of a CPU's last cache where the system does not tell.
_USUAL_CACHE = 32 << 20
_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")


@dataclass(slots=True)
class Chunks:
    """How many inputs the model sees at a time, with a backward pass and without."""

    gradient: int
    forward: int
    #: The same of inputs that are alike at first, in all but a window: what differs comes small.
    windows: int
    #: Whether the model takes inputs with the channels last in memory.
    channels_last: bool = False
    notes: list[str] = field(default_factory=list)

    def halve(self) -> None:
        """Continue with half as many, and note it."""
        sizes = self.gradient, self.forward, self.windows
        self.gradient, self.forward, self.windows = (max(1, size // 2) for size in sizes)
        self.notes.append(f"out of memory: continued with chunks of {self.forward}")


def fitting(kept: Collection[int], device: torch.device, batch: int | None) -> Chunks:
    """Chunks by the bytes of each tensor that the backward pass of one input keeps, or of a batch.

    On a CPU the largest of them fills the last cache at most: an operator's output is still there
    when the next one reads it. Without a backward pass nothing has to stay but what an operator
    reads and what it writes, which then fit together.
    """
    fits = _budget(device) // (2 * max(1, sum(kept)))
    cached = last_cache() // max(kept, default=1) if device.type == "cpu" else _MOST
    each = batch or 1
    gradient = each * max(1, min(fits, _power(cached), _MOST // each))
    forward = 2 * gradient
    if device.type == "cpu":
        forward = min(forward, each * _power(cached // 2))
    return Chunks(gradient, forward, 4 * gradient)


def _power(number: int) -> int:
    """The greatest power of two up to a number: kernels take images in such groups."""
    return 1 << max(0, number.bit_length() - 1)


@cache
def last_cache() -> int:
    """Bytes of the last cache of this machine's CPU, as Linux tells them; else 32 MB."""
    try:
        found = [_cache(folder) for folder in _CACHES.glob("index*")]
        return max(found)[1]
    except (OSError, ValueError):
        return _USUAL_CACHE


def _cache(folder: Path) -> tuple[int, int]:
    """The level of a cache and its bytes, which are written as ``32768K``."""
    level, size = ((folder / name).read_text().strip() for name in ("level", "size"))
    units = {"K": 10, "M": 20, "G": 30}
    return int(level), int(size.rstrip("KMG")) << units.get(size[-1:], 0)


def _budget(device: torch.device) -> int:
    """Bytes to use: a fixed part of main memory, most of an accelerator's free memory."""
    if device.type == "cuda":
        return int(0.8 * torch.cuda.mem_get_info(device)[0])
    return _CPU_BUDGET if device.type == "cpu" else 2 * _CPU_BUDGET
