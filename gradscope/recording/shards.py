"""The records of a run on their way to disk: where they were taken until there are enough."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from gradscope.errors import UsageError
from gradscope.histories.format import write_next
from gradscope.histories.history import Status
from gradscope.text import plural

Array = np.ndarray[Any, Any]
Number = torch.Tensor | float

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


def status_of(parameters: Sequence[torch.Tensor]) -> Array:
    """``Status`` of each parameter now, uint8."""
    return np.array(
        [
            Status.RECORDED if p.grad is not None
            else Status.NONE if p.requires_grad else Status.FROZEN
            for p in parameters
        ],
        dtype=np.uint8,
    )  # fmt: skip


@dataclass(slots=True)
class Part:
    """What one record says of the parameters of one optimizer that were measured together."""

    owner: int
    #: Rows of the file, and the ``Status`` of each.
    rows: Array
    status: Array
    #: Which of the rows have values, all where None.
    place: Sequence[int] | None = None
    #: Statistics of the rows that have values, [values, names], and the names; ``sketch`` [values,
    #: k] is theirs, too.
    tables: list[tuple[tuple[str, ...], Any]] = field(default_factory=list)
    sketch: Any = None
    #: Or names and a place in a block of records, whose rows have statistics and then a sketch.
    block: tuple[tuple[str, ...], Array, int] | None = None
    #: The loss scale that the gradients still carried, None when they did not.
    scale: Number | None = None
    #: What measures the step that is to come, and the gradients it needs.
    measured: Any = None
    gradients: list[torch.Tensor] = field(default_factory=list)

    def unpack(self) -> None:
        """Make the place in a block a table and a sketch."""
        if self.block is not None:
            names, block, slot = self.block
            self.tables = [(names, block[slot, :, : len(names)])]
            if block.shape[2] > len(names):
                self.sketch = block[slot, :, len(names) :]

    @property
    def valued(self) -> bool:
        """Whether any row has values."""
        return self.block is not None or bool(self.tables)

    @property
    def places(self) -> Array:
        """The rows that have values."""
        return self.rows if self.place is None else self.rows[list(self.place)]


@dataclass(slots=True)
class Record:
    """One record: what the host knows without asking, and what is still on the device."""

    step: int
    rates: Sequence[float]
    parts: list[Part] = field(default_factory=list)
    scalars: dict[str, Number] = field(default_factory=dict)
    #: By optimizer.
    losses: dict[int, Number] = field(default_factory=dict)
    #: Whether one capture saw the gradients of every optimizer.
    whole: bool = True
    skipped: bool = False


def drained(records: Sequence[Record], width: int, optimizers: int) -> dict[str, Array]:
    """The arrays of some records of ``width`` rows, by their keys in the file.

    The one place that waits for the device: one transfer of numbers, one of sketches.
    """
    for record in records:
        for part in record.parts:
            part.unpack()
    fetch = _fetched(records)
    cells = {name: np.full((len(records), width), np.nan, np.float32) for name in CELLS}
    scalars = {name: np.full(len(records), np.nan) for name in SCALARS}
    losses = np.full((len(records), max(1, optimizers)), np.nan)
    status = np.full((len(records), width), Status.NOT_RECORDED, np.uint8)
    alike = list(_alike((t, p) for t, r in enumerate(records) for p in r.parts))
    for these, parts in alike:
        status[np.ix_(np.array(these), parts[0].rows)] = [part.status for part in parts]
        where = np.ix_(np.array(these), parts[0].places)
        for i, (names, _) in enumerate(parts[0].tables):
            values = np.stack([fetch(part.tables[i][1]) for part in parts])
            scale = np.array([1.0 if p.scale is None else fetch(p.scale) for p in parts])
            for name, column in zip(names, np.moveaxis(values, -1, 0), strict=True):
                cells[name][where] = column / scale[:, None] if name in _SCALED else column
    for t, record in enumerate(records):
        for name, number in record.scalars.items():
            scalars[name][t] = fetch(number)
        for owner, number in record.losses.items():
            losses[t, owner] = fetch(number)
    whole = np.array([record.whole for record in records])
    total = np.where(whole, _total(cells["grad/l2"], status), np.nan)
    most = scalars.pop("max_norm")
    with np.errstate(invalid="ignore"):
        clipped = np.fmin(1.0, most / (total + 1e-6))
    scalars["clip_coef"] = np.where(np.isnan(most), scalars["clip_coef"], clipped)
    return {
        "steps": np.array([r.step for r in records], dtype=np.int64),
        "grad/status": status,
        "skipped": np.array([r.skipped for r in records], dtype=np.uint8),
        "lr": _padded([r.rates for r in records]),
        "loss": np.where(whole, losses[:, 0], np.nan),
        "total_l2": total,
        **({"optimizer/loss": losses} if optimizers > 1 else {}),
        **cells,
        **scalars,
        **_sketches(alike, width),
    }


def _alike(parts: Iterable[tuple[int, Part]]) -> Iterator[tuple[list[int], list[Part]]]:
    """Parts that say the same of the same rows together, and the records they are of."""
    found: dict[Any, tuple[list[int], list[Part]]] = {}
    for t, part in parts:
        place = None if part.place is None else tuple(part.place)
        names = tuple([names for names, _ in part.tables])
        key = (part.rows.tobytes(), place, names, part.sketch is None)
        these, alike = found.setdefault(key, ([], []))
        these.append(t)
        alike.append(part)
    yield from found.values()


def _total(l2: Array, status: Array) -> Array:
    """The norm of all gradients, [T]; NaN where one is, or where there is none."""
    recorded = status == Status.RECORDED
    squares = np.where(recorded, l2.astype(np.float64) ** 2, 0.0).sum(axis=1)
    return np.where(recorded.any(axis=1), np.sqrt(squares), np.nan)


def _fetched(records: Sequence[Record]) -> Any:
    """A look-up of every number of the records, and of every table as an array."""
    values = [
        value
        for record in records
        for value in (
            *(v for part in record.parts for v in (*(t for _, t in part.tables), part.scale)),
            *record.scalars.values(),
            *record.losses.values(),
        )
    ]
    found = _transferred(values, torch.float32)
    return lambda value: found.get(id(value), value)


def _transferred(values: Iterable[Any], dtype: torch.dtype) -> dict[int, Array]:
    """The tensors among some values as arrays, by identity; one transfer for each device."""
    waiting: dict[torch.device, dict[int, torch.Tensor]] = {}
    for value in values:
        if isinstance(value, torch.Tensor):
            waiting.setdefault(value.device, {})[id(value)] = value
    found: dict[int, Array] = {}
    for those in waiting.values():
        flat = torch.cat([t.reshape(-1).to(dtype) for t in those.values()]).cpu().numpy()
        begin = 0
        for place, tensor in those.items():
            end = begin + tensor.numel()
            found[place], begin = flat[begin:end].reshape(tensor.shape), end
    return found


def _sketches(alike: Sequence[tuple[list[int], list[Part]]], width: int) -> dict[str, Array]:
    having = [(these, parts) for these, parts in alike if parts[0].sketch is not None]
    if not having:
        return {}
    found = _transferred((p.sketch for _, parts in having for p in parts), torch.float16)
    index = sorted({t for these, _ in having for t in these})
    place = {t: i for i, t in enumerate(index)}
    out = np.zeros((len(index), width, having[0][1][0].sketch.shape[1]), np.float16)
    for these, parts in having:
        values = np.stack([found.get(id(p.sketch), p.sketch) for p in parts])
        out[np.ix_(np.array([place[t] for t in these]), parts[0].places)] = _half(values)
    return {"grad/sketch": out, "grad/sketch_index": np.array(index, dtype=np.int64)}


def _half(values: Array) -> Array:
    """Float16, which torch converts several at once and NumPy one by one."""
    found: Array = torch.from_numpy(values).half().numpy()
    return found


def _padded(rates: Sequence[Sequence[float]]) -> Array:
    out = np.full((len(rates), max((len(r) for r in rates), default=0)), np.nan)
    for row, values in zip(out, rates, strict=True):
        row[: len(values)] = values
    return out


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
