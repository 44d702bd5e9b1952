"""What the columns of a table mean, and its rows as a history.

A row is one value (long: step, layer, value) or one step (wide: a column for each parameter).
"""

from __future__ import annotations

import math
import os
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradscope.errors import InputError
from gradscope.histories.history import History, Layer, Status
from gradscope.histories.names import (
    ONLY_TOTAL,
    clean,
    gradient_of,
    guessed_kind,
    is_loss,
    is_rate,
    is_total,
)
from gradscope.histories.steps import ordered
from gradscope.text import plural, quoted

#: Names of columns, the likeliest first.
STEP = (
    "step", "global_step", "_step", "trainer/global_step", "train/global_step", "steps",
    "iteration", "iter", "batch",
)  # fmt: skip
_LAYER = ("param", "parameter", "layer", "layer_name", "name", "module", "tag")
_VALUE = (
    "grad_norm", "l2", "l2_norm", "norm", "gradient_norm", "magnitude", "grad_l2", "value",
)  # fmt: skip
#: What writers put where there is no value.
_EMPTY = frozenset(("", "null", "none", "na", "n/a"))
#: Weights & Biases' history() samples this many rows unless told otherwise.
_SAMPLED = 500
#: A table with more cells is refused when it has more than so many for each value.
_MOST_CELLS, _MOST_SPARSE = 50_000_000, 64

Row = tuple[int, tuple[str, ...], Sequence[Any]]
_Integers = NDArray[np.int64]
_Reals = NDArray[np.float64]


def named(columns: Iterable[str], names: Sequence[str]) -> str | None:
    """The column that has the likeliest of some names, in any case."""
    lowered = {column.lower().strip(): column for column in columns}
    return next((lowered[name] for name in names if name in lowered), None)


def is_known(name: str) -> bool:
    """Whether a column's name says what it holds."""
    return (
        gradient_of(name) is not None
        or name.lower() in STEP
        or any(known(name) for known in (is_loss, is_rate, is_total))
    )


@dataclass(frozen=True, slots=True)
class _Plan:
    """Which cells of a row are what, by place; made once for each header."""

    step: int
    #: Long rows: where the layer's name and its value are.
    layer: int | None
    value: int | None
    #: Places of values that are the row's own: all norms of wide rows, the loss of any.
    quantities: tuple[tuple[int, _Quantity], ...]


@dataclass(slots=True)
class _Quantity:
    """One thing that was logged, such as a layer's norm or the loss: values and their records."""

    records: array[int] = field(default_factory=lambda: array("q"))
    values: array[float] = field(default_factory=lambda: array("d"))

    def add(self, record: int, value: float) -> None:
        self.records.append(record)
        self.values.append(value)


@dataclass(slots=True)
class Table:
    """Values as they come: records in file order, layers in order of appearance."""

    path: str
    rows: int = 0
    long: bool = False
    #: The step of each record.
    steps: array[int] = field(default_factory=lambda: array("q"))
    layers: dict[str, _Quantity] = field(default_factory=dict)
    rates: dict[str, _Quantity] = field(default_factory=dict)
    loss: _Quantity = field(default_factory=_Quantity)
    total: _Quantity = field(default_factory=_Quantity)
    sizes: dict[str, int] = field(default_factory=dict)
    binned: int = 0
    notes: list[str] = field(default_factory=list)
    plans: dict[tuple[str, ...], _Plan] = field(default_factory=dict)

    def history(self, form: str, rows: Iterable[Row]) -> History:
        """All rows as a history. Raises InputError."""
        for row in rows:
            self._add(*row)
        self._refuse_nothing()
        return self._joined(form)

    def _add(self, number: int, columns: tuple[str, ...], row: Sequence[Any]) -> None:
        self.rows += 1
        plan = self.plans.get(columns) or self._plan(number, columns)
        step = self._number(number, columns, row, plan.step) if plan.step < len(row) else None
        if step is None:
            return
        if not step.is_integer() or abs(step) >= 2**62:
            message = f"row {number}: {columns[plan.step]} is {quoted(str(row[plan.step]), 40)}"
            raise InputError(self.path, "malformed", f"{message}, which is not a whole number")
        record = self._record(int(step))
        if plan.layer is not None and plan.value is not None:
            self._add_long(number, columns, row, plan, record)
        for place, quantity in plan.quantities:
            if place < len(row):
                value = self._number(number, columns, row, place)
                if value is not None:
                    quantity.add(record, value)

    def _add_long(
        self, number: int, columns: tuple[str, ...], row: Sequence[Any], plan: _Plan, record: int
    ) -> None:
        assert plan.layer is not None
        assert plan.value is not None
        if max(plan.layer, plan.value) >= len(row):
            return
        name = str(row[plan.layer])
        if not name.strip():
            message = (
                f"row {number}: {columns[plan.layer]} is empty, so the value belongs to no layer"
            )
            raise InputError(self.path, "malformed", message)
        value = self._number(number, columns, row, plan.value)
        if value is not None:
            self.layers.setdefault(name, _Quantity()).add(record, value)

    def _record(self, step: int) -> int:
        """Rows of one step that follow each other are one record."""
        if not self.steps or self.steps[-1] != step:
            self.steps.append(step)
        return len(self.steps) - 1

    def _plan(self, number: int, columns: tuple[str, ...]) -> _Plan:
        step = named(columns, STEP)
        if step is None:
            message = f"row {number} has no step: name its column one of {', '.join(STEP[:4])}"
            raise InputError(self.path, "malformed", message)
        layer, value = named(columns, _LAYER), named(columns, _VALUE)
        long = layer is not None and value is not None
        self.long |= long
        self.plans[columns] = plan = _Plan(
            columns.index(step),
            columns.index(layer) if long and layer is not None else None,
            columns.index(value) if long and value is not None else None,
            tuple(self._wide(columns, long)),
        )
        return plan

    def _wide(self, columns: tuple[str, ...], long: bool) -> Iterator[tuple[int, _Quantity]]:
        seen = set()
        for place, column in enumerate(columns):
            if is_loss(column):
                yield place, self.loss
            elif is_rate(column):
                yield place, self.rates.setdefault(column, _Quantity())
            elif long:
                continue
            elif (name := gradient_of(column)) is not None:
                if name in seen:
                    message = f"has two columns for {quoted(name)}: {quoted(column)} is the second"
                    raise InputError(self.path, "malformed", message)
                seen.add(name)
                yield place, self.layers.setdefault(name, _Quantity())
            elif is_total(column):
                yield place, self.total

    def _number(
        self, number: int, columns: tuple[str, ...], row: Sequence[Any], place: int
    ) -> float | None:
        """A cell; None when it is empty. NaN and infinity in any spelling are data."""
        value = row[place]
        try:
            return float(value)
        except (TypeError, ValueError, OverflowError):
            if value is None or (isinstance(value, str) and value.strip().lower() in _EMPTY):
                return None
        found = _binned(value)
        if found is None:
            message = f"row {number}, column {quoted(columns[place])}: {quoted(str(value), 40)}"
            raise InputError(self.path, "malformed", f"{message} is not a number")
        self.binned += 1
        if (name := gradient_of(columns[place])) is not None:
            self.sizes[name] = found[1]
        return found[0]

    # --- the whole ---

    def _refuse_nothing(self) -> None:
        if not self.rows:
            raise InputError(self.path, "malformed", "has no rows")
        if not self.layers and not self.total.values:
            message = (
                "has no column of gradient norms: name them step,layer,value (one row per value), "
                "or grad_norm/NAME (one column per parameter)"
            )
            raise InputError(self.path, "malformed", message)

    def _joined(self, form: str) -> History:
        steps, place = self._long_order() if self.long else self._wide_order()
        filled = sum(len(quantity.values) for quantity in self.layers.values())
        wanted = len(steps) * len(self.layers)
        if wanted > _MOST_CELLS and wanted > _MOST_SPARSE * filled:
            message = (
                f"has {plural(filled, 'value')} for {plural(len(steps), 'step')} of "
                f"{plural(len(self.layers), 'layer')}: too sparse to be held as a table"
            )
            raise InputError(self.path, "unsupported", message)
        norms = np.full((len(steps), len(self.layers)), np.nan)
        status = np.full(norms.shape, Status.NOT_RECORDED, np.uint8)
        for row, (name, quantity) in enumerate(self.layers.items()):
            at, values = self._placed(quantity, place)
            self._refuse_negative(name, quantity)
            norms[at, row], status[at, row] = values, Status.RECORDED
        return History(
            path=self.path,
            format=form,
            nbytes=os.path.getsize(self.path),
            steps=steps,
            layers=tuple(Layer(clean(n), guessed_kind(n), self.sizes.get(n)) for n in self.layers),
            l2=norms,
            status=status,
            loss=self._line(self.loss, place, len(steps)),
            total_l2=self._line(self.total, place, len(steps)),
            lr=self._rates(place, len(steps)),
            notes=(*self.notes, *self._said()),
            approximate={"l2": "from histogram bins"} if self.binned else {},
        )

    def _said(self) -> Iterator[str]:
        if self.rows == _SAMPLED:
            yield "exactly 500 rows: W&B's history() samples that many, so export the whole run"
        if self.binned:
            yield (
                "norms are computed from the middles of histogram bins and are approximate; W&B "
                "leaves NaN and infinity out of its histograms"
            )
        if not self.layers:
            yield ONLY_TOTAL

    def _wide_order(self) -> tuple[_Integers, _Integers]:
        """The kept steps, and the place of each record among them (-1: superseded)."""
        steps = np.frombuffer(self.steps, np.int64) if self.steps else np.empty(0, np.int64)
        chosen, notes = ordered(steps, note_repeats=False)
        self.notes += notes
        return steps[chosen], _places(steps, steps[chosen])

    def _long_order(self) -> tuple[_Integers, _Integers]:
        """The same where each layer has its own rows: it alone shows whether it restarts."""
        steps = np.frombuffer(self.steps, np.int64) if self.steps else np.empty(0, np.int64)
        kept, said = [], []
        for quantity in self.layers.values():
            records = np.frombuffer(quantity.records, np.int64)
            chosen, notes = ordered(steps[records])
            said += notes
            if len(chosen) < len(records):
                quantity.records = array("q", records[chosen].tobytes())
                quantity.values = array("d", np.frombuffer(quantity.values)[chosen].tobytes())
            kept.append(steps[records[chosen]])
        unique = list(dict.fromkeys(said))
        self.notes += unique[:1]
        if len(said) > 1:
            self.notes[-1] += f" (in the first of {len(said)} such series)"
        whole = np.unique(np.concatenate(kept)) if kept else np.empty(0, np.int64)
        return whole, _places(steps, whole)

    def _placed(self, quantity: _Quantity, place: _Integers) -> tuple[_Integers, _Reals]:
        """Where the values go, without those of superseded records; later ones win."""
        at = place[np.frombuffer(quantity.records, np.int64)] if quantity.records else place[:0]
        values = np.frombuffer(quantity.values) if quantity.values else np.empty(0)
        return at[at >= 0], values[at >= 0]

    def _refuse_negative(self, name: str, quantity: _Quantity) -> None:
        values = np.frombuffer(quantity.values) if quantity.values else np.empty(0)
        if len(low := np.flatnonzero(values < 0)):
            step = self.steps[quantity.records[int(low[0])]]
            message = f"the norm of {quoted(name)} at step {step} is {values[low[0]]}, below zero"
            raise InputError(self.path, "malformed", message)

    def _line(self, quantity: _Quantity, place: _Integers, count: int) -> _Reals | None:
        if not quantity.values:
            return None
        out = np.full(count, np.nan)
        at, values = self._placed(quantity, place)
        out[at] = values
        return out

    def _rates(self, place: _Integers, count: int) -> _Reals | None:
        lines = [self._line(quantity, place, count) for quantity in self.rates.values()]
        known = [line for line in lines if line is not None]
        return np.stack(known, axis=1) if known else None


def _places(steps: _Integers, kept: _Integers) -> _Integers:
    if not len(kept):
        return np.full(len(steps), -1)
    at = np.minimum(np.searchsorted(kept, steps), len(kept) - 1)
    return np.where(kept[at] == steps, at, -1)


def _binned(value: object) -> tuple[float, int] | None:
    """The L2 norm and the number of elements of W&B's histogram of a gradient."""
    if not isinstance(value, Mapping):
        return None
    try:
        counts = [float(count) for count in value["values"]]
        edges = _edges(value, len(counts))
        squares = (
            n * ((low + high) / 2) ** 2
            for n, (low, high) in zip(counts, pairwise(edges), strict=True)
        )
        return math.sqrt(sum(squares)), int(sum(counts))
    except (KeyError, TypeError, ValueError, OverflowError):
        return None


def _edges(value: Mapping[str, Any], count: int) -> list[float]:
    packed = value.get("packedBins")
    if not packed:
        return [float(edge) for edge in value["bins"]]
    return [float(packed["min"]) + i * float(packed["size"]) for i in range(count + 1)]
