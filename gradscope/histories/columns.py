"""What the columns of a table mean, and its values by what they are of.

A row is one value (long: step, layer, value) or one step (wide: a column for each parameter).
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from gradscope.checkpoints.tensors import Failure
from gradscope.errors import InputError, UsageError
from gradscope.histories.cells import Quantity, binned, is_cell, is_empty
from gradscope.histories.names import (
    STEP,
    Role,
    exported,
    gradient_of,
    is_loss_part,
    plain_layers,
    role_of,
    step_column,
)
from gradscope.text import listed, quoted

#: Names of columns of long tables, the likeliest first.
_LAYER = ("param", "parameter", "layer", "layer_name", "module", *(_TAG := ("name", "tag", "metric",
          "metric_name", "key", "variable")))  # fmt: skip
_VALUE = (
    "grad_norm", "l2", "l2_norm", "norm", "gradient_norm", "magnitude", "grad_l2", "gnorm", "value",
)  # fmt: skip

Row = tuple[int, tuple[str, ...], Sequence[Any]]


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

    def add(self, number: int, columns: tuple[str, ...], row: Sequence[Any]) -> None:
        """Take in a row. Raises InputError, and UsageError for rows of several runs."""
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
