"""Checkpoints of several files: an index of shards, or a folder in which to find the checkpoint."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from gradscope.checkpoints.comparison import (
    copy_problems,
    holders_in,
    mismatches,
    promised_only,
    second_copies,
    without_wrappers,
)
from gradscope.checkpoints.documents import with_documents
from gradscope.checkpoints.folder import (
    CheckpointFiles,
    beside,
    choose,
    names_in,
    with_notes,
)
from gradscope.checkpoints.index import INDEX_SUFFIX, Index, placed, read_index_file
from gradscope.checkpoints.numbering import NUMBERED, numbering_problems
from gradscope.checkpoints.shards import (
    ReadOne,
    Shard,
    read_shard,
    shard_failures,
    shard_problems,
)
from gradscope.checkpoints.tensors import Checkpoint, Failure, Problem, Skipped, TensorRef


def read_index(path: str, read_one: ReadOne) -> Checkpoint:
    """The checkpoint that an index (``*.index.json``) describes, compared with its shards.

    ``read_one`` reads one shard. Shards that are missing or unreadable are Failures; the rest is
    returned. Raises InputError when the index itself cannot be understood.
    """
    folder = os.path.dirname(path)
    index = read_index_file(path)
    shards = [read_shard(folder, name, read_one) for name in index.shards]
    checkpoint = _join(path, shards, without_wrappers(index, shards))
    stale = beside(names_in(folder or "."), index.shards)
    return with_documents(with_notes(checkpoint, stale), folder)


def read_folder(path: str, read_one: ReadOne) -> Checkpoint:
    """The one checkpoint in a folder: by an index, by a well-known name, or the only one there.

    Raises UsageError when several files could be meant, InputError when none could.
    """
    choice = choose(path)
    checkpoint = _read_choice(path, choice, read_one)
    return replace(checkpoint, path=path, notes=(*checkpoint.notes, *choice.notes))


def _read_choice(path: str, choice: CheckpointFiles, read_one: ReadOne) -> Checkpoint:
    first = os.path.join(path, choice.files[0])
    if first.endswith(INDEX_SUFFIX):
        return read_index(first, read_one)
    if len(choice.files) == 1 and not NUMBERED.fullmatch(choice.files[0]):
        return with_documents(read_one(first), path)
    shards = [read_shard(path, name, read_one) for name in choice.files]
    return with_documents(_join(path, shards, None), path)


def _join(path: str, shards: Sequence[Shard], index: Index | None) -> Checkpoint:
    holders = holders_in(shards)
    copies = second_copies(shards, holders, index)
    whole = [shard.checkpoint for shard in shards if shard.checkpoint is not None]
    numbering = tuple(numbering_problems(shard.name for shard in shards))
    checkpoint = Checkpoint(
        path=path,
        format=_format(shards),
        nbytes=sum(part.nbytes for part in whole),
        tensors=tuple(_tensors(shards, copies)),
        problems=(
            *(index.problems if index else ()),
            *shard_problems(shards, placed(index)),
            *numbering,
            *(mismatches(shards, index, holders) if index else ()),
            *copy_problems(copies, holders),
        ),
        skipped=(*_skipped_in(shards, copies), *promised_only(index, shards, holders)),
        failures=(*shard_failures(shards), *(() if index else _numbering_failures(numbering))),
        notes=tuple(_shard_notes(shards)),
        metadata=_metadata(whole, index),
        classes=tuple(dict.fromkeys(name for part in whole for name in part.classes)),
        stamps={key: at for part in (index, *whole) if part for key, at in part.stamps.items()},
    )
    return with_notes(checkpoint, _size_note(checkpoint, index))


def _format(shards: Sequence[Shard]) -> str:
    formats = {shard.checkpoint.format for shard in shards if shard.checkpoint is not None}
    if formats:
        return "safetensors-sharded" if formats == {"safetensors"} else "torch-sharded"
    by_name = all(shard.name.endswith(".safetensors") for shard in shards)
    return "safetensors-sharded" if by_name else "torch-sharded"


def _tensors(shards: Sequence[Shard], copies: Mapping[str, list[str]]) -> Iterator[TensorRef]:
    for shard in shards:
        second = set(copies.get(shard.name, ()))
        yield from (tensor for tensor in shard.tensors if tensor.name not in second)


def _skipped_in(shards: Sequence[Shard], copies: Mapping[str, list[str]]) -> Iterator[Skipped]:
    for shard in shards:
        if shard.checkpoint is not None:
            yield from shard.checkpoint.skipped
        for name in copies.get(shard.name, ()):
            yield Skipped(name, f"the copy in {shard.name}: another shard's is analysed")


def _numbering_failures(numbering: Iterable[Problem]) -> Iterator[Failure]:
    for problem in numbering:
        yield Failure("missing", f"{problem.subject}: {problem.message}; {problem.remedy}")


def _shard_notes(shards: Sequence[Shard]) -> Iterator[str]:
    """Each note once, however many shards it is about."""
    about: dict[str, list[str]] = {}
    for shard in shards:
        for note in shard.checkpoint.notes if shard.checkpoint else ():
            about.setdefault(note, []).append(shard.name)
    for note, names in about.items():
        yield f"{names[0]}: {note}" if len(names) == 1 else f"in {len(names):,} shards: {note}"


def _metadata(parts: Sequence[Checkpoint], index: Index | None) -> dict[str, object]:
    """The shards' metadata, the first value of a key winning; dictionaries are united."""
    merged: dict[str, object] = {}
    for part in parts:
        for key, value in part.metadata.items():
            before = merged.setdefault(key, value)
            if isinstance(before, Mapping) and isinstance(value, Mapping):
                merged[key] = {**value, **before}
    if index and index.metadata:
        merged["index"] = index.metadata
    return merged


def _size_note(checkpoint: Checkpoint, index: Index | None) -> Iterator[str]:
    total = index.metadata.get("total_size") if index else None
    nbytes = sum(tensor.nbytes for tensor in checkpoint.tensors)
    partial = checkpoint.failures or checkpoint.skipped
    if type(total) is int and abs(total) < 2**63 and total != nbytes and not partial:
        yield f"the index says total_size is {total:,} bytes; its tensors take {nbytes:,}"
