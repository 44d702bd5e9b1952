"""Which files of a folder are the checkpoint, and what lies beside it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice

from gradscope.checkpoints.index import INDEX_SUFFIX
from gradscope.checkpoints.numbering import NUMBERED
from gradscope.checkpoints.tensors import Checkpoint
from gradscope.errors import InputError, UsageError
from gradscope.formats import Kind, families, suffixes
from gradscope.text import escaped, listed, quoted

#: What may be a checkpoint by itself in a folder; content decides once it is opened.
_FILE: tuple[Kind, ...] = ("tensors", "program")
_WELL_KNOWN = (
    "model.safetensors",
    "pytorch_model.bin",
    "adapter_model.safetensors",
    "adapter_model.bin",
)
#: What trainers leave beside the model under a checkpoint's suffix.
_BESIDE = re.compile(
    r"(training_args|optimizer|scheduler|scaler|rng_state\w*|random_states\w*)"
    r"(_\d+)?\.(bin|pt|pth|npz)"
)


@dataclass(frozen=True, slots=True)
class CheckpointFiles:
    """Which files of a folder are the checkpoint; an index stands for the shards it names."""

    files: tuple[str, ...]
    notes: tuple[str, ...] = ()


def names_in(folder: str, folders: bool = False) -> list[str]:
    """The files of a folder, and its ``folders`` where asked, sorted. Raises InputError."""
    try:
        with os.scandir(folder) as entries:
            return sorted(entry.name for entry in entries if folders or not entry.is_dir())
    except OSError as error:
        reason = error.strerror or str(error)
        raise InputError(folder, "missing", f"cannot be listed: {reason}") from None


def holds_checkpoints(names: Iterable[str]) -> bool:
    """Whether any of the names is that of a checkpoint or an index."""
    return any(name.endswith((INDEX_SUFFIX, *suffixes(*_FILE))) for name in names)


def choose(path: str) -> CheckpointFiles:
    """Find the one checkpoint in a folder.

    Raises UsageError when several files could be meant, InputError when none could.
    """
    names = names_in(path)
    present = set(names)
    for name in _ranked(names):
        if name in present:
            return CheckpointFiles((name,), tuple(_not_used(name, names)))
    for ends in families(*_FILE).values():
        found = [name for name in _candidates(names) if name.endswith(ends)]
        if found:
            return _only(path, found, names)
    raise InputError(path, "missing", _nothing_in(path))


def _ranked(names: list[str]) -> Iterator[str]:
    """What is taken without asking. A torch index may be left over beside a safetensors model."""
    indexes = sorted((name for name in names if name.endswith(INDEX_SUFFIX)), key=_index_rank)
    safe = [name for name in indexes if ".safetensors" in name]
    yield from safe
    yield "model.safetensors"
    yield from (name for name in indexes if name not in safe)
    yield from _WELL_KNOWN


def _index_rank(name: str) -> tuple[bool, bool, int, str]:
    plain = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
    return name not in plain, ".safetensors" not in name, len(name), name


def _candidates(names: Iterable[str]) -> list[str]:
    return [
        name for name in names if name.endswith(suffixes(*_FILE)) and not _BESIDE.fullmatch(name)
    ]


def _not_used(chosen: str, names: list[str]) -> Iterator[str]:
    """An index notes by itself which files it does not name; other indexes are noted here."""
    is_index = chosen.endswith(INDEX_SUFFIX)
    others = [name for name in names if name.endswith(INDEX_SUFFIX) and name != chosen]
    if not is_index:
        others += [name for name in _candidates(names) if name != chosen]
    if others:
        left = listed(map(quoted, others), len(others))
        yield f"{escaped(chosen)} was read; not {left}, which the folder also has"
    elif is_index:
        yield f"{escaped(chosen)} was read"


def _only(path: str, found: list[str], names: list[str]) -> CheckpointFiles:
    if len(found) == 1:
        return CheckpointFiles((found[0],), tuple(_not_used(found[0], names)))
    matches = [NUMBERED.fullmatch(name) for name in found]
    groups = {(match["prefix"], match["suffix"]) if match else None for match in matches}
    if len(groups) > 1 or None in groups:
        several = listed(map(quoted, found), len(found), 10)
        raise UsageError(f"{path}: could mean {several}; name one of them")
    return CheckpointFiles(
        tuple(found), (f"{len(found):,} numbered shards were read without an index",)
    )


def _nothing_in(path: str) -> str:
    ends = ", ".join(f"*{suffix}" for suffix in suffixes(*_FILE))
    message = f"no checkpoint in the folder; looked for an index (*.index.json), {ends}"
    inside = list(islice(_subfolders_with_checkpoints(path), 6))
    if not inside:
        return message
    return f"{message}; give one of its folders: {listed(map(quoted, inside), len(inside), 5)}"


def _subfolders_with_checkpoints(path: str) -> Iterator[str]:
    with os.scandir(path) as entries:
        folders = sorted(entry.name for entry in entries if entry.is_dir())
    for folder in folders:
        try:
            names = names_in(os.path.join(path, folder))
        except InputError:
            continue
        if _candidates(names) or any(name.endswith(INDEX_SUFFIX) for name in names):
            yield folder


def beside(names: list[str], shards: Sequence[str]) -> Iterator[str]:
    """Files that look like shards and that the index does not name: stale, or another variant."""
    known, suffixes = set(shards), {os.path.splitext(shard)[1] for shard in shards}
    stale = [
        name
        for name in _candidates(names)
        if name not in known and os.path.splitext(name)[1] in suffixes
    ]
    if stale:
        shown = listed(map(quoted, stale), len(stale), 5)
        yield f"beside the index, not named by it and not read: {shown}"


def with_notes(checkpoint: Checkpoint, notes: Iterable[str]) -> Checkpoint:
    """The checkpoint with more notes."""
    return replace(checkpoint, notes=(*checkpoint.notes, *notes))
