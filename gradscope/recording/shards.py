"""The records of a run on their way to disk: a ring on the device, then one file a drain."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from gradscope.errors import UsageError
from gradscope.histories.schema import write

#: Statistics of every cell, in the order of the ring's columns, and the file's key of each.
CELLS = ("grad/l2", "grad/max_abs", "nonzero", "param/l2", "update/l2", "update/grad_cos")
#: Statistics of every record.
SCALARS = ("loss", "total_l2", "loss_scale", "clip_coef")


def folder_for(path: str | os.PathLike[str], resume: bool) -> tuple[str, int]:
    """The folder of a run, made if need be, and the number of its next shard.

    Raises UsageError when it already holds shards and ``resume`` is False.
    """
    folder = os.fspath(path)
    os.makedirs(folder, exist_ok=True)
    taken = [int(n[:-4]) for n in os.listdir(folder) if n.endswith(".npz") and n[:-4].isdigit()]
    if taken and not resume:
        raise UsageError(
            f"{folder} already holds {len(taken)} shards of a run; give another folder, or "
            "resume=True to continue it"
        )
    return folder, max(taken, default=-1) + 1


@dataclass(slots=True)
class Host:
    """What the host knows of a record without asking the device."""

    step: int
    status: np.ndarray[Any, Any]
    rates: Sequence[float]
    skipped: bool = False
    sketched: bool = False


@dataclass
class Ring:
    """Records of L rows on the device; nothing is read back before ``drain``."""

    rows: int
    capacity: int
    device: torch.device
    width: int
    hosts: list[Host] = field(default_factory=list)

    def __post_init__(self) -> None:
        nan = float("nan")
        self.cells = torch.full((self.capacity, len(CELLS), self.rows), nan, device=self.device)
        self.scalars = torch.full((self.capacity, len(SCALARS)), nan, device=self.device)
        self.sketches: torch.Tensor | None = None

    @property
    def full(self) -> bool:
        """Whether the next record has no room."""
        return len(self.hosts) == self.capacity

    def begin(self, host: Host) -> int:
        """Take the next place for a record."""
        self.hosts.append(host)
        return len(self.hosts) - 1

    def sketch(self, at: int, values: torch.Tensor) -> None:
        """Store the sketches of a record, [L, k]."""
        if self.sketches is None:
            self.sketches = torch.zeros(
                (self.capacity, self.rows, self.width), dtype=torch.float16, device=self.device
            )
        self.sketches[at].copy_(values)
        self.hosts[at].sketched = True

    def drain(self) -> dict[str, np.ndarray[Any, Any]]:
        """The arrays of all records, by their keys in the file; the ring is empty afterwards.

        The one place that waits for the device.
        """
        count = len(self.hosts)
        cells = self.cells[:count].cpu().numpy()
        scalars = self.scalars[:count].cpu().numpy().astype(np.float64)
        arrays: dict[str, np.ndarray[Any, Any]] = {
            "steps": np.array([h.step for h in self.hosts], dtype=np.int64),
            "grad/status": np.stack([h.status for h in self.hosts]),
            "skipped": np.array([h.skipped for h in self.hosts], dtype=np.uint8),
            "lr": _padded([h.rates for h in self.hosts]),
        }
        arrays |= {name: cells[:, i].copy() for i, name in enumerate(CELLS)}
        arrays |= {name: scalars[:, i].copy() for i, name in enumerate(SCALARS)}
        arrays |= self._sketched(count)
        self.hosts = []
        self.cells.fill_(float("nan"))
        self.scalars.fill_(float("nan"))
        return arrays

    def _sketched(self, count: int) -> dict[str, np.ndarray[Any, Any]]:
        index = [i for i, host in enumerate(self.hosts) if host.sketched]
        if self.sketches is None or not index:
            return {}
        values = self.sketches[:count].cpu().numpy()[index]
        return {"grad/sketch": values, "grad/sketch_index": np.array(index, dtype=np.int64)}


def _padded(rates: Sequence[Sequence[float]]) -> np.ndarray[Any, Any]:
    out = np.full((len(rates), max((len(r) for r in rates), default=0)), np.nan)
    for row, values in zip(out, rates, strict=True):
        row[: len(values)] = values
    return out


def save(
    path: str,
    drained: Mapping[str, np.ndarray[Any, Any]],
    layers: Mapping[str, np.ndarray[Any, Any]],
    meta: Mapping[str, Any],
) -> None:
    """Write one shard; what no record of it has is left out."""
    arrays = {**layers, **drained}
    nonzero = arrays.pop("nonzero")
    sizes = np.maximum(layers["layer/numel"], 1).astype(np.float32)
    arrays["grad/zero_frac"] = np.where(np.isnan(nonzero), np.nan, 1 - nonzero / sizes).astype(
        np.float32
    )
    optional = (*SCALARS, *CELLS[3:], "lr", "grad/zero_frac")
    kept = {
        k: v
        for k, v in arrays.items()
        if k not in optional or np.isfinite(v).any() or (k == "loss" and _is_known(v))
    }
    write(path, kept, meta)


def _is_known(values: np.ndarray[Any, Any]) -> bool:
    return bool(np.isinf(values).any())
