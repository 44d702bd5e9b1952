"""What the columns of a table mean, and its rows as a history.

A row is one value (long: step, layer, value) or one step (wide: a column for each parameter).
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradscope.checkpoints.tensors import Failure
from gradscope.errors import InputError, UsageError
from gradscope.histories.cells import Quantity, binned, is_cell, is_empty
from gradscope.histories.history import History, Layer, Status
from gradscope.histories.names import (
    ONLY_LOSS,
    ONLY_TOTAL,
    STEP,
    Role,
    clean,
    exported,
    gradient_of,
    guessed_kind,
    in_depth,
    is_loss_part,
    likeliest,
    plain_layers,
    role_of,
    step_column,
)
from gradscope.histories.steps import carried, chosen_records, ordered
from gradscope.text import listed, plural, quoted

#: Names of columns of long tables, the likeliest first.
_LAYER = ("param", "parameter", "layer", "layer_name", "module", *(_TAG := ("name", "tag", "metric",
          "metric_name", "key", "variable")))  # fmt: skip
_VALUE = (
    "grad_norm", "l2", "l2_norm", "norm", "gradient_norm", "magnitude", "grad_l2", "gnorm", "value",
)  # fmt: skip
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


def is_long(columns: Iterable[str]) -> bool:
    """Whether a row with these columns is one value of one layer."""
    columns = list(columns)
    return named(columns, _LAYER) is not None and named(columns, _VALUE) is not None


@dataclass(frozen=True, slots=True)
class _Plan:
    """Which cells of a row are what, by place; made once for each header."""

    #: None for a table without steps, whose rows are numbered.
    step: int | None
    #: Long rows: where the layer's name and its value are.
    layer: int | None
    value: int | None
    #: Places of values that are the row's own: all norms of wide rows, the loss of any.
    quantities: tuple[tuple[int, Quantity], ...]


@dataclass(slots=True)
class Table:
    """Values as they come: records in file order, layers in order of appearance."""

    path: str
    #: Of several files, where the path is that of their folder.
    nbytes: int | None = None
    rows: int = 0
    #: Whether each series has its own rows.
    long: bool = False
    #: The step of each record.
    steps: array[int] = field(default_factory=lambda: array("q"))
    #: Gradient norms by name: those called so, and others that can be nothing else.
    layers: dict[str, Quantity] = field(default_factory=dict)
    plain: dict[str, Quantity] = field(default_factory=dict)
    #: What was logged of the run as a whole, by what it is and what it is called.
    whole: dict[Role, dict[str, Quantity]] = field(default_factory=dict)
    #: Losses that add up to that of training.
    parts: dict[str, Quantity] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    binned: int = 0
    notes: list[str] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    plans: dict[tuple[str, ...], _Plan] = field(default_factory=dict)
    tagged: bool = False
    #: The series of each name of a long table, found once.
    series: dict[str, Quantity] = field(default_factory=dict)

    def history(self, form: str, rows: Iterable[Row]) -> History:
        """All rows as a history. Raises InputError, and UsageError for rows of several runs."""
        for row in rows:
            self._add(*row)
        self._settle_plain()
        self._add_up()
        self._refuse_nothing()
        return self._joined(form)

    def _add(self, number: int, columns: tuple[str, ...], row: Sequence[Any]) -> None:
        self.rows += 1
        plan = self.plans.get(columns) or self._plan(number, columns, row)
        step = self._step(number, columns, row, plan)
        if step is None:
            return
        record = self._record(step)
        if plan.layer is not None and plan.value is not None:
            self._add_long(number, columns, row, plan, record)
        for place, quantity in plan.quantities:
            if place < len(row):
                value = self._number(number, columns, row, place)
                if value is not None:
                    quantity.add(record, value)

    def _step(
        self, number: int, columns: tuple[str, ...], row: Sequence[Any], plan: _Plan
    ) -> int | None:
        """The step of a row; None for one that has nothing to say of any."""
        if plan.step is None:
            return len(self.steps) if plan.quantities else None
        step = self._number(number, columns, row, plan.step) if plan.step < len(row) else None
        if step is None:
            return None
        if not step.is_integer() or abs(step) >= 2**62:
            message = f"row {number}: {columns[plan.step]} is {quoted(str(row[plan.step]), 40)}"
            raise InputError(self.path, "malformed", f"{message}, which is not a whole number")
        return int(step)

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
            if (series := self.series.get(name)) is None:
                series = self.series[name] = self._called(name)
            series.add(record, value)

    def _called(self, name: str) -> Quantity:
        """The series of a name: of the run as a whole, of a gradient, or of a layer."""
        if role := role_of(name):
            return self.whole.setdefault(role, {}).setdefault(name, Quantity())
        gradient = gradient_of(name)
        if gradient is not None:
            return self.layers.setdefault(gradient, Quantity())
        return self.plain.setdefault(name, Quantity())

    def _record(self, step: int) -> int:
        """Rows of one step that follow each other are one record."""
        if not self.steps or self.steps[-1] != step:
            self.steps.append(step)
        return len(self.steps) - 1

    def _plan(self, number: int, columns: tuple[str, ...], row: Sequence[Any]) -> _Plan:
        metrics, runs = exported(columns)
        if len(runs) > 1:
            message = f"holds several runs: {listed(map(quoted, runs), len(runs))}"
            raise UsageError(f"{self.path} {message}; export the chart of one")
        known = [name for name in metrics if name is not None]
        step = step_column(known)
        layer, value = named(known, _LAYER), named(known, _VALUE)
        long = layer is not None and value is not None
        quantities = tuple(self._wide(metrics, row, long))
        if step is None and (long or (quantities and self.steps and self._counted)):
            message = f"row {number} has no step: name its column one of {', '.join(STEP[:4])}"
            raise InputError(self.path, "malformed", message)
        self.long |= long
        self.tagged |= long and layer is not None and layer.lower().strip() in _TAG
        self.plans[columns] = plan = _Plan(
            None if step is None else metrics.index(step),
            metrics.index(layer) if long else None,
            metrics.index(value) if long else None,
            quantities,
        )
        return plan

    @property
    def _counted(self) -> bool:
        """Whether the rows so far had steps of their own."""
        return any(plan.step is not None for plan in self.plans.values())

    def _wide(
        self, columns: Sequence[str | None], row: Sequence[Any], long: bool
    ) -> Iterator[tuple[int, Quantity]]:
        seen: set[str] = set()
        plain = set() if long else set(plain_layers([c for c in columns if c is not None]))
        for place, column in enumerate(columns):
            if column is None:
                continue
            if role := role_of(column):
                # A long table's norms may be called as the total is.
                if not (long and role == "total"):
                    yield place, self.whole.setdefault(role, {}).setdefault(column, Quantity())
            elif is_loss_part(column):
                yield place, self.parts.setdefault(column.strip(), Quantity())
            elif long:
                continue
            elif (name := gradient_of(column)) is not None:
                if name in seen:
                    message = f"has two columns for {quoted(name)}: {quoted(column)} is the second"
                    raise InputError(self.path, "malformed", message)
                seen.add(name)
                yield place, self.layers.setdefault(name, Quantity())
            elif column in plain and (place >= len(row) or is_cell(row[place])):
                yield place, self.plain.setdefault(column, Quantity())

    def _number(
        self, number: int, columns: tuple[str, ...], row: Sequence[Any], place: int
    ) -> float | None:
        """A cell; None when it is empty. NaN and infinity in any spelling are data."""
        value = row[place]
        try:
            return float(value)
        except (TypeError, ValueError, OverflowError):
            if is_empty(value):
                return None
        found = binned(value)
        if found is None:
            message = f"row {number}, column {quoted(columns[place])}: {quoted(str(value), 40)}"
            raise InputError(self.path, "malformed", f"{message} is not a number")
        self.binned += 1
        if (name := gradient_of(columns[place])) is not None:
            self.sizes[name] = found[1]
        return found[0]

    # --- the whole ---

    def _settle_plain(self) -> None:
        """Series without a telling name are layers where no other is, and where they can be."""
        found = {name: q for name, q in self.plain.items() if q.values}
        self.plain.clear()
        if self.layers or not found:
            return
        if not self.long:
            found = {name: q for name, q in found.items() if not (q.numbers < 0).any()}
        elif self.tagged:
            kept = plain_layers([*found, *(n for by in self.whole.values() for n in by)])
            found = {name: found[name] for name in kept}
        if found and not self.long:
            names = listed(map(quoted, found), len(found), most=5)
            self.notes.append(f"taken as gradient norms, as no column says that it is: {names}")
        self.layers = found

    def _add_up(self) -> None:
        """The loss of training from its parts, where only those were written."""
        if not self.parts or any(quantity.values for quantity in self._of("loss").values()):
            return
        each = [
            dict(zip(q.at.tolist(), q.numbers.tolist(), strict=True)) for q in self.parts.values()
        ]
        names = listed(map(quoted, self.parts), len(self.parts))
        total = self.whole.setdefault("loss", {}).setdefault(names, Quantity())
        for record in sorted(set.intersection(*map(set, each))):
            total.add(record, sum(part[record] for part in each))
        self.notes.append(f"the loss is the sum of {names}")

    def _refuse_nothing(self) -> None:
        if not self.rows:
            raise InputError(self.path, "malformed", "has no rows")
        known = (quantity for name in ("total", "loss") for quantity in self._of(name).values())
        if not self.layers and not any(quantity.values for quantity in known):
            message = (
                "has no column of gradient norms: name them step,layer,value (one row per value), "
                "or grad_norm/NAME (one column per parameter)"
            )
            raise InputError(self.path, "malformed", message)

    def _of(self, role: Role) -> dict[str, Quantity]:
        return self.whole.get(role, {})

    def _joined(self, form: str) -> History:
        steps, place = self._long_order() if self.long else self._wide_order()
        steps, place = self._recorded(steps, place)
        if not any(plan.step is not None for plan in self.plans.values()):
            self.notes.append("no steps in the file: records are numbered from 0")
        filled = sum(len(quantity.values) for quantity in self.layers.values())
        wanted = len(steps) * len(self.layers)
        if wanted > _MOST_CELLS and wanted > _MOST_SPARSE * filled:
            message = (
                f"has {plural(filled, 'value')} for {plural(len(steps), 'step')} of "
                f"{plural(len(self.layers), 'layer')}: too sparse to be held as a table"
            )
            raise InputError(self.path, "unsupported", message)
        names = in_depth(list(self.layers))
        norms = np.full((len(steps), len(names)), np.nan)
        status = np.full(norms.shape, Status.NOT_RECORDED, np.uint8)
        for row, name in enumerate(names):
            at, values = self._placed(self.layers[name], place)
            self._refuse_negative(name, self.layers[name])
            norms[at, row], status[at, row] = values, Status.RECORDED
        skipped = self._line("skipped", steps)
        return History(
            path=self.path,
            format=form,
            nbytes=os.path.getsize(self.path) if self.nbytes is None else self.nbytes,
            steps=steps,
            layers=tuple(Layer(clean(n), guessed_kind(n), self.sizes.get(n)) for n in names),
            l2=norms,
            status=status,
            loss=self._line("loss", steps),
            total_l2=self._line("total", steps),
            loss_scale=self._line("scale", steps),
            skipped=None if skipped is None else (np.nan_to_num(skipped) > 0).astype(np.uint8),
            lr=self._rates(steps),
            notes=(*self.notes, *self._said(steps)),
            failures=tuple(self.failures),
            approximate={"l2": "from histogram bins"} if self.binned else {},
        )

    def _said(self, steps: _Integers) -> Iterator[str]:
        if self.rows == _SAMPLED:
            yield "exactly 500 rows: W&B's history() samples that many, so export the whole run"
        if self.binned:
            yield (
                "norms are computed from the middles of histogram bins and are approximate; W&B "
                "leaves NaN and infinity out of its histograms"
            )
        if not self.layers:
            yield ONLY_TOTAL if self._of("total") else ONLY_LOSS
        last = max(self.steps, default=0)
        if len(steps) and last > steps[-1] and likeliest(self._of("loss").items()):
            yield (
                f"the last gradient norm is of step {steps[-1]}: what the loss did after it, up to "
                f"step {last}, is not looked at"
            )

    def _recorded(self, steps: _Integers, place: _Integers) -> tuple[_Integers, _Integers]:
        """The steps that have a gradient, and the place of each record among them."""
        about = [*self.layers.values()] or [*self._of("total").values()]
        known = np.zeros(len(steps), bool)
        for quantity in about:
            at = place[quantity.at] if len(place) else quantity.at
            known[at[at >= 0]] = True
        chosen = chosen_records(known)
        new = np.where(chosen, np.cumsum(chosen) - 1, -1)
        return steps[chosen], np.where(place >= 0, new[place], -1) if len(new) else place

    def _wide_order(self) -> tuple[_Integers, _Integers]:
        """The kept steps, and the place of each record among them (-1: superseded)."""
        steps = self._all_steps()
        chosen, notes = ordered(steps, note_repeats=False)
        self.notes += notes
        return steps[chosen], _places(steps, steps[chosen])

    def _all_steps(self) -> _Integers:
        return np.frombuffer(self.steps, np.int64) if self.steps else np.empty(0, np.int64)

    def _long_order(self) -> tuple[_Integers, _Integers]:
        """The same where each layer has its own rows: it alone shows whether it restarts."""
        steps = self._all_steps()
        kept, said = [], []
        others = (quantity for by in self.whole.values() for quantity in by.values())
        for quantity in self.layers.values() or others:
            records = quantity.at
            chosen, notes = ordered(steps[records])
            said += notes
            if len(chosen) < len(records):
                values = quantity.numbers[chosen]
                quantity.records = array("q", records[chosen].tobytes())
                quantity.values = array("d", values.tobytes())
            kept.append(steps[records[chosen]])
        unique = list(dict.fromkeys(said))
        self.notes += unique[:1]
        if len(said) > 1:
            self.notes[-1] += f" (in the first of {len(said)} such series)"
        whole = np.unique(np.concatenate(kept)) if kept else np.empty(0, np.int64)
        return whole, _places(steps, whole)

    def _placed(self, quantity: Quantity, place: _Integers) -> tuple[_Integers, _Reals]:
        """Where the values go, without those of superseded records; later ones win."""
        at = place[quantity.at] if quantity.records else place[:0]
        return at[at >= 0], quantity.numbers[at >= 0]

    def _refuse_negative(self, name: str, quantity: Quantity) -> None:
        values = quantity.numbers
        if len(low := np.flatnonzero(values < 0)):
            step = self.steps[quantity.records[int(low[0])]]
            message = f"the norm of {quoted(name)} at step {step} is {values[low[0]]}, below zero"
            raise InputError(self.path, "malformed", message)

    def _line(self, role: Role, steps: _Integers) -> _Reals | None:
        known = [(name, q) for name, q in self._of(role).items() if q.values]
        quantity = likeliest(known)
        return None if quantity is None else self._carried(quantity, steps)

    def _carried(self, quantity: Quantity, steps: _Integers) -> _Reals:
        """A series at the records; of values that repeat a step the last counts."""
        own = self._all_steps()[quantity.at]
        chosen, _ = ordered(own, note_repeats=False)
        return carried(own[chosen], quantity.numbers[chosen], steps)

    def _rates(self, steps: _Integers) -> _Reals | None:
        known = [self._carried(q, steps) for q in self._of("rate").values() if q.values]
        return np.stack(known, axis=1) if known else None


def _places(steps: _Integers, kept: _Integers) -> _Integers:
    if not len(kept):
        return np.full(len(steps), -1)
    at = np.minimum(np.searchsorted(kept, steps), len(kept) - 1)
    return np.where(kept[at] == steps, at, -1)
