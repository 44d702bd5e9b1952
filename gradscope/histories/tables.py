"""Tables as files: CSV, JSON, JSON lines and Parquet, read as rows of named cells."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TextIO

from gradscope.containers.beginning import Beginning
from gradscope.errors import InputError, UsageError
from gradscope.histories.columns import STEP, Row, Table, is_known, named
from gradscope.histories.history import History

#: A greater file is read line by line without asking whether it is one value.
_JSON_CAP = 1 << 30

#: Rows of a Parquet file that are Python objects at one time.
_BATCH = 4096


def is_parquet(file: Beginning) -> bool:
    """Parquet's magic number."""
    return file.start.startswith(b"PAR1")


def is_json(file: Beginning) -> bool:
    """An object or a list; JSON lines begin like the former."""
    return file.start.lstrip(b"\xef\xbb\xbf \t\r\n")[:1] in (b"{", b"[")


def is_csv(file: Beginning) -> bool:
    """Text whose first line has a separator and does not look like markup."""
    first = file.start.removeprefix(b"\xef\xbb\xbf").lstrip().split(b"\n", 1)[0]
    return b"\0" not in file.start and first[:1] != b"<" and any(m in first for m in b",;\t")


def read_csv(path: str) -> History:
    """The history in a CSV file with a header row. Raises InputError."""
    table = Table(path)
    try:
        with open(path, encoding="utf-8-sig", errors="strict", newline="") as file:
            header = file.readline()
            file.seek(0)
            delimiter = max(",;\t", key=header.count)
            return table.history("csv", _cells(table, csv.reader(file, delimiter=delimiter)))
    except UnicodeDecodeError as error:
        raise InputError(path, "malformed", f"is not UTF-8 text: {error.reason}") from None
    except csv.Error as error:
        raise InputError(path, "malformed", f"is not a CSV table: {error}") from None


def read_any_json(path: str) -> History:
    """One JSON value (trainer_state.json, a list of rows), else JSON lines."""
    if os.path.getsize(path) > _JSON_CAP:
        return read_jsonl(path)
    with open(path, encoding="utf-8", errors="surrogateescape") as file:
        text = file.read()
    try:
        whole: Any = json.loads(text)
    except (ValueError, RecursionError):
        return read_jsonl(path)
    if isinstance(whole, dict) and isinstance(whole.get("log_history"), list):
        logged = (row for row in whole["log_history"] if isinstance(row, dict))
        rows = [row for row in logged if "grad_norm" in row or "loss" in row]
        return read_json(path, rows, "trainer_state")
    if is_columns(whole):
        return read_columns(path, whole)
    return read_json(path, whole) if isinstance(whole, list) else read_jsonl(path)


def read_jsonl(path: str) -> History:
    """The history in JSON lines, one object per row. Raises InputError."""
    table = Table(path)
    with open(path, encoding="utf-8", errors="surrogateescape") as file:
        return table.history("jsonl", _members(_objects(table, file)))


def read_json(path: str, rows: Sequence[Any], form: str = "json") -> History:
    """The history in the objects of a JSON list. Raises InputError."""
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise InputError(path, "malformed", f"entry {number} is not an object")
    return Table(path).history(form, _members(enumerate(rows, 1)))


def is_columns(whole: object) -> bool:
    """Whether a JSON value is an object of lists of equal length."""
    return (
        isinstance(whole, dict)
        and bool(whole)
        and all(isinstance(column, list) for column in whole.values())
        and len({len(column) for column in whole.values()}) == 1
    )


def read_columns(path: str, whole: Mapping[str, list[Any]]) -> History:
    """The history in lists by name: norms, perhaps steps, losses, rates. Raises InputError."""
    table = Table(path)
    columns = {
        name if is_known(name) else f"grad_norm/{name}": column for name, column in whole.items()
    }
    if named(columns, STEP) is None:
        columns = {"step": list(range(len(next(iter(columns.values()))))), **columns}
        table.notes.append("no steps in the file: records are numbered from 0")
    names = tuple(columns)
    rows = ((n, names, row) for n, row in enumerate(zip(*columns.values(), strict=True), 1))
    return table.history("json", rows)


def read_parquet(path: str) -> History:
    """The history in a Parquet file. Raises UsageError without pyarrow, else InputError."""
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise UsageError(
            f"{path} is a Parquet file, which needs pyarrow: pip install pyarrow"
        ) from None
    try:
        with parquet.ParquetFile(path) as file:
            batches = (batch.to_pylist() for batch in file.iter_batches(_BATCH))
            rows = (row for batch in batches for row in batch)
            return Table(path).history("parquet", _members(enumerate(rows, 1)))
    except (ArrowException, OSError, ValueError) as error:
        raise InputError(path, "malformed", f"is not a readable Parquet file: {error}") from None


def _cells(table: Table, rows: Iterator[list[str]]) -> Iterator[Row]:
    """The rows below the header; a last one that was not written to its end is left out."""
    header = tuple(next(rows, ()))
    held: Row | None = None
    for number, row in enumerate(rows, 2):
        if not row:
            continue
        if len(row) > len(header):
            message = f"row {number} has more cells than the header"
            raise InputError(table.path, "malformed", message)
        if held is not None:
            yield held
        held = number, header, row
    if held is not None and table.rows and len(held[2]) < len(header):
        table.notes.append(f"row {held[0]}, the last, is cut off and was left out")
    elif held is not None:
        yield held


def _objects(table: Table, lines: TextIO) -> Iterator[tuple[int, Mapping[str, Any]]]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            if table.rows and not line.endswith("\n"):
                table.notes.append(f"line {number}, the last, is cut off and was left out")
                return
            message = f"line {number} is not JSON: {error}"
            raise InputError(table.path, "malformed", message) from None
        if not isinstance(row, dict):
            raise InputError(table.path, "malformed", f"line {number} is not a JSON object")
        yield number, row


def _members(rows: Iterable[tuple[int, Mapping[str, Any]]]) -> Iterator[Row]:
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
