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
    #: Which of the rows have values, all where None; ``cells`` [values] and ``sketch`` [values, k]
    #: are theirs.
    place: Sequence[int] | None = None
    cells: dict[str, Any] = field(default_factory=dict)
    sketch: Any = None
    #: The loss scale that the gradients still carried, None when they did not.
    scale: torch.Tensor | None = None
    #: What measures the step that is to come, and the gradients it needs.
    measured: Any = None
    gradients: list[torch.Tensor] = field(default_factory=list)

    @property
    def valued(self) -> Array:
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
    fetch = _fetched(records)
    cells = {name: np.full((len(records), width), np.nan, np.float32) for name in CELLS}
    scalars = {name: np.full(len(records), np.nan) for name in SCALARS}
    losses = np.full((len(records), max(1, optimizers)), np.nan)
    status = np.full((len(records), width), Status.NOT_RECORDED, np.uint8)
    for these, parts in _alike((t, p) for t, r in enumerate(records) for p in r.parts):
        status[np.ix_(np.array(these), parts[0].rows)] = [part.status for part in parts]
        where = np.ix_(np.array(these), parts[0].valued)
        for name in parts[0].cells:
            cells[name][where] = [_unscaled(name, part, fetch) for part in parts]
    for t, record in enumerate(records):
        for name, number in record.scalars.items():
            scalars[name][t] = fetch(number)[0]
        for owner, number in record.losses.items():
            losses[t, owner] = fetch(number)[0]
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
        **_sketches(records, width),
    }


def _alike(parts: Iterable[tuple[int, Part]]) -> Iterator[tuple[list[int], list[Part]]]:
    """Parts of the same rows with the same statistics together, and the records they are of."""
    found: dict[Any, tuple[list[int], list[Part]]] = {}
    for t, part in parts:
        place = None if part.place is None else tuple(part.place)
        key = (part.rows.tobytes(), place, tuple(part.cells))
        these, alike = found.setdefault(key, ([], []))
        these.append(t)
        alike.append(part)
    yield from found.values()


def _unscaled(name: str, part: Part, fetch: Any) -> Array:
    value: Array = fetch(part.cells[name])
    return value if part.scale is None or name not in _SCALED else value / fetch(part.scale)[0]


def _total(l2: Array, status: Array) -> Array:
    """The norm of all gradients, [T]; NaN where one is, or where there is none."""
    recorded = status == Status.RECORDED
    squares = np.where(recorded, l2.astype(np.float64) ** 2, 0.0).sum(axis=1)
    return np.where(recorded.any(axis=1), np.sqrt(squares), np.nan)


def _fetched(records: Sequence[Record]) -> Any:
    """A look-up of every number of the records as an array."""
    values = [
        value
        for record in records
        for value in (
            *(v for part in record.parts for v in (*part.cells.values(), part.scale)),
            *record.scalars.values(),
            *record.losses.values(),
        )
    ]
    found = _transferred([v for v in values if isinstance(v, torch.Tensor)], torch.float32)
    return lambda value: found[id(value)] if id(value) in found else np.atleast_1d(value)


def _transferred(tensors: Sequence[torch.Tensor], dtype: torch.dtype) -> dict[int, Array]:
    """Tensors as flat arrays, by their identity; those of a device come in one transfer."""
    waiting: dict[torch.device, dict[int, torch.Tensor]] = {}
    for tensor in tensors:
        waiting.setdefault(tensor.device, {})[id(tensor)] = tensor
    found: dict[int, Array] = {}
    for those in waiting.values():
        flat = torch.cat([t.reshape(-1).to(dtype) for t in those.values()]).cpu().numpy()
        ends = np.cumsum([t.numel() for t in those.values()])[:-1]
        found |= dict(zip(those, np.split(flat, ends), strict=True))
    return found


def _sketches(records: Sequence[Record], width: int) -> dict[str, Array]:
    having = [(t, p) for t, r in enumerate(records) for p in r.parts if p.sketch is not None]
    if not having:
        return {}
    found = _transferred(
        [p.sketch for _, p in having if isinstance(p.sketch, torch.Tensor)], torch.float16
    )
    index = list(dict.fromkeys(t for t, _ in having))
    place = {t: i for i, t in enumerate(index)}
    size = having[0][1].sketch.shape[1]
    out = np.zeros((len(index), width, size), np.float16)
    for these, parts in _alike(having):
        values = [found.get(id(p.sketch), p.sketch).reshape(-1, size) for p in parts]
        out[np.ix_(np.array([place[t] for t in these]), parts[0].valued)] = values
    return {"grad/sketch": out, "grad/sketch_index": np.array(index, dtype=np.int64)}


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
