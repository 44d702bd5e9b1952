"""Records as the arrays of a shard; the one place that waits for the device."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
import torch

from gradscope.histories.history import Status
from gradscope.recording import flat
from gradscope.recording.records import Array, Part, Record, Tensor

#: Statistics of every cell and of every record, by their keys in the file. ``nonzero`` is counted;
#: the file has the share of zeros.
COUNTS = ("grad/n_nan", "grad/n_inf")
CELLS = (
    "grad/l2", "grad/max_abs", "nonzero", "param/l2", "update/l2", "update/grad_cos", *COUNTS,
)  # fmt: skip
#: What a record may be given; ``max_norm`` becomes the coefficient of clipping.
SCALARS = ("loss_scale", "clip_coef", "max_norm")
#: What gradients that still carry the loss scale are divided by it for.
_SCALED = ("grad/l2", "grad/max_abs")

#: A number or a table, where the host has it.
Fetch = Callable[[Any], Any]


class Batch(NamedTuple):
    """What some records say of the same rows."""

    #: Records, and rows of the file.
    these: Array
    rows: Array
    #: Values of each statistic, [records, rows]; sketches [records, rows, k], which may be none.
    cells: dict[str, Array]
    sketch: Array | None


def drained(records: Sequence[Record], width: int, optimizers: int) -> dict[str, Array]:
    """The arrays of some records of ``width`` rows, by their keys in the file.

    Waits twice for each device: for numbers, and for sketches.
    """
    fetch = _fetched(records)
    batches = [_batch(these, parts, fetch) for these, parts in _alike(records)]
    cells = {name: np.full((len(records), width), np.nan, np.float32) for name in CELLS}
    for batch in batches:
        where = np.ix_(batch.these, batch.rows)
        for name, values in batch.cells.items():
            cells[name][where] = values
    status = _status(records, width)
    whole = np.array([record.whole for record in records])
    losses = _losses(records, optimizers, fetch)
    total = np.where(whole, _total(cells["grad/l2"], status), np.nan)
    return {
        "steps": np.array([r.step for r in records], dtype=np.int64),
        "grad/status": status,
        "skipped": np.array([r.skipped for r in records], dtype=np.uint8),
        "lr": _padded([r.rates for r in records]),
        "loss": np.where(whole, losses[:, 0], np.nan),
        "total_l2": total,
        **({"optimizer/loss": losses} if optimizers > 1 else {}),
        **cells,
        **_scalars(records, total, fetch),
        **_sketches(batches, width),
    }


def _alike(records: Sequence[Record]) -> Iterable[tuple[Array, list[Part]]]:
    """Parts that have the same statistics of the same rows, and the records they are of."""
    found: dict[Any, tuple[list[int], list[Part]]] = {}
    for t, record in enumerate(records):
        for part in record.parts:
            if part.valued:
                names = tuple([names for names, _ in part.tables])
                key = part.rows.tobytes(), tuple(part.place), names, part.sketch is None
                these, alike = found.setdefault(key, ([], []))
                these.append(t)
                alike.append(part)
    return [(np.array(these), alike) for these, alike in found.values()]


def _batch(these: Array, parts: Sequence[Part], fetch: Fetch) -> Batch:
    first = parts[0]
    if first.block is None:
        names = [name for names, _ in first.tables for name in names]
        values = [
            np.stack([fetch(p.tables[i][1]) for p in parts]) for i in range(len(first.tables))
        ]
        table, rows = np.concatenate(values, axis=2), first.rows[list(first.place)]
        sketch = None if first.sketch is None else np.stack([fetch(p.sketch) for p in parts])
    else:
        names, rows = list(flat.CELLS), first.rows
        blocks = np.concatenate(list(_from_blocks(parts)))
        table, rest = np.split(blocks, [len(names)], axis=2)
        sketch = rest if rest.shape[2] else None
    cells = dict(zip(names, np.moveaxis(table, 2, 0), strict=True))
    if any(part.scale is not None for part in parts):
        scale = np.array([1.0 if p.scale is None else fetch(p.scale) for p in parts])[:, None]
        cells |= {name: cells[name] / scale for name in _SCALED}
    return Batch(these, rows, cells, sketch)


def _from_blocks(parts: Sequence[Part]) -> Iterator[Array]:
    """The numbers of parts on the host, [records, rows, numbers], a block at a time."""
    for _, those in groupby(parts, key=lambda part: id(part.block)):
        inside = list(those)
        if (block := inside[0].block) is not None:
            yield block[[part.slot for part in inside]]


def _status(records: Sequence[Record], width: int) -> Array:
    """``Status`` of every cell, [T, L]."""
    alike: dict[int, tuple[Part, list[int]]] = {}
    for t, record in enumerate(records):
        for part in record.parts:
            alike.setdefault(id(part.status), (part, []))[1].append(t)
    status = np.full((len(records), width), Status.NOT_RECORDED, np.uint8)
    for part, these in alike.values():
        status[np.ix_(np.array(these), part.rows)] = part.status
    return status


def _total(l2: Array, status: Array) -> Array:
    """The norm of all gradients, [T]; NaN where one is, or where there is none."""
    recorded = status == Status.RECORDED
    squares = np.where(recorded, l2.astype(np.float64) ** 2, 0.0).sum(axis=1)
    return np.where(recorded.any(axis=1), np.sqrt(squares), np.nan)


def _losses(records: Sequence[Record], optimizers: int, fetch: Fetch) -> Array:
    """The loss of each optimizer's step, [T, optimizers]."""
    losses = np.full((len(records), max(1, optimizers)), np.nan)
    for t, record in enumerate(records):
        for owner, number in record.losses:
            losses[t, owner] = fetch(number)
    return losses


def _scalars(records: Sequence[Record], total: Array, fetch: Fetch) -> dict[str, Array]:
    """The loss scale and the coefficient of clipping, which follows from its limit, [T] each."""
    found = {name: np.full(len(records), np.nan) for name in SCALARS}
    for t, record in enumerate(records):
        for name, number in record.scalars:
            found[name][t] = fetch(number)
    most = found.pop("max_norm")
    with np.errstate(invalid="ignore"):
        clipped = np.fmin(1.0, most / (total + 1e-6))
    return found | {"clip_coef": np.where(np.isnan(most), found["clip_coef"], clipped)}


def _sketches(batches: Sequence[Batch], width: int) -> dict[str, Array]:
    having = [(b.these, b.rows, b.sketch) for b in batches if b.sketch is not None]
    if not having:
        return {}
    index = np.unique(np.concatenate([these for these, _, _ in having]))
    out = np.zeros((len(index), width, having[0][2].shape[2]), np.float16)
    for these, rows, sketch in having:
        # NumPy would convert to float16 one by one.
        out[np.ix_(np.searchsorted(index, these), rows)] = torch.from_numpy(sketch).half().numpy()
    return {"grad/sketch": out, "grad/sketch_index": index}


def _padded(rates: Sequence[Sequence[float]]) -> Array:
    out = np.full((len(rates), max((len(r) for r in rates), default=0)), np.nan)
    for row, values in zip(out, rates, strict=True):
        row[: len(values)] = values
    return out


def _fetched(records: Sequence[Record]) -> Fetch:
    """A look-up of all that is on a device, as arrays; anything else is itself."""
    parts = [part for record in records for part in record.parts]
    numbers = [v for p in parts for v in (*(t for _, t in p.tables), p.scale)]
    given = [v for r in records for _, v in (*r.scalars, *r.losses)]
    found = _transferred((*numbers, *given), torch.float32)
    found |= _transferred((part.sketch for part in parts), torch.float16)
    return lambda value: found.get(id(value), value)


def _transferred(values: Iterable[Any], dtype: torch.dtype) -> dict[int, Array]:
    """The tensors among some values as arrays, by identity; one transfer for each device."""
    waiting: dict[torch.device, dict[int, Tensor]] = {}
    for value in values:
        if isinstance(value, Tensor):
            waiting.setdefault(value.device, {})[id(value)] = value
    found: dict[int, Array] = {}
    for those in waiting.values():
        flat_ = torch.cat([t.reshape(-1).to(dtype) for t in those.values()]).cpu().numpy()
        begin = 0
        for place, tensor in those.items():
            end = begin + tensor.numel()
            found[place], begin = flat_[begin:end].reshape(tensor.shape), end
    return found
