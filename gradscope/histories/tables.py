"""Histories in tables: CSV, JSON lines and Parquet, one row a value (long) or a step (wide)."""

from __future__ import annotations

import csv
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gradscope.errors import InputError, UsageError
from gradscope.histories.history import History, Layer, Status
from gradscope.histories.names import guessed_kind
from gradscope.histories.steps import ordered

_STEP = (
    "step",
    "global_step",
    "_step",
    "trainer/global_step",
    "steps",
    "iteration",
    "iter",
    "batch",
)
_LAYER = ("param", "parameter", "layer", "layer_name", "name", "module", "tag")
_VALUE = ("grad_norm", "l2", "l2_norm", "norm", "gradient_norm", "magnitude", "grad_l2", "value")
_TOTAL = (
    "grad_norm",
    "total_grad_norm",
    "train/grad_norm",
    "grad_norm/total",
    "total_l2",
    "grad_2.0_norm_total",
)
_LOSS = ("loss", "train_loss", "train/loss", "training_loss")
_RATE = ("lr", "learning_rate", "train/learning_rate", "lr-sgd", "lr-adam", "lr-adamw")
#: How writers name a parameter's norm in a wide table: Lightning, Composer, OLMo, W&B, plain.
_NAMED = tuple(
    re.compile(pattern)
    for pattern in (
        r"^grad_(?:2|2\.0)_norm[/_](?P<name>.+)$",
        r"^l2_norm/grad/(?P<name>.+)$",
        r"^grad/(?P<name>.+)\.norm$",
        r"^(?:grad_norms?|gradient_norms?|grads?|gradients?)[/:.](?P<name>.+)$",
        r"^(?P<name>.+)[/:.](?:grad_norm|gradient_norm|grad_l2|l2_norm)$",
    )
)
#: Weights & Biases' history() samples this many rows unless told otherwise.
_SAMPLED = 500
_MOST_CELLS = 500_000_000

Row = Mapping[str, Any]


def read_csv(path: str) -> History:
    """A history from a CSV file with a heading. Raises InputError."""
    try:
        with open(path, encoding="utf-8-sig", errors="strict", newline="") as file:
            sample = file.read(8192)
            file.seek(0)
            delimiter = max(",;\t", key=sample.split("\n", 1)[0].count)
            reader = csv.DictReader(file, delimiter=delimiter, strict=True)
            return _history(path, "csv", reader)
    except UnicodeDecodeError as error:
        raise InputError(path, "malformed", f"is not UTF-8 text: {error.reason}") from None
    except csv.Error as error:
        raise InputError(path, "malformed", f"is not a CSV table: {error}") from None


def read_jsonl(path: str) -> History:
    """A history from JSON lines, one object a row. Raises InputError."""
    with open(path, encoding="utf-8", errors="surrogateescape") as file:
        return _history(path, "jsonl", _objects(path, file))


def read_json(path: str, rows: Sequence[Any], form: str = "json") -> History:
    """A history from the objects of a JSON list. Raises InputError."""
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise InputError(path, "malformed", f"entry {number} is no object")
    return _history(path, form, rows)


def read_parquet(path: str) -> History:
    """A history from a Parquet file. Raises UsageError without pyarrow, else InputError."""
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise UsageError(
            f"{path} is Parquet: pip install 'gradscope[parquet]' to read it"
        ) from None
    try:
        table = parquet.read_table(path)
    except (ArrowException, OSError) as error:
        raise InputError(path, "malformed", f"is no readable Parquet file: {error}") from None
    return _history(path, "parquet", table.to_pylist())


def _objects(path: str, lines: Iterable[str]) -> Iterator[Row]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(path, "malformed", f"line {number} is no JSON: {error}") from None
        if not isinstance(row, dict):
            raise InputError(path, "malformed", f"line {number} is no JSON object")
        yield row


def _history(path: str, form: str, rows: Iterable[Row]) -> History:
    table = _Table(path)
    for number, row in enumerate(rows, 2 if form == "csv" else 1):
        table.add(number, row)
    return table.history(form)


def _column(row: Row, names: Sequence[str]) -> str | None:
    lowered = {key.lower().strip(): key for key in row if isinstance(key, str)}
    return next((lowered[name] for name in names if name in lowered), None)


@dataclass(slots=True)
class _Table:
    """Cells as they come: records in file order, layers in order of appearance."""

    path: str
    steps: list[int] = field(default_factory=list)
    layers: dict[str, int] = field(default_factory=dict)
    cells: list[tuple[int, int, float]] = field(default_factory=list)
    losses: dict[int, float] = field(default_factory=dict)
    rates: dict[int, float] = field(default_factory=dict)
    totals: dict[int, float] = field(default_factory=dict)
    rows: int = 0
    #: long tables: the record of the step that rows are about.
    last: int | None = None

    def add(self, number: int, row: Row) -> None:
        """Take one row, whichever form it has."""
        self.rows += 1
        if None in row:
            message = f"row {number} has more cells than the heading"
            raise InputError(self.path, "malformed", message)
        step_column = _column(row, _STEP)
        if step_column is None:
            raise InputError(
                self.path,
                "malformed",
                f"row {number} has no step: a column named one of {', '.join(_STEP[:4])}",
            )
        value = _number(self.path, number, step_column, row[step_column])
        if value is None:
            return
        if not math.isfinite(value) or abs(value) >= 2**62:
            raise InputError(
                self.path, "malformed", f"row {number}: {step_column} is {row[step_column]!r}"
            )
        record = self._record(int(value))
        layer, norm = _column(row, _LAYER), _column(row, _VALUE)
        if layer is not None and norm is not None:
            self._cell(number, record, str(row[layer]), norm, row[norm])
        else:
            self._wide(number, record, row)

    def _record(self, step: int) -> int:
        """Rows of one step that follow each other are one record."""
        if not self.steps or self.steps[-1] != step:
            self.steps.append(step)
        return len(self.steps) - 1

    def _cell(self, number: int, record: int, name: str, column: str, value: Any) -> None:
        found = _number(self.path, number, column, value)
        if found is not None:
            self.cells.append((record, self.layers.setdefault(name, len(self.layers)), found))

    def _wide(self, number: int, record: int, row: Row) -> None:
        known = {
            _column(row, names): store
            for names, store in ((_TOTAL, self.totals), (_LOSS, self.losses), (_RATE, self.rates))
        }
        for column, value in row.items():
            if column in known:
                found = _number(self.path, number, column, value)
                if found is not None:
                    known[column][record] = found
            elif (name := _named(column)) is not None:
                self._cell(number, record, name, column, value)

    def history(self, form: str) -> History:
        """The whole table as a history."""
        if not self.rows:
            raise InputError(self.path, "malformed", "has no rows")
        if not self.layers and not self.totals:
            raise InputError(
                self.path,
                "malformed",
                "has no column of gradient norms: "
                "step,layer,value in long form, or one column for each parameter such as "
                "grad_norm/NAME",
            )
        if len(self.steps) * max(1, len(self.layers)) > _MOST_CELLS:
            raise InputError(
                self.path,
                "unsupported",
                f"{len(self.steps)} steps of {len(self.layers)} layers are too many for a table",
            )
        steps, place, notes = self._merged()
        shape = (len(steps), len(self.layers))
        norms, status = np.full(shape, np.nan), np.zeros(shape, np.uint8)
        for record, row, value in self.cells:
            if (at := place.get(record)) is not None:
                norms[at, row], status[at, row] = value, Status.RECORDED
        lr = self._series(self.rates, place, len(steps))
        if self.rows == _SAMPLED:
            notes.append(
                "exactly 500 rows: W&B's history() samples that many; export the whole run"
            )
        if not self.layers:
            notes.append("only the total gradient norm is here: nothing can be said of layers")
        return History(
            path=self.path,
            format=form,
            nbytes=os.path.getsize(self.path),
            steps=steps,
            layers=tuple(Layer(name, guessed_kind(name)) for name in self.layers),
            l2=norms,
            status=status,
            loss=self._series(self.losses, place, len(steps)),
            total_l2=self._series(self.totals, place, len(steps)),
            lr=None if lr is None else lr[:, None],
            notes=tuple(notes),
        )

    def _merged(self) -> tuple[np.ndarray[Any, Any], dict[int, int], list[str]]:
        """The kept steps, and where each record of the file went; equal steps are one."""
        all_steps = np.array(self.steps, dtype=np.int64)
        chosen, notes = ordered(all_steps)
        at = {int(step): i for i, step in enumerate(all_steps[chosen])}
        kept = set(chosen.tolist())
        first = {int(all_steps[r]): r for r in sorted(kept, reverse=True)}
        place = {
            record: at[step]
            for record, step in enumerate(self.steps)
            if step in at and (record in kept or record < first[step])
        }
        return all_steps[chosen], place, [n for n in notes if "repeat" not in n]

    def _series(
        self, found: Mapping[int, float], place: Mapping[int, int], count: int
    ) -> np.ndarray[Any, Any] | None:
        if not found:
            return None
        out = np.full(count, np.nan)
        for record, value in found.items():
            if record in place:
                out[place[record]] = value
        return out


def _named(column: str) -> str | None:
    for pattern in _NAMED:
        if found := pattern.match(column):
            return found["name"]
    return None


def _number(path: str, row: int, column: str, value: Any) -> float | None:
    """A cell; None when it is empty. NaN and infinity in any spelling are data."""
    if value is None or value == "":
        return None
    if isinstance(value, list):
        raise InputError(path, "malformed", f"row {row} has more cells than the heading")
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        message = f"row {row}, column {column}: {str(value)[:40]!r} is no number"
        raise InputError(path, "malformed", message) from None
