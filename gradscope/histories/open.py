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
from gradscope.text import quoted


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
    if logged := _logged(path):
        return open_history(logged)
    from gradscope.histories.tables import are_downloads, read_downloads

    if are_downloads(tables := [f for f in files if f.endswith(".csv")]):
        return read_downloads(path, tables)
    records = [f for f in files if f.endswith((".pt", ".pth", ".safetensors"))]
    if records and are_records(records):
        return read_records(path, records)
    raise InputError(
        path,
        "missing",
        "has no shards (00000.npz, …), event files, trainer_state.json, metrics.csv, tags that "
        "TensorBoard saved as CSV or files of gradients named by step (step_10.pt, …)",
    )


#: What trainers leave in the folder of a run, and in one of each checkpoint or version below it.
_LOGGED = ("trainer_state.json", "metrics.csv", "metrics.jsonl")
_BELOW = ("checkpoint-*", "version_*", os.path.join("lightning_logs", "version_*"))


def _logged(path: str) -> str | None:
    """The log of the run in a folder: its own, or that of the last checkpoint.

    Raises UsageError where there are logs of several runs.
    """
    for name in _LOGGED:
        if os.path.isfile(os.path.join(path, name)):
            return os.path.join(path, name)
    for below in _BELOW:
        found = [
            file
            for name in _LOGGED
            for file in glob.glob(os.path.join(glob.escape(path), below, name))
        ]
        found.sort(key=lambda file: (len(os.path.dirname(file)), file))
        if found and (below == "checkpoint-*" or len(found) == 1):
            return found[-1]
        if found:
            first, second = (quoted(os.path.relpath(os.path.dirname(f), path)) for f in found[:2])
            raise UsageError(
                f"{path} holds several runs: {first} and {second}; give the folder of one run"
            )
    return None


def _several(path: str, files: list[str]) -> History:
    """What a glob matches: shards, event files, or a file of gradients for each step."""
    if not any(map(is_native, files)):
        if all("tfevents" in os.path.basename(file) for file in files):
            from gradscope.histories.events import read_events

            return read_events(os.path.dirname(path) or ".", files)
        from gradscope.histories.tables import are_downloads, read_downloads

        if are_downloads(files):
            return read_downloads(path, files)
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


#: The beginning of the file that Weights & Biases writes beside its logs.
_WANDB = b":W&B"
_EXPORT = (
    "is a run of Weights & Biases as it is stored, not as it is exported: upload it (wandb sync "
    "FOLDER), then write run.scan_history() of wandb.Api() to a file of JSON lines"
)


def _what(path: str) -> str:
    """What a file is that is not a history (a web page, a pointer, an archive), and a remedy."""
    if Beginning(path).start.startswith(_WANDB):
        return _EXPORT
    try:
        found = sniff(path)
    except InputError as error:
        if "gradscope reads" not in error.message:
            return error.message
        found = ""
    what = f"is a {found} file, which is not a history" if found else "is not a known history"
    return f"{what}; gradscope reads {supported('history')}"
