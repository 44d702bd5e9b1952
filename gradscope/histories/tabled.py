"""A table of values, all rows read, as a history: its records in order, its layers, its losses."""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

from gradscope.errors import InputError
from gradscope.histories.cells import Quantity
from gradscope.histories.columns import Row, Table
from gradscope.histories.history import History, Layer, Status
from gradscope.histories.names import (
    ONLY_LOSS,
    ONLY_TOTAL,
    Role,
    clean,
    guessed_kind,
    in_depth,
    likeliest,
    plain_layers,
)
from gradscope.histories.steps import carried, chosen_records, ordered
from gradscope.text import listed, plural, quoted

#: Weights & Biases' history() samples this many rows unless told otherwise.
_SAMPLED = 500
#: A table with more cells is refused when it has more than so many for each value.
_MOST_CELLS, _MOST_SPARSE = 50_000_000, 64

_Integers = NDArray[np.int64]
_Reals = NDArray[np.float64]


def history_of(table: Table, form: str, rows: Iterable[Row]) -> History:
    """All rows as a history. Raises InputError, and UsageError for rows of several runs."""
    for row in rows:
        table.add(*row)
    _settle_plain(table)
    _add_up(table)
    _refuse_nothing(table)
    return _joined(table, form)


def _settle_plain(table: Table) -> None:
    """Series without a telling name are layers where no other is, and where they can be."""
    found = {name: q for name, q in table.plain.items() if q.values}
    table.plain.clear()
    if table.layers or not found:
        return
    if not table.long:
        found = {name: q for name, q in found.items() if not (q.numbers < 0).any()}
    elif table.tagged:
        kept = plain_layers([*found, *(n for by in table.whole.values() for n in by)])
        found = {name: found[name] for name in kept}
    if found and not table.long:
        names = listed(map(quoted, found), len(found), most=5)
        table.notes.append(f"taken as gradient norms, as no column says that it is: {names}")
    table.layers = found


def _add_up(table: Table) -> None:
    """The loss of training from its parts, where only those were written."""
    if not table.parts or any(quantity.values for quantity in _of(table, "loss").values()):
        return
    each = [dict(zip(q.at.tolist(), q.numbers.tolist(), strict=True)) for q in table.parts.values()]
    names = listed(map(quoted, table.parts), len(table.parts))
    total = table.whole.setdefault("loss", {}).setdefault(names, Quantity())
    for record in sorted(set.intersection(*map(set, each))):
        total.add(record, sum(part[record] for part in each))
    table.notes.append(f"the loss is the sum of {names}")


def _refuse_nothing(table: Table) -> None:
    if not table.rows:
        raise InputError(table.path, "malformed", "has no rows")
    known = (quantity for name in ("total", "loss") for quantity in _of(table, name).values())
    if not table.layers and not any(quantity.values for quantity in known):
        message = (
            "has no column of gradient norms: name them step,layer,value (one row per value), "
            "or grad_norm/NAME (one column per parameter)"
        )
        raise InputError(table.path, "malformed", message)


def _of(table: Table, role: Role) -> dict[str, Quantity]:
    return table.whole.get(role, {})


def _joined(table: Table, form: str) -> History:
    steps, place = _long_order(table) if table.long else _wide_order(table)
    steps, place = _recorded(table, steps, place)
    if not any(plan.step is not None for plan in table.plans.values()):
        table.notes.append("no steps in the file: records are numbered from 0")
    filled = sum(len(quantity.values) for quantity in table.layers.values())
    wanted = len(steps) * len(table.layers)
    if wanted > _MOST_CELLS and wanted > _MOST_SPARSE * filled:
        message = (
            f"has {plural(filled, 'value')} for {plural(len(steps), 'step')} of "
            f"{plural(len(table.layers), 'layer')}: too sparse to be held as a table"
        )
        raise InputError(table.path, "unsupported", message)
    names = in_depth(list(table.layers))
    norms = np.full((len(steps), len(names)), np.nan)
    status = np.full(norms.shape, Status.NOT_RECORDED, np.uint8)
    for row, name in enumerate(names):
        at, values = _placed(table.layers[name], place)
        _refuse_negative(table, name, table.layers[name])
        norms[at, row], status[at, row] = values, Status.RECORDED
    skipped = _line(table, "skipped", steps)
    return History(
        path=table.path,
        format=form,
        nbytes=os.path.getsize(table.path) if table.nbytes is None else table.nbytes,
        steps=steps,
        layers=tuple(Layer(clean(n), guessed_kind(n), table.sizes.get(n)) for n in names),
        l2=norms,
        status=status,
        loss=_line(table, "loss", steps),
        total_l2=_line(table, "total", steps),
        loss_scale=_line(table, "scale", steps),
        skipped=None if skipped is None else (np.nan_to_num(skipped) > 0).astype(np.uint8),
        lr=_rates(table, steps),
        notes=(*table.notes, *_said(table, steps)),
        failures=tuple(table.failures),
        approximate={"l2": "from histogram bins"} if table.binned else {},
    )


def _said(table: Table, steps: _Integers) -> Iterator[str]:
    if table.rows == _SAMPLED:
        yield "exactly 500 rows: W&B's history() samples that many, so export the whole run"
    if table.binned:
        yield (
            "norms are computed from the middles of histogram bins and are approximate; W&B "
            "leaves NaN and infinity out of its histograms"
        )
    if not table.layers:
        norms = any(quantity.values for quantity in _of(table, "total").values())
        yield ONLY_TOTAL if norms else ONLY_LOSS
    last = max(table.steps, default=0)
    if len(steps) and last > steps[-1] and likeliest(_of(table, "loss").items()):
        yield (
            f"the last gradient norm is of step {steps[-1]}: what the loss did after it, up to "
            f"step {last}, is not looked at"
        )


def _recorded(table: Table, steps: _Integers, place: _Integers) -> tuple[_Integers, _Integers]:
    """The steps that have a gradient, and the place of each record among them."""
    about = [*table.layers.values()] or [*_of(table, "total").values()]
    known = np.zeros(len(steps), bool)
    for quantity in about:
        at = place[quantity.at] if len(place) else quantity.at
        known[at[at >= 0]] = True
    chosen = chosen_records(known)
    new = np.where(chosen, np.cumsum(chosen) - 1, -1)
    return steps[chosen], np.where(place >= 0, new[place], -1) if len(new) else place


def _wide_order(table: Table) -> tuple[_Integers, _Integers]:
    """The kept steps, and the place of each record among them (-1: superseded)."""
    steps = _all_steps(table)
    chosen, notes = ordered(steps, note_repeats=False)
    table.notes += notes
    return steps[chosen], _places(steps, steps[chosen])


def _all_steps(table: Table) -> _Integers:
    return np.frombuffer(table.steps, np.int64) if table.steps else np.empty(0, np.int64)


def _long_order(table: Table) -> tuple[_Integers, _Integers]:
    """The same where each layer has its own rows: it alone shows whether it restarts."""
    steps = _all_steps(table)
    kept, said = [], []
    others = (quantity for by in table.whole.values() for quantity in by.values())
    for quantity in table.layers.values() or others:
        records = quantity.at
        chosen, notes = ordered(steps[records])
        said += notes
        if len(chosen) < len(records):
            values = quantity.numbers[chosen]
            quantity.records = array("q", records[chosen].tobytes())
            quantity.values = array("d", values.tobytes())
        kept.append(steps[records[chosen]])
    unique = list(dict.fromkeys(said))
    table.notes += unique[:1]
    if len(said) > 1:
        table.notes[-1] += f" (in the first of {len(said)} such series)"
    whole = np.unique(np.concatenate(kept)) if kept else np.empty(0, np.int64)
    return whole, _places(steps, whole)


def _placed(quantity: Quantity, place: _Integers) -> tuple[_Integers, _Reals]:
    """Where the values go, without those of superseded records; later ones win."""
    at = place[quantity.at] if quantity.records else place[:0]
    return at[at >= 0], quantity.numbers[at >= 0]


def _refuse_negative(table: Table, name: str, quantity: Quantity) -> None:
    values = quantity.numbers
    if len(low := np.flatnonzero(values < 0)):
        step = table.steps[quantity.records[int(low[0])]]
        message = f"the norm of {quoted(name)} at step {step} is {values[low[0]]}, below zero"
        raise InputError(table.path, "malformed", message)


def _line(table: Table, role: Role, steps: _Integers) -> _Reals | None:
    known = [(name, q) for name, q in _of(table, role).items() if q.values]
    quantity = likeliest(known)
    return None if quantity is None else _carried(table, quantity, steps)


def _carried(table: Table, quantity: Quantity, steps: _Integers) -> _Reals:
    """A series at the records; of values that repeat a step the last counts."""
    own = _all_steps(table)[quantity.at]
    chosen, _ = ordered(own, note_repeats=False)
    return carried(own[chosen], quantity.numbers[chosen], steps)


def _rates(table: Table, steps: _Integers) -> _Reals | None:
    known = [_carried(table, q, steps) for q in _of(table, "rate").values() if q.values]
    return np.stack(known, axis=1) if known else None


def _places(steps: _Integers, kept: _Integers) -> _Integers:
    if not len(kept):
        return np.full(len(steps), -1)
    at = np.minimum(np.searchsorted(kept, steps), len(kept) - 1)
    return np.where(kept[at] == steps, at, -1)
