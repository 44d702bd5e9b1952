"""Checkpoints of several files: an index of shards, or a folder in which to find the checkpoint."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from gradscope.checkpoints.choice import Choice, Part, is_index_name, names_in, training_state
from gradscope.checkpoints.comparison import (
    copy_problems,
    holders_in,
    mismatches,
    promised_only,
    second_copies,
    without_wrappers,
)
from gradscope.checkpoints.documents import with_documents
from gradscope.checkpoints.folder import beside, choose, with_notes
from gradscope.checkpoints.index import Index, placed, read_index_file
from gradscope.checkpoints.numbering import NUMBERED, numbering_problems
from gradscope.checkpoints.shards import (
    ReadOne,
    Shard,
    prefixed,
    read_shard,
    shard_failures,
    shard_problems,
)
from gradscope.checkpoints.sniff import sniff
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
    names = names_in(folder or ".")
    notes = (*beside(names, index.shards), *training_state(folder, names))
    return with_documents(with_notes(checkpoint, notes), folder)


def read_folder(path: str, read_one: ReadOne) -> Checkpoint:
    """The one checkpoint in a folder, of as many files and folders as belong to it.

    Raises UsageError when several files could be meant, InputError when none could.
    """
    choice = choose(path)
    checkpoint = _read_choice(path, choice, read_one)
    return replace(
        checkpoint,
        path=path,
        notes=(*checkpoint.notes, *choice.notes),
        failures=(*checkpoint.failures, *choice.failures),
    )


def _read_choice(path: str, choice: Choice, read_one: ReadOne) -> Checkpoint:
    if len(choice.parts) == 1 and not NUMBERED.fullmatch(choice.parts[0].name):
        return with_documents(_read_part(path, choice.parts[0], read_one), path)
    shards = [
        read_shard(path, part.name, lambda _, part=part: _read_part(path, part, read_one))  # type: ignore[misc]
        for part in choice.parts
    ]
    told_apart = choice.prefixed or _share_names(shards)
    if told_apart:
        pairs = zip(choice.parts, shards, strict=True)
        shards = [prefixed(shard, part.prefix) for part, shard in pairs]
    joined = _join(path, shards, None)
    if told_apart and len(shards) > 1 and not choice.prefixed:
        note = "the files share names of tensors: each name begins with that of its file"
        joined = with_notes(joined, [note])
    return with_documents(joined, path)


def _read_part(path: str, part: Part, read_one: ReadOne) -> Checkpoint:
    inside = os.path.join(path, part.name)
    if os.path.isdir(inside):
        sniff(inside)  # what is refused as a folder is refused as a part of one
        return read_folder(inside, read_one)
    return read_index(inside, read_one) if is_index_name(part.name) else read_one(inside)


def _share_names(shards: Sequence[Shard]) -> bool:
    """Whether parts hold tensors of one name, as ranks and models beside each other do.

    Shards of one numbering do not: there a name that occurs twice is a finding.
    """
    if any(NUMBERED.fullmatch(shard.name) for shard in shards):
        return False
    holders = holders_in(shards)
    return any(len(found) > 1 for found in holders.values())


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
        versions={name: version for part in whole for name, version in part.versions.items()},
        stamps={key: at for part in (index, *whole) if part for key, at in part.stamps.items()},
    )
    return with_notes(checkpoint, _size_note(checkpoint, index))


def _format(shards: Sequence[Shard]) -> str:
    formats = {shard.checkpoint.format for shard in shards if shard.checkpoint is not None}
    if not formats:
        by_name = all(shard.name.endswith(".safetensors") for shard in shards)
        return "safetensors-sharded" if by_name else "torch-sharded"
    for family in ("safetensors", "np", "gguf"):
        if all(name.startswith(family) for name in formats):
            return f"{'npz' if family == 'np' else family}-sharded"
    return "torch-sharded"


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
