"""Histories in tables: CSV, JSON lines and Parquet, one row a value (long) or a step (wide)."""

from __future__ import annotations

import csv
import json
import math
import os
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, TextIO

import numpy as np
from numpy.typing import NDArray

from gradscope.errors import InputError, UsageError
from gradscope.histories.history import History, Layer, Status
from gradscope.histories.names import (
    clean,
    gradient_of,
    guessed_kind,
    is_loss,
    is_rate,
    is_total,
)
from gradscope.histories.steps import ordered

#: Names of columns, the likeliest first.
_STEP = (
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
#: Rows of a Parquet file that are Python objects at one time.
_BATCH = 4096
#: A table may be this large, or this many times its values, before it is refused.
_MOST_CELLS, _MOST_SPARSE = 50_000_000, 64

_Row = tuple[int, tuple[str, ...], Sequence[Any]]
_Integers = NDArray[np.int64]
_Reals = NDArray[np.float64]


# --- containers -----------------------------------------------------------------------------------


def read_csv(path: str) -> History:
    """A history from a CSV file with a heading. Raises InputError."""
    table = _Table(path)
    try:
        with open(path, encoding="utf-8-sig", errors="strict", newline="") as file:
            heading = file.readline()
            file.seek(0)
            delimiter = max(",;\t", key=heading.count)
            return table.history("csv", _cells(table, csv.reader(file, delimiter=delimiter)))
    except UnicodeDecodeError as error:
        raise InputError(path, "malformed", f"is not UTF-8 text: {error.reason}") from None
    except csv.Error as error:
        raise InputError(path, "malformed", f"is not a CSV table: {error}") from None


def read_jsonl(path: str) -> History:
    """A history from JSON lines, one object a row. Raises InputError."""
    table = _Table(path)
    with open(path, encoding="utf-8", errors="surrogateescape") as file:
        return table.history("jsonl", _members(_objects(table, file)))


def read_json(path: str, rows: Sequence[Any], form: str = "json") -> History:
    """A history from the objects of a JSON list. Raises InputError."""
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise InputError(path, "malformed", f"entry {number} is no object")
    return _Table(path).history(form, _members(enumerate(rows, 1)))


def is_columns(whole: object) -> bool:
    """Whether a JSON value is lists by name, all of one length."""
    return (
        isinstance(whole, dict)
        and bool(whole)
        and all(isinstance(column, list) for column in whole.values())
        and len({len(column) for column in whole.values()}) == 1
    )


def read_columns(path: str, whole: Mapping[str, list[Any]]) -> History:
    """A history from lists by name: norms, perhaps steps, losses, rates. Raises InputError."""
    table = _Table(path)
    columns = {
        name if _is_known(name) else f"grad_norm/{name}": column for name, column in whole.items()
    }
    if _named(columns, _STEP) is None:
        columns = {"step": list(range(len(next(iter(columns.values()))))), **columns}
        table.notes.append("no steps in the file: records are numbered from 0")
    names = tuple(columns)
    rows = ((n, names, row) for n, row in enumerate(zip(*columns.values(), strict=True), 1))
    return table.history("json", rows)


def _is_known(name: str) -> bool:
    return (
        gradient_of(name) is not None
        or name.lower() in _STEP
        or any(known(name) for known in (is_loss, is_rate, is_total))
    )


def read_parquet(path: str) -> History:
    """A history from a Parquet file. Raises UsageError without pyarrow, else InputError."""
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise UsageError(
            f"{path} is Parquet: pip install 'gradscope[parquet]' to read it"
        ) from None
    try:
        with parquet.ParquetFile(path) as file:
            batches = (batch.to_pylist() for batch in file.iter_batches(_BATCH))
            rows = (row for batch in batches for row in batch)
            return _Table(path).history("parquet", _members(enumerate(rows, 1)))
    except (ArrowException, OSError, ValueError) as error:
        raise InputError(path, "malformed", f"is no readable Parquet file: {error}") from None


def _cells(table: _Table, rows: Iterator[list[str]]) -> Iterator[_Row]:
    """The rows below the heading; a last one that was not written to its end is left out."""
    heading = tuple(next(rows, ()))
    held: _Row | None = None
    for number, row in enumerate(rows, 2):
        if not row:
            continue
        if len(row) > len(heading):
            message = f"row {number} has more cells than the heading"
            raise InputError(table.path, "malformed", message)
        if held is not None:
            yield held
        held = number, heading, row
    if held is not None and table.rows and len(held[2]) < len(heading):
        table.notes.append(f"row {held[0]}, the last, is cut off and was left out")
    elif held is not None:
        yield held


def _objects(table: _Table, lines: TextIO) -> Iterator[tuple[int, Mapping[str, Any]]]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            if table.rows and not line.endswith("\n"):
                table.notes.append(f"line {number}, the last, is cut off and was left out")
                return
            message = f"line {number} is no JSON: {error}"
            raise InputError(table.path, "malformed", message) from None
        if not isinstance(row, dict):
            raise InputError(table.path, "malformed", f"line {number} is no JSON object")
        yield number, row


def _members(rows: Iterable[tuple[int, Mapping[str, Any]]]) -> Iterator[_Row]:
    """Objects as rows; the entries of objects inside them are columns ``outer/inner``."""
    for number, row in rows:
        if any(isinstance(value, dict) for value in row.values()):
            row = dict(_flat(row))
        yield number, tuple(row), tuple(row.values())


def _flat(row: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in row.items():
        if isinstance(value, dict) and not {"bins", "packedBins"} & value.keys():
            yield from ((f"{name}/{inner}", found) for inner, found in value.items())
        else:
            yield name, value


# --- columns --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Plan:
    """Which cells of a row are what, by place; made once for each heading."""

    step: int
    #: Long rows: where the layer's name and its value are.
    layer: int | None
    value: int | None
    #: Places of values that are the row's own: all norms of wide rows, the loss of any.
    series: tuple[tuple[int, _Series], ...]


@dataclass(slots=True)
class _Series:
    """The values of one layer, or of the loss, and which record each is of."""

    records: array[int] = field(default_factory=lambda: array("q"))
    values: array[float] = field(default_factory=lambda: array("d"))

    def add(self, record: int, value: float) -> None:
        self.records.append(record)
        self.values.append(value)


def _named(columns: Iterable[str], names: Sequence[str]) -> str | None:
    lowered = {column.lower().strip(): column for column in columns}
    return next((lowered[name] for name in names if name in lowered), None)


@dataclass(slots=True)
class _Table:
    """Values as they come: records in file order, layers in order of appearance."""

    path: str
    rows: int = 0
    long: bool = False
    #: The step of each record.
    steps: array[int] = field(default_factory=lambda: array("q"))
    layers: dict[str, _Series] = field(default_factory=dict)
    rates: dict[str, _Series] = field(default_factory=dict)
    loss: _Series = field(default_factory=_Series)
    total: _Series = field(default_factory=_Series)
    sizes: dict[str, int] = field(default_factory=dict)
    binned: int = 0
    notes: list[str] = field(default_factory=list)
    plans: dict[tuple[str, ...], _Plan] = field(default_factory=dict)

    def history(self, form: str, rows: Iterable[_Row]) -> History:
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
            message = f"row {number}: {columns[plan.step]} is {row[plan.step]!r}"
            raise InputError(self.path, "malformed", f"{message}, which is no whole number")
        record = self._record(int(step))
        if plan.layer is not None and plan.value is not None:
            self._add_long(number, columns, row, plan, record)
        for place, series in plan.series:
            if place < len(row):
                value = self._number(number, columns, row, place)
                if value is not None:
                    series.add(record, value)

    def _add_long(
        self, number: int, columns: tuple[str, ...], row: Sequence[Any], plan: _Plan, record: int
    ) -> None:
        assert plan.layer is not None
        assert plan.value is not None
        if max(plan.layer, plan.value) >= len(row):
            return
        name = str(row[plan.layer])
        if not name.strip():
            message = f"row {number}: {columns[plan.layer]} is empty: whose gradient is it?"
            raise InputError(self.path, "malformed", message)
        value = self._number(number, columns, row, plan.value)
        if value is not None:
            self.layers.setdefault(name, _Series()).add(record, value)

    def _record(self, step: int) -> int:
        """Rows of one step that follow each other are one record."""
        if not self.steps or self.steps[-1] != step:
            self.steps.append(step)
        return len(self.steps) - 1

    def _plan(self, number: int, columns: tuple[str, ...]) -> _Plan:
        step = _named(columns, _STEP)
        if step is None:
            message = f"row {number} has no step: a column named one of {', '.join(_STEP[:4])}"
            raise InputError(self.path, "malformed", message)
        layer, value = _named(columns, _LAYER), _named(columns, _VALUE)
        long = layer is not None and value is not None
        self.long |= long
        series = tuple(self._wide(columns, long))
        self.plans[columns] = plan = _Plan(
            columns.index(step),
            columns.index(layer) if long and layer is not None else None,
            columns.index(value) if long and value is not None else None,
            series,
        )
        return plan

    def _wide(self, columns: tuple[str, ...], long: bool) -> Iterator[tuple[int, _Series]]:
        seen = set()
        for place, column in enumerate(columns):
            if is_loss(column):
                yield place, self.loss
            elif is_rate(column):
                yield place, self.rates.setdefault(column, _Series())
            elif long:
                continue
            elif (name := gradient_of(column)) is not None:
                if name in seen:
                    message = f"has two columns of {clean(name)}: {clean(column)} is the second"
                    raise InputError(self.path, "malformed", message)
                seen.add(name)
                yield place, self.layers.setdefault(name, _Series())
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
            message = f"row {number}, column {clean(columns[place])}: {clean(str(value)[:40])!r}"
            raise InputError(self.path, "malformed", f"{message} is no number")
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
                "has no column of gradient norms: step,layer,value in long form, or one column "
                "for each parameter such as grad_norm/NAME"
            )
            raise InputError(self.path, "malformed", message)

    def _joined(self, form: str) -> History:
        steps, place = self._long_order() if self.long else self._wide_order()
        filled = sum(len(series.values) for series in self.layers.values())
        wanted = len(steps) * len(self.layers)
        if wanted > _MOST_CELLS and wanted > _MOST_SPARSE * filled:
            message = f"has {filled} values for {len(steps)} steps of {len(self.layers)} layers"
            raise InputError(self.path, "unsupported", f"{message}: it is too sparse for a table")
        norms = np.full((len(steps), len(self.layers)), np.nan)
        status = np.full(norms.shape, Status.NOT_RECORDED, np.uint8)
        for row, (name, series) in enumerate(self.layers.items()):
            at, values = self._placed(series, place)
            self._refuse_negative(name, series)
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
            yield "exactly 500 rows: W&B's history() samples that many; export the whole run"
        if self.binned:
            yield (
                "norms are from the middles of histogram bins, which are approximate; W&B leaves "
                "NaN and infinity out of its histograms"
            )
        if not self.layers:
            yield "only the total gradient norm is here: nothing can be said of layers"

    def _wide_order(self) -> tuple[_Integers, _Integers]:
        """The kept steps, and the place of each record among them (-1: superseded)."""
        steps = np.frombuffer(self.steps, np.int64) if self.steps else np.empty(0, np.int64)
        chosen, notes = ordered(steps)
        self.notes += [note for note in notes if "repeat" not in note]
        return steps[chosen], _places(steps, steps[chosen])

    def _long_order(self) -> tuple[_Integers, _Integers]:
        """The same where each layer has its own rows: it alone shows whether it restarts."""
        steps = np.frombuffer(self.steps, np.int64) if self.steps else np.empty(0, np.int64)
        kept, said = [], []
        for series in self.layers.values():
            records = np.frombuffer(series.records, np.int64)
            chosen, notes = ordered(steps[records])
            said += notes
            if len(chosen) < len(records):
                series.records = array("q", records[chosen].tobytes())
                series.values = array("d", np.frombuffer(series.values)[chosen].tobytes())
            kept.append(steps[records[chosen]])
        unique = list(dict.fromkeys(said))
        self.notes += unique[:1]
        if len(said) > 1:
            self.notes[-1] += f" (in the first of {len(said)} such series)"
        whole = np.unique(np.concatenate(kept)) if kept else np.empty(0, np.int64)
        return whole, _places(steps, whole)

    def _placed(self, series: _Series, place: _Integers) -> tuple[_Integers, _Reals]:
        """Where a series' values go, without those of superseded records; later ones win."""
        at = place[np.frombuffer(series.records, np.int64)] if series.records else place[:0]
        values = np.frombuffer(series.values) if series.values else np.empty(0)
        return at[at >= 0], values[at >= 0]

    def _refuse_negative(self, name: str, series: _Series) -> None:
        values = np.frombuffer(series.values) if series.values else np.empty(0)
        if len(low := np.flatnonzero(values < 0)):
            step = self.steps[series.records[int(low[0])]]
            message = f"the norm of {clean(name)} at step {step} is {values[low[0]]}, below zero"
            raise InputError(self.path, "malformed", message)

    def _line(self, series: _Series, place: _Integers, count: int) -> _Reals | None:
        if not series.values:
            return None
        out = np.full(count, np.nan)
        at, values = self._placed(series, place)
        out[at] = values
        return out

    def _rates(self, place: _Integers, count: int) -> _Reals | None:
        lines = [self._line(series, place, count) for series in self.rates.values()]
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
