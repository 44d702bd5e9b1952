"""The records of a run on their way to disk: on the device until there are enough for a file."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from gradscope.errors import UsageError
from gradscope.histories.format import write
from gradscope.text import plural

#: Statistics of every cell and of every record, by their keys in the file. ``nonzero`` is counted;
#: the file has the share of zeros.
COUNTS = ("grad/n_nan", "grad/n_inf")
CELLS = (
    "grad/l2", "grad/max_abs", "nonzero", "param/l2", "update/l2", "update/grad_cos", *COUNTS,
)  # fmt: skip
SCALARS = ("loss", "total_l2", "loss_scale", "clip_coef")


def folder_for(path: str | os.PathLike[str], resume: bool) -> tuple[str, int]:
    """The folder of a run, created if need be, and the number of its next shard.

    Raises UsageError when it already holds shards and ``resume`` is False.
    """
    folder = os.fspath(path)
    os.makedirs(folder, exist_ok=True)
    taken = [int(n[:-4]) for n in os.listdir(folder) if n.endswith(".npz") and n[:-4].isdigit()]
    if taken and not resume:
        raise UsageError(
            f"{folder} already holds {plural(len(taken), 'shard')} of a run; choose another "
            "folder, or pass resume=True to continue it"
        )
    return folder, max(taken, default=-1) + 1


@dataclass(slots=True)
class Record:
    """One record: what the host knows without asking, and what is still on the device."""

    step: int
    status: np.ndarray[Any, Any]
    rates: Sequence[float]
    #: The rows that had a gradient, and each statistic of them, [len(rows)].
    rows: Sequence[int]
    cells: dict[str, torch.Tensor] = field(default_factory=dict)
    scalars: dict[str, torch.Tensor | float] = field(default_factory=dict)
    #: [L, k]
    sketch: torch.Tensor | None = None
    skipped: bool = False


def drained(records: Sequence[Record], width: int) -> dict[str, np.ndarray[Any, Any]]:
    """The arrays of some records of ``width`` rows, by their keys in the file.

    The one place that waits for the device: one transfer of numbers, one of sketches.
    """
    fetched = _fetched(records)
    cells = {name: np.full((len(records), width), np.nan, np.float32) for name in CELLS}
    scalars = {name: np.full(len(records), np.nan) for name in SCALARS}
    for t, record in enumerate(records):
        rows = list(record.rows)
        for name in record.cells:
            cells[name][t, rows] = next(fetched)
        for name, value in record.scalars.items():
            scalars[name][t] = next(fetched)[0] if isinstance(value, torch.Tensor) else value
    return {
        "steps": np.array([r.step for r in records], dtype=np.int64),
        "grad/status": np.stack([r.status for r in records]),
        "skipped": np.array([r.skipped for r in records], dtype=np.uint8),
        "lr": _padded([r.rates for r in records]),
        **cells,
        **scalars,
        **_sketches(records),
    }


def _fetched(records: Sequence[Record]) -> Iterator[np.ndarray[Any, Any]]:
    """Every tensor of the records as an array, in order."""
    waiting = [
        value.reshape(-1).float()
        for record in records
        for value in (*record.cells.values(), *record.scalars.values())
        if isinstance(value, torch.Tensor)
    ]
    if waiting:
        values = torch.cat(waiting).cpu().numpy()
        yield from np.split(values, np.cumsum([len(w) for w in waiting])[:-1])


def _sketches(records: Sequence[Record]) -> dict[str, np.ndarray[Any, Any]]:
    index = [t for t, record in enumerate(records) if record.sketch is not None]
    found = [record.sketch for record in records if record.sketch is not None]
    if not found:
        return {}
    values = torch.stack(found).cpu().numpy()
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
    counted = not np.isnan(arrays["grad/n_nan"]).all()
    for name in COUNTS:
        counts = np.nan_to_num(arrays.pop(name), nan=-1).astype(np.int64)
        arrays |= {name: counts} if counted else {}
    optional = (*SCALARS, "param/l2", "update/l2", "update/grad_cos", "lr", "grad/zero_frac")
    kept = {
        k: v
        for k, v in arrays.items()
        if k not in optional or np.isfinite(v).any() or (k == "loss" and _is_known(v))
    }
    write(path, kept, meta)


def _is_known(values: np.ndarray[Any, Any]) -> bool:
    return bool(np.isinf(values).any())
