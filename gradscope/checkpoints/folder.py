"""Which files of a folder are the checkpoint, and what lies beside it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice

from gradscope.checkpoints.bundles import bundled
from gradscope.checkpoints.choice import (
    FILE,
    Choice,
    Part,
    candidates,
    is_index_name,
    left_by_training,
    names_in,
    training_state,
)
from gradscope.checkpoints.series import by_number, gap, groups, is_variant, newest, preferred
from gradscope.checkpoints.tensors import Checkpoint, Failure
from gradscope.errors import InputError, UsageError
from gradscope.formats import families, suffixes
from gradscope.text import escaped, listed, quoted

_WELL_KNOWN = (
    "model.safetensors",
    "diffusion_pytorch_model.safetensors",
    "pytorch_model.bin",
    "adapter_model.safetensors",
    "adapter_model.bin",
)
#: What belongs to the model beside it, under names of its own: adapters, heads, projectors.
_BELONGS = re.compile(
    r"(adapter_model|v_head|value_head|non_lora_trainables|mm_projector)\.(safetensors|bin)"
)


def choose(path: str) -> Choice:
    """Find the one checkpoint in a folder.

    Raises UsageError when several files could be meant, InputError when none could.
    """
    return bundled(path, choose_files) or choose_files(path)


def choose_files(path: str) -> Choice:
    """The checkpoint among a folder's own files, whatever documents beside them say of others."""
    names = names_in(path)
    present = set(names)
    for name in _ranked(names):
        if name in present:
            return _with_parts(path, (Part(name),), names)
    for ends in families(*FILE).values():
        found = [name for name in candidates(names) if name.endswith(ends)]
        if found:
            return _only(path, found, names)
    raise InputError(path, "missing", _nothing_in(path))


def _ranked(names: list[str]) -> Iterator[str]:
    """What is taken without asking. A torch index may be left over beside a safetensors model."""
    indexes = sorted(filter(is_index_name, names), key=_index_rank)
    safe = [name for name in indexes if ".safetensors" in name and not is_variant(name)]
    yield from safe
    yield "model.safetensors"
    yield from (name for name in indexes if name not in safe and not is_variant(name))
    yield from _WELL_KNOWN
    yield from filter(is_variant, indexes)


def _index_rank(name: str) -> tuple[bool, bool, int, str]:
    plain = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
    return name not in plain, ".safetensors" not in name, len(name), name


def _with_parts(path: str, parts: tuple[Part, ...], names: list[str]) -> Choice:
    """The chosen files, what belongs to them under other names, and notes on all that is left."""
    taken = {part.name for part in parts}
    stems = {os.path.splitext(name)[0] for name in taken}
    extra: dict[str, str] = {}
    for name in sorted(filter(_BELONGS.fullmatch, names), reverse=True):  # safetensors before bin
        if os.path.splitext(name)[0] not in stems:
            extra.setdefault(os.path.splitext(name)[0], name)
    parts = (*parts, *(Part(name, stem) for stem, name in sorted(extra.items())))
    notes = [*_read_too(parts[0], extra), *_not_used(parts, names), *training_state(path, names)]
    return Choice(parts, tuple(notes))


def _read_too(first: Part, extra: dict[str, str]) -> Iterator[str]:
    if extra:
        also = listed(map(quoted, sorted(extra.values())), len(extra))
        yield f"{also} beside {escaped(first.name)} was read as a part of the model"


def _not_used(parts: Sequence[Part], names: list[str]) -> Iterator[str]:
    """An index notes by itself which files it does not name; other indexes are noted here."""
    taken = {part.name for part in parts}
    chosen = parts[0].name
    others = [name for name in names if is_index_name(name) and name not in taken]
    if not is_index_name(chosen):
        others += [name for name in candidates(names) if name not in taken]
    which = escaped(chosen) if len(parts) == 1 else f"{escaped(chosen)}, …"
    if others:
        left = listed(map(quoted, others), len(others))
        yield f"{which} was read; not {left}, which the folder also has"
    elif is_index_name(chosen):
        yield f"{which} was read"


def _only(path: str, found: list[str], names: list[str]) -> Choice:
    """The files of one checkpoint among several of one family. Raises UsageError."""
    several = preferred(groups(found))
    if len(several) > 1:
        raise UsageError(f"{path}: could mean {_several(path, found)}")
    (group,) = several
    if not group.numbered:
        return _with_parts(path, (Part(group.files[0]),), names)
    parts = tuple(Part(name, os.path.splitext(name)[0]) for name in group.files)
    choice = _with_parts(path, parts, names)
    note = f"{len(parts):,} numbered shards were read without an index"
    lost = [Failure("missing", f"{quoted(n)} is missing by its numbering") for n in gap(group)]
    return replace(choice, notes=(note, *choice.notes), failures=tuple(lost))


def _several(path: str, found: list[str]) -> str:
    named = listed(map(quoted, by_number(found)), len(found), 10)
    return f"{named}; name one of them{_latest(path, found)}"


def _latest(path: str, found: Sequence[str]) -> str:
    last = newest(found)
    return f" (the newest: `gradscope weights {os.path.join(path, last)}`)" if last else ""


def _nothing_in(path: str) -> str:
    inside = list(islice(_below(path), 200))
    if inside:
        shown = listed(map(quoted, by_number(inside)), len(inside), 5)
        return (
            f"no checkpoint in the folder itself; give one of its folders: {shown}"
            f"{_latest(path, inside)}"
        )
    ends = ", ".join(f"*{suffix}" for suffix in suffixes(*FILE))
    message = f"no checkpoint in the folder; looked for an index (*.index.json), {ends}"
    left = left_by_training(names_in(path))
    if not left:
        return message
    command = f"gradscope weights {os.path.join(path, left[0])}"
    return f"{message}; {listed(map(quoted, left), len(left))} is no model (`{command}` reads it)"


def _below(path: str, within: str = "", depth: int = 4) -> Iterator[str]:
    """Folders that hold checkpoints, the nearest of each branch, as paths below this one."""
    try:
        with os.scandir(os.path.join(path, within)) as entries:
            folders = sorted(entry.name for entry in entries if entry.is_dir())
    except OSError:
        return
    for folder in folders[:1000]:
        inside = os.path.join(within, folder)
        try:
            names = names_in(os.path.join(path, inside), folders=True)
        except InputError:
            continue
        if any(map(is_index_name, names)) or candidates(names):
            yield inside
        elif depth > 1:
            yield from _below(path, inside, depth - 1)


def beside(names: list[str], shards: Sequence[str]) -> Iterator[str]:
    """Files that look like shards and that the index does not name: stale, or another variant."""
    known, ends = set(shards), {os.path.splitext(shard)[1] for shard in shards}
    stale = [
        name
        for name in candidates(names)
        if name not in known and os.path.splitext(name)[1] in ends and not _BELONGS.fullmatch(name)
    ]
    if stale:
        shown = listed(map(quoted, stale), len(stale), 5)
        yield f"beside the index, not named by it and not read: {shown}"


def with_notes(checkpoint: Checkpoint, notes: Iterable[str]) -> Checkpoint:
    """The checkpoint with more notes."""
    return replace(checkpoint, notes=(*checkpoint.notes, *notes))
