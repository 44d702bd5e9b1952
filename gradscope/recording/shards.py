"""A run's folder of shards, and what is written into one."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from gradscope.errors import UsageError
from gradscope.histories.format import write_next
from gradscope.recording.columns import COUNTS
from gradscope.recording.records import Array
from gradscope.text import plural


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


def save(
    folder: str,
    number: int,
    drained: Mapping[str, Array],
    layers: Mapping[str, Array],
    meta: Mapping[str, Any],
) -> int:
    """Write one shard, at ``number`` or the next that is free; returns the one it got.

    What no record of it has is left out.
    """
    return write_next(folder, number, dict(_kept({**layers, **drained})), meta)


def _kept(arrays: dict[str, Array]) -> Iterator[tuple[str, Array]]:
    nonzero = arrays.pop("nonzero")
    sizes = np.maximum(arrays["layer/numel"], 1).astype(np.float32)
    arrays["grad/zero_frac"] = np.where(np.isnan(nonzero), np.nan, 1 - nonzero / sizes).astype(
        np.float32
    )
    counted = not np.isnan(arrays["grad/n_nan"]).all()
    for name in COUNTS:
        counts = np.nan_to_num(arrays.pop(name), nan=-1).astype(np.int64)
        arrays |= {name: counts} if counted else {}
    losses = ("loss", "optimizer/loss")
    optional = ("loss_scale", "clip_coef", "total_l2", "param/l2", "update/l2", "update/grad_cos",
                "lr", "grad/zero_frac", *losses)  # fmt: skip
    for name, values in arrays.items():
        known = name not in optional or np.isfinite(values).any()
        if known or (name in losses and np.isinf(values).any()):
            yield name, values
