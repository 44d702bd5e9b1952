"""Opening a history, whatever wrote it: by content, then by a table of readers."""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Callable
from typing import Any

from gradscope.checkpoints.sniff import sniff
from gradscope.containers.files import stamp
from gradscope.errors import InputError, UsageError
from gradscope.histories.arrays import As, are_records, read_arrays, read_records
from gradscope.histories.history import History
from gradscope.histories.joined import by_number, read_native, read_shards
from gradscope.histories.native import is_native
from gradscope.plugins import loaded

_JSON_CAP = 1 << 30
_READS = (
    "gradscope.grads (npz), npz, safetensors and .pt of norms or gradients, CSV, JSON "
    "lines, Parquet, TensorBoard events, trainer_state.json"
)


def open_history(path: str, *, as_: As | None = None) -> History:
    """Read the history at a path: a file, a folder of shards or event files, or a glob.

    ``as_`` says what plain arrays are when that cannot be seen. Raises InputError when it cannot
    be read, UsageError when it is ambiguous or an optional dependency is missing.
    """
    try:
        if os.path.isdir(path):
            return _folder(path)
        if not os.path.exists(path) and (files := by_number(glob.glob(path))):
            return open_history(files[0], as_=as_) if len(files) == 1 else _several(path, files)
        return _file(path, as_)
    except OSError as error:
        raise InputError(path, "missing", f"cannot be read: {error.strerror or error}") from None


def _file(path: str, as_: As | None) -> History:
    size = stamp(path)[0]
    if not size:
        raise InputError(path, "truncated", "is empty (0 bytes)")
    with open(path, "rb") as file:
        start = file.read(4096)
    for recognises, read in _READERS:
        if recognises(path, start):
            return read(path, as_)
    return _third_party(path)


def _folder(path: str) -> History:
    names = [n for n in os.listdir(path) if not n.startswith(".")]
    files = by_number([os.path.join(path, n) for n in names])
    shards = [f for f in files if f.endswith(".npz")]
    if shards:
        plain = are_records(shards) and not any(map(is_native, shards))
        return (read_records if plain else read_shards)(path, shards)
    from gradscope.histories.events import event_files, read_events

    if events := event_files(path):
        return read_events(path, events)
    state = os.path.join(path, "trainer_state.json")
    if os.path.isfile(state):
        return _json(state, None)
    records = [f for f in files if f.endswith((".pt", ".pth", ".safetensors"))]
    if records and are_records(records):
        return read_records(path, records)
    raise InputError(
        path,
        "missing",
        "has no shards (00000.npz, …), event files, trainer_state.json or files of gradients "
        "named by step (step_10.pt, …)",
    )


def _several(path: str, files: list[str]) -> History:
    """What a glob matches: shards, event files, or a file of gradients for each step."""
    if not any(map(is_native, files)):
        if all("tfevents" in os.path.basename(file) for file in files):
            from gradscope.histories.events import read_events

            return read_events(os.path.dirname(path) or ".", files)
        if are_records(files):
            return read_records(path, files)
    return read_shards(path, files)


def _is_parquet(path: str, start: bytes) -> bool:
    return start.startswith(b"PAR1")


def _parquet(path: str, as_: As | None) -> History:
    from gradscope.histories.tables import read_parquet

    return read_parquet(path)


def _is_events(path: str, start: bytes) -> bool:
    from gradscope.histories.tfrecords import is_events

    return is_events(start)


def _events(path: str, as_: As | None) -> History:
    from gradscope.histories.events import read_events

    return read_events(path, [path])


def _is_json(path: str, start: bytes) -> bool:
    return start.lstrip(b"\xef\xbb\xbf \t\r\n")[:1] in (b"{", b"[")


def _json(path: str, as_: As | None) -> History:
    """One JSON value (trainer_state.json, a list of rows), else JSON lines."""
    from gradscope.histories.tables import is_columns, read_columns, read_json, read_jsonl

    if os.path.getsize(path) > _JSON_CAP:
        return read_jsonl(path)
    with open(path, encoding="utf-8", errors="surrogateescape") as file:
        text = file.read()
    try:
        whole: Any = json.loads(text)
    except (ValueError, RecursionError):
        return read_jsonl(path)
    if isinstance(whole, dict) and isinstance(whole.get("log_history"), list):
        rows = [
            r
            for r in whole["log_history"]
            if isinstance(r, dict) and ("grad_norm" in r or "loss" in r)
        ]
        return read_json(path, rows, "trainer_state")
    if is_columns(whole):
        return read_columns(path, whole)
    return read_json(path, whole) if isinstance(whole, list) else read_jsonl(path)


def _is_native(path: str, start: bytes) -> bool:
    return start.startswith(b"PK") and is_native(path)


def _is_arrays(path: str, start: bytes) -> bool:
    try:
        return sniff(path) in ("safetensors", "zip-torch", "torch-legacy", "npz", "npy")
    except InputError as error:
        if error.kind == "unsupported" or start.isascii():
            return False
        raise


def _is_text(path: str, start: bytes) -> bool:
    first = start.removeprefix(b"\xef\xbb\xbf").lstrip().split(b"\n", 1)[0]
    return b"\0" not in start and first[:1] != b"<" and any(mark in first for mark in b",;\t")


def _csv(path: str, as_: As | None) -> History:
    from gradscope.histories.tables import read_csv

    return read_csv(path)


Recogniser = Callable[[str, bytes], bool]
Reader = Callable[[str, As | None], History]

#: In order: the first that recognises a file reads it.
_READERS: tuple[tuple[Recogniser, Reader], ...] = (
    (_is_native, lambda path, as_: read_native(path)),
    (_is_parquet, _parquet),
    (_is_events, _events),
    (_is_json, _json),
    (_is_arrays, read_arrays),
    (_is_text, _csv),
)


def _third_party(path: str) -> History:
    """Ask plugins, callables from path to History or None, in the order of their names."""
    for name, read in loaded("histories"):
        try:
            found = read(path)
        except (InputError, UsageError):
            raise
        except Exception as error:
            raise UsageError(f"the histories plugin {name!r} failed: {error}") from error
        if isinstance(found, History):
            if found.l2.shape != found.shape or found.status.shape != found.shape:
                raise UsageError(
                    f"the histories plugin {name!r} failed: arrays of {found.l2.shape} for "
                    f"{found.shape} records and layers"
                )
            return found
    raise InputError(path, "unsupported", _what(path))


def _what(path: str) -> str:
    """What a file is that is not a history (a web page, a pointer, an archive), and a remedy."""
    try:
        found = sniff(path)
    except InputError as error:
        if "gradscope reads" not in error.message:
            return error.message
        found = ""
    what = f"is a {found} file, which is not a history" if found else "is not a known history"
    return f"{what}; gradscope reads {_READS}"
