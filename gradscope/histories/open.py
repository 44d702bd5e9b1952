"""Opening a history, whatever wrote it: by content, then by a table of readers."""

from __future__ import annotations

import glob
import os

from gradscope.checkpoints.sniff import sniff
from gradscope.containers.beginning import Beginning
from gradscope.errors import InputError, UsageError
from gradscope.formats import recognised, supported
from gradscope.histories.arrays import As, are_records, read_records
from gradscope.histories.history import History
from gradscope.histories.joined import by_number, read_shards
from gradscope.histories.native import is_native
from gradscope.plugins import loaded


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
    file = Beginning(path)
    if not file.size:
        raise InputError(path, "truncated", "is empty (0 bytes)")
    row = recognised(file, "history")
    if row is None:
        return _third_party(path)
    read = row.load()
    history: History = read(path, as_=as_) if row.takes == "as_" else read(path)
    return history


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
    from gradscope.histories.tables import read_any_json

    state = os.path.join(path, "trainer_state.json")
    if os.path.isfile(state):
        return read_any_json(state)
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
    return f"{what}; gradscope reads {supported('history')}"
