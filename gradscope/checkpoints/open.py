"""Opening a checkpoint, whatever its container."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator

from gradscope.checkpoints.documents import with_documents
from gradscope.checkpoints.folder import with_notes
from gradscope.checkpoints.numbering import NUMBERED
from gradscope.checkpoints.sharded import read_folder
from gradscope.checkpoints.sniff import DCP, FOLDER, sniff
from gradscope.checkpoints.tensors import Checkpoint
from gradscope.containers.absent import hub_download
from gradscope.errors import InputError, UsageError
from gradscope.formats import CHECKPOINT, Format, find, suffixes
from gradscope.plugins import loaded


def open_checkpoint(path: str, key: str | None = None) -> Checkpoint:
    """Describe the checkpoint at a path: a file, an index of shards, or a folder.

    Only headers are read; see ``integrity.verified`` before the data are used. ``key`` is the
    dotted path of the state dict inside a torch file. Raises InputError when it cannot be read,
    UsageError when the request is ambiguous.
    """
    try:
        found = sniff(path)
    except InputError as error:
        if error.kind != "unsupported":
            raise _of_a_hub(path) or error from None
        return _third_party(path, error)
    if found == FOLDER:
        return read_folder(path, lambda file: _read_one(file, key))
    if found == DCP:
        from gradscope.checkpoints.dcp import read_dcp

        return with_documents(read_dcp(path, key), path)
    row = find(found)
    if row.kind == "set":
        return _read_set(row, path, key)
    alone = with_notes(_read_file(row, path, key), _of_several(path))
    return with_documents(alone, os.path.dirname(path))


def _of_several(path: str) -> Iterator[str]:
    """What to say of one numbered shard that is read by itself."""
    match = NUMBERED.fullmatch(os.path.basename(path))
    if match is not None and int(match["total"]) > 1:
        yield f"one of {int(match['total']):,} numbered shards; give the folder to read all of them"


def _of_a_hub(path: str) -> InputError | None:
    """What to say of ``org/name`` where there is no folder of the first name."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", path) or os.path.exists(path.partition("/")[0]):
        return None
    if path.endswith(suffixes(*CHECKPOINT)):
        return None
    message = "no such folder; if it is a model of the Hugging Face Hub, first"
    return InputError(path, "missing", f"{message} {hub_download(path)}")


def _read_one(path: str, key: str | None) -> Checkpoint:
    """One file that holds tensors itself: what a shard must be."""
    found = sniff(path)
    if found in (FOLDER, DCP) or find(found).kind == "set":
        raise InputError(path, "unsupported", f"a shard must hold tensors; this is a {found}")
    return _read_file(find(found), path, key)


def _read_set(row: Format, path: str, key: str | None) -> Checkpoint:
    checkpoint: Checkpoint = row.load()(path, lambda file: _read_one(file, key))
    return checkpoint


def _read_file(row: Format, path: str, key: str | None) -> Checkpoint:
    if key is not None and row.takes != "key":
        raise UsageError(f"--key {key}: {row.family} files hold tensors only, no nested dicts")
    checkpoint: Checkpoint = row.load()(path, key) if row.takes == "key" else row.load()(path)
    return checkpoint


def _third_party(path: str, refusal: InputError) -> Checkpoint:
    """Ask plugins, callables from path to Checkpoint or None, in the order of their names.

    The refusal stands when none takes it.
    """
    for _, read in loaded("checkpoints"):
        checkpoint: Checkpoint | None = read(path)
        if checkpoint is not None:
            return checkpoint
    raise refusal
