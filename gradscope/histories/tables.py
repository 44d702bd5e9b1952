"""Tables as files: CSV, JSON, JSON lines and Parquet, read as rows of named cells."""

from __future__ import annotations

import csv
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from heapq import merge
from typing import Any, TextIO

from gradscope.checkpoints.tensors import Failure
from gradscope.containers.beginning import Beginning
from gradscope.errors import InputError, UsageError
from gradscope.histories.columns import Row, Table, is_long
from gradscope.histories.history import History
from gradscope.histories.names import is_known, step_column
from gradscope.histories.tabled import history_of

#: A greater file is read line by line without asking whether it is one value.
_JSON_CAP = 1 << 30

#: Objects inside objects that are followed.
_DEEPEST = 16
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
            delimiter = max(",;\t", key=header.count)
            if _is_download_header(header):
                return read_downloads(path, [path])
            file.seek(0)
            return history_of(table, "csv", _cells(table, csv.reader(file, delimiter=delimiter)))
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
    if is_download(whole):
        columns = ("step", _tag_of(path))
        return history_of(
            Table(path), "json", ((n, columns, r[1:]) for n, r in enumerate(whole, 1))
        )
    found = rows_in(whole)
    return read_jsonl(path) if found is None else read_json(path, found)


def read_jsonl(path: str) -> History:
    """The history in JSON lines, one object per row. Raises InputError."""
    table = Table(path)
    with open(path, encoding="utf-8", errors="surrogateescape") as file:
        return history_of(table, "jsonl", _members(_objects(table, file)))


def read_json(path: str, rows: Sequence[Any], form: str = "json") -> History:
    """The history in the objects of a JSON list. Raises InputError."""
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise InputError(path, "malformed", f"entry {number} is not an object")
    return history_of(Table(path), form, _members(enumerate(rows, 1)))


def is_columns(whole: object) -> bool:
    """Whether a JSON value is an object of lists of equal length."""
    return (
        isinstance(whole, dict)
        and bool(whole)
        and all(isinstance(column, list) for column in whole.values())
        and len({len(column) for column in whole.values()}) == 1
    )


def rows_in(whole: object) -> list[Any] | None:
    """The rows of a JSON value: a list, the one in an object, or objects by step; else None."""
    if isinstance(whole, list):
        return whole
    if not isinstance(whole, dict) or not whole:
        return None
    if all(key.isdecimal() and isinstance(row, dict) for key, row in whole.items()):
        return [{"step": int(key[:19]), **row} for key, row in whole.items()]
    lists = [
        value
        for value in whole.values()
        if isinstance(value, list) and value and all(isinstance(row, dict) for row in value)
    ]
    steps = any(step_column(lists[0][0]) is not None for _ in lists[:1])
    return lists[0] if len(lists) == 1 and steps and step_column(whole) is None else None


def is_download(whole: object) -> bool:
    """Whether a JSON value is what TensorBoard lets download: [wall time, step, value] each."""
    return (
        isinstance(whole, list)
        and bool(whole)
        and all(isinstance(row, list) and len(row) == len(_DOWNLOAD) for row in whole)
    )


#: The header of a tag's values as TensorBoard lets download them.
_DOWNLOAD = ("wall time", "step", "value")


def _is_download_header(line: str) -> bool:
    return tuple(line.strip().lower().split(max(",;\t", key=line.count))) == _DOWNLOAD


def are_downloads(files: Sequence[str]) -> bool:
    """Whether CSV files are all what TensorBoard lets download, a tag each."""
    return bool(files) and all(
        file.endswith(".csv")
        and _is_download_header(Beginning(file).start.split(b"\n", 1)[0].decode(errors="replace"))
        for file in files
    )


def read_downloads(path: str, files: Sequence[str]) -> History:
    """The history in one file of steps and values for each tag, of one run.

    Raises InputError when a name does not say which tag it is of, or two are of the same.
    """
    tags: dict[str, str] = {}
    for file in files:
        tag = _tag_of(file)
        if tag in tags:
            both = f"{os.path.basename(tags[tag])} and {os.path.basename(file)}"
            raise InputError(path, "malformed", f"{both} are both of {tag}: give one run's files")
        tags[tag] = file
    rows = merge(*(_of(tag, file) for tag, file in tags.items()), key=_step)
    return history_of(Table(path, nbytes=sum(map(os.path.getsize, files))), "csv", rows)


def _step(row: Row) -> float:
    """To merge by; what is no number is refused where the rows are read."""
    try:
        return float(row[2][0])
    except (ValueError, IndexError):
        return math.inf


def _of(tag: str, path: str) -> Iterator[Row]:
    with open(path, encoding="utf-8-sig", newline="") as file:
        delimiter = max(",;\t", key=file.readline().count)
        for number, row in enumerate(csv.reader(file, delimiter=delimiter), 2):
            if row:
                yield number, ("step", tag), row[1:]


#: What stands before a parameter's name in a tag whose slashes are gone.
_PREFIX = re.compile(
    r"^(?:(?:train|training|optim|metrics?|debug|norms?)_)*"
    r"(grad_2\.0_norm|(?:grad|gradient)_norms?|gnorm|gradients?|grads?)_(?!norm|2\.0)",
    re.IGNORECASE,
)


def _tag_of(path: str) -> str:
    """What a downloaded file holds by its name, in which slashes became underscores."""
    stem = os.path.splitext(os.path.basename(path))[0]
    tag = stem.rpartition("-tag-")[2]
    if is_known(name := _PREFIX.sub(r"\1/", tag)):
        return name
    message = (
        "holds the values of one tag, and its name does not say of which: name it grad_norm.csv or "
        "loss.csv, or as TensorBoard does, run-RUN-tag-TAG.csv"
    )
    raise InputError(path, "malformed", message)


def read_columns(path: str, whole: Mapping[str, list[Any]]) -> History:
    """The history in lists by name: norms, perhaps steps, losses, rates. Raises InputError."""
    names = tuple(whole)
    rows = ((n, names, row) for n, row in enumerate(zip(*whole.values(), strict=True), 1))
    return history_of(Table(path), "json", rows)


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
            return history_of(Table(path), "parquet", _members(enumerate(rows, 1)))
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
        table.failures.append(_cut_off(f"row {held[0]}"))
    elif held is not None:
        yield held


def _cut_off(place: str) -> Failure:
    message = f"{place}, the last, is cut off and was left out: the run died, or still writes"
    return Failure("truncated", message)


def _objects(table: Table, lines: TextIO) -> Iterator[tuple[int, Mapping[str, Any]]]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            if table.rows and not line.endswith("\n"):
                table.failures.append(_cut_off(f"line {number}"))
                return
            message = f"line {number} is not JSON: {error}"
            raise InputError(table.path, "malformed", message) from None
        if not isinstance(row, dict):
            raise InputError(table.path, "malformed", f"line {number} is not a JSON object")
        yield number, row


def _members(rows: Iterable[tuple[int, Mapping[str, Any]]]) -> Iterator[Row]:
    """Objects as rows; the entries of objects inside them are columns ``outer/inner``.

    A list of objects, one for each layer, becomes a row for each.
    """
    for number, row in rows:
        layers = _layers_of(row)
        whole = {name: value for name, value in row.items() if name != layers}
        if any(isinstance(value, dict) for value in whole.values()):
            whole = dict(_flat(whole))
        if layers is None:
            yield number, tuple(whole), tuple(whole.values())
        else:
            for layer in row[layers]:
                one = {**whole, **layer}
                yield number, tuple(one), tuple(one.values())


def _layers_of(row: Mapping[str, Any]) -> str | None:
    """The entry that is a list of objects with names."""
    return next(
        (
            name
            for name, value in row.items()
            if isinstance(value, list)
            and value
            and all(isinstance(layer, dict) and is_long(layer) for layer in value)
        ),
        None,
    )


#: Objects that only hold layers, and whose name is no part of theirs.
_HOLDERS = frozenset(("layers", "per_layer", "modules", "params", "parameters", "by_layer"))


def _flat(row: Mapping[str, Any], above: str = "", depth: int = 0) -> Iterator[tuple[str, Any]]:
    for name, value in row.items():
        if not isinstance(value, dict) or {"bins", "packedBins"} & value.keys() or depth > _DEEPEST:
            yield above + name, value
        elif name.lower() in _HOLDERS:
            yield from _flat(value, above, depth + 1)
        else:
            yield from _flat(value, f"{above}{name}/", depth + 1)
