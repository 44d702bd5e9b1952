"""Checkpoints of several files: an index of shards, or a folder in which to find the checkpoint."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice

from gradscope.checkpoints.files import Stamp, stamp
from gradscope.checkpoints.safetensors import (
    MalformedError,
    Repeated,
    human_size,
    is_text,
    listed,
    quoted,
    read_safetensors,
    read_start,
    strict_json,
)
from gradscope.checkpoints.tensors import Checkpoint, Failure, Problem, Skipped, TensorRef
from gradscope.errors import InputError, UsageError

ReadOne = Callable[[str], Checkpoint]

_INDEX = ".index.json"
_INDEX_CAP = 100_000_000
_CONFIG_CAP = 10_000_000
_NUMBERED = re.compile(r"(?P<prefix>.+)-(?P<number>\d{1,9})-of-(?P<total>\d{1,9})(?P<suffix>\..+)")
#: What may be a checkpoint in a folder, most readable first. Content decides once one is opened.
_SUFFIX_CLASSES = ((".safetensors",), (".bin", ".pt", ".pth", ".ckpt", ".pt2"), (".npz", ".npy"))
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


def read_index(path: str, read_one: ReadOne = read_safetensors) -> Checkpoint:
    """The checkpoint that an index (``*.index.json``) describes, compared with its shards.

    ``read_one`` reads one shard. Shards that are missing or unreadable are Failures; the rest is
    returned. Raises InputError when the index itself cannot be understood.
    """
    folder = os.path.dirname(path)
    index = _read_index_file(path)
    shards = [_read_shard(folder, name, read_one) for name in index.shards]
    checkpoint = _join(path, shards, _without_wrappers(index, shards))
    stale = _beside(_names_in(folder or "."), index.shards)
    return _with_config(_noted(checkpoint, stale), folder)


def read_folder(path: str, read_one: ReadOne = read_safetensors) -> Checkpoint:
    """The one checkpoint in a folder: by an index, by a well-known name, or the only one there.

    Raises UsageError when several files could be meant, InputError when none could.
    """
    choice = _choose(path, _names_in(path))
    checkpoint = _read_choice(path, choice, read_one)
    return replace(checkpoint, path=path, notes=(*checkpoint.notes, *choice.notes))


# The index file.


@dataclass(frozen=True, slots=True)
class _Index:
    name: str
    shard_of: Mapping[str, str]
    metadata: Mapping[str, object] = field(default_factory=dict)
    problems: tuple[Problem, ...] = ()
    stamps: Mapping[str, Stamp] = field(default_factory=dict)

    @property
    def shards(self) -> list[str]:
        return sorted(set(self.shard_of.values()))


def _read_index_file(path: str) -> _Index:
    before = stamp(path)
    if before[0] > _INDEX_CAP:
        raise InputError(path, "malformed", f"an index of {human_size(before[0])} is no index")
    try:
        value = strict_json(read_start(path, _INDEX_CAP), "the index")
        return _index(os.path.basename(path), value, {path: before})
    except MalformedError as error:
        raise InputError(path, "malformed", str(error)) from None


def _index(name: str, value: object, stamps: Mapping[str, Stamp]) -> _Index:
    shard_of = value.get("weight_map") if isinstance(value, dict) else None
    if not isinstance(value, dict) or not isinstance(shard_of, dict):
        raise MalformedError("the index has no object weight_map from tensor to shard")
    for tensor, shard in shard_of.items():
        _check_shard_name(tensor, shard)
    metadata = value.get("metadata")
    return _Index(
        name,
        shard_of,
        metadata if isinstance(metadata, dict) else {},
        tuple(_named_twice(name, shard_of)),
        stamps,
    )


def _check_shard_name(tensor: str, shard: object) -> None:
    """A shard lies beside its index: a path could make us read, and show, any file."""
    if not is_text(tensor):
        raise MalformedError(f"tensor name {ascii(tensor)[:200]} is not valid Unicode")
    if not isinstance(shard, str) or not is_text(shard):
        raise MalformedError(f"weight_map gives no file name for tensor {quoted(tensor)}")
    drive = shard[1:2] == ":"
    if shard in ("", ".", "..") or drive or any(char in shard for char in "/\\\0"):
        raise MalformedError(
            f"weight_map sends tensor {quoted(tensor)} to {quoted(shard)}: a shard must be a plain "
            "file name beside the index (path traversal is refused)"
        )


def _named_twice(index: str, shard_of: Mapping[str, object]) -> Iterator[Problem]:
    names = shard_of.repeated() if isinstance(shard_of, Repeated) else []
    if names:
        what = f"the index names {_count(names, 'tensor')} more than once: "
        message = f"{what}{listed(names, len(names))}; the last shard named is taken"
        remedy = "Write the index again: parsers disagree which entry wins."
        evidence: dict[str, int | float | str] = {"tensors": len(names), "first": names[0]}
        yield Problem("index-mismatch", index, message, remedy, evidence)


def _without_wrappers(index: _Index, shards: Sequence[_Shard]) -> _Index:
    """Torch's reader strips what DDP or torch.compile put before all names of a file: so here."""
    torch = [s for s in shards if s.checkpoint is not None and s.checkpoint.format != "safetensors"]
    if not torch:
        return index
    placed = _placed(index)
    for shard in torch:
        placed[shard.name] = _stripped(placed[shard.name])
    return replace(
        index, shard_of={name: shard for shard, names in placed.items() for name in names}
    )


def _stripped(names: list[str]) -> list[str]:
    from gradscope.checkpoints.statedict import SHARED_PREFIXES

    for prefix in SHARED_PREFIXES:
        if all(name.startswith(prefix) and len(name) > len(prefix) for name in names):
            return _stripped([name.removeprefix(prefix) for name in names])
    return names


def _count(items: Sequence[object], noun: str) -> str:
    return f"{len(items):,} {noun}" if len(items) == 1 else f"{len(items):,} {noun}s"


# Shards.


@dataclass(frozen=True, slots=True)
class _Shard:
    name: str
    checkpoint: Checkpoint | None = None
    error: InputError | None = None

    @property
    def tensors(self) -> tuple[TensorRef, ...]:
        return self.checkpoint.tensors if self.checkpoint else ()

    def names(self) -> set[str]:
        """Every tensor it holds: also those that are cut off or share another one's bytes."""
        if self.checkpoint is None:
            return set()
        tied = self.checkpoint.metadata.get("tied")
        skipped = {item.subject for item in self.checkpoint.skipped}
        shared = {str(name) for name in tied} if isinstance(tied, Mapping) else set()
        return {tensor.name for tensor in self.tensors} | skipped | shared

    @property
    def missing(self) -> bool:
        return self.error is not None and self.error.kind == "missing"


def _read_shard(folder: str, name: str, read_one: ReadOne) -> _Shard:
    try:
        return _Shard(name, checkpoint=read_one(os.path.join(folder, name)))
    except InputError as error:
        return _Shard(name, error=error)


def _shard_failures(shards: Sequence[_Shard]) -> Iterator[Failure]:
    missing = [shard.name for shard in shards if shard.missing]
    if missing:
        names = listed(missing, len(missing), 5)
        of = f"{len(missing):,} of {len(shards):,} shards cannot be opened"
        yield Failure("missing", f"{of}: {names}; fetch them into the same folder")
    for shard in shards:
        if shard.error is not None and not shard.missing:
            yield Failure(shard.error.kind, f"{shard.name}: {shard.error.message}")
        if shard.checkpoint is not None:
            for failure in shard.checkpoint.failures:
                yield Failure(failure.kind, f"{shard.name}: {failure.message}")


def _shard_problems(shards: Sequence[_Shard], placed: Mapping[str, list[str]]) -> Iterator[Problem]:
    for shard in shards:
        if shard.checkpoint is not None:
            yield from shard.checkpoint.problems
        elif shard.error is not None and shard.missing:
            yield _missing_shard(shard.name, shard.error.message, placed.get(shard.name, []))
        elif shard.error is not None and shard.error.kind == "truncated":
            remedy = "Fetch the shard again and compare its size or SHA-256."
            yield Problem("truncated-file", shard.name, shard.error.message, remedy)


def _missing_shard(shard: str, why: str, tensors: list[str]) -> Problem:
    names = listed(tensors, len(tensors))
    what = f"the index places {_count(tensors, 'tensor')} in this shard ({names})"
    message = f"{what}, which cannot be opened: {why}"
    remedy = "Fetch the shard into the folder of the index; what it holds was not analysed."
    return Problem("missing-shard", shard, message, remedy, {"tensors": len(tensors)})


# Numbering: `-00003-of-00007` promises how many shards there are.


def _numbering_problems(names: Iterable[str]) -> Iterator[Problem]:
    groups: dict[tuple[str, str], list[tuple[int, int, int]]] = {}
    for name in names:
        if match := _NUMBERED.fullmatch(name):
            number, total = match["number"], match["total"]
            group = groups.setdefault((match["prefix"], match["suffix"]), [])
            group.append((int(number), int(total), len(number)))
    for (prefix, suffix), found in groups.items():
        yield from _group_problems(prefix, suffix, found)


def _group_problems(
    prefix: str, suffix: str, found: list[tuple[int, int, int]]
) -> Iterator[Problem]:
    totals = sorted({total for _, total, _ in found})
    numbers = {number for number, _, _ in found}
    subject = f"{prefix}-*-of-{totals[-1]:0{found[0][2]}d}{suffix}"
    first = 0 if 0 in numbers else 1
    last = first + totals[-1] - 1
    if len(totals) > 1 or max(numbers) > last:
        yield _wrong_total(subject, totals, max(numbers))
    elif len(numbers) < totals[0]:
        gaps = (number for number in range(first, last + 1) if number not in numbers)
        names = [f"{number:0{found[0][2]}d}" for number in islice(gaps, 5)]
        yield _numbering_gap(subject, len(numbers), totals[0], names)


def _wrong_total(subject: str, totals: list[int], highest: int) -> Problem:
    of = " and ".join(f"{total:,}" for total in totals[:3])
    message = f"the shards' names contradict each other: they count up to {highest:,} of {of}"
    remedy = "Shards of different revisions are mixed: fetch all of them again from one."
    evidence: dict[str, int | float | str] = {"highest": highest, "totals": of}
    return Problem("missing-shard", subject, message, remedy, evidence)


def _numbering_gap(subject: str, found: int, total: int, gaps: list[str]) -> Problem:
    missing = total - found
    names = ", ".join(gaps) + (", …" if missing > len(gaps) else "")
    message = f"{missing:,} of {total:,} shards are missing by their numbering: {names}"
    remedy = "Fetch the missing shards; what they hold was not analysed."
    evidence: dict[str, int | float | str] = {"missing": missing, "total": total, "first": gaps[0]}
    return Problem("missing-shard", subject, message, remedy, evidence)


# Index against shards.


def _placed(index: _Index | None) -> dict[str, list[str]]:
    """The tensors that the index places in each shard."""
    placed: dict[str, list[str]] = {}
    for tensor, shard in index.shard_of.items() if index else ():
        placed.setdefault(shard, []).append(tensor)
    return placed


@dataclass(frozen=True, slots=True)
class _Mismatch:
    """What one readable shard and the index say differently."""

    shard: str
    absent: list[str]
    elsewhere: int
    unlisted: list[str]

    def problem(self) -> Problem:
        remedy = (
            "Fetch index and shards from one revision, or save the checkpoint again: a loader "
            "leaves tensors it does not find at their random initial values."
        )
        evidence: dict[str, int | float | str] = {
            "absent": len(self.absent),
            "elsewhere": self.elsewhere,
            "unlisted": len(self.unlisted),
        }
        return Problem("index-mismatch", self.shard, "; ".join(self._parts()), remedy, evidence)

    def _parts(self) -> Iterator[str]:
        if self.absent:
            names = listed(self.absent, len(self.absent))
            moved = f" ({self.elsewhere:,} of them in other shards)" if self.elsewhere else ""
            count = _count(self.absent, "tensor")
            yield f"the index places {count} in this shard that it does not hold: {names}{moved}"
        if self.unlisted:
            names = listed(self.unlisted, len(self.unlisted))
            count = _count(self.unlisted, "tensor")
            yield f"the shard holds {count} that the index does not place in it: {names}"


def _mismatches(shards: Sequence[_Shard], index: _Index, holders: _Holders) -> Iterator[_Mismatch]:
    placed = _placed(index)
    readable = {shard.name for shard in shards if shard.checkpoint is not None}
    for shard in shards:
        if shard.checkpoint is None:
            continue
        held = shard.names()
        absent = [name for name in placed.get(shard.name, []) if name not in held]
        elsewhere = sum(name in holders for name in absent)
        # One that the index places in another readable shard is that shard's to report.
        unlisted = [
            tensor.name
            for tensor in shard.tensors
            if (place := index.shard_of.get(tensor.name)) != shard.name and place not in readable
        ]
        if absent or unlisted:
            yield _Mismatch(shard.name, absent, elsewhere, unlisted)


_Holders = Mapping[str, list[str]]


def _holders(shards: Sequence[_Shard]) -> _Holders:
    """The shards that hold each tensor."""
    holders: dict[str, list[str]] = {}
    for shard in shards:
        for name in shard.names():
            holders.setdefault(name, []).append(shard.name)
    return holders


def _owner(name: str, holders: _Holders, index: _Index | None) -> str:
    """The shard whose copy is analysed: the index's choice, else the last, as loaders do it."""
    place = index.shard_of.get(name) if index else None
    return place if place in holders[name] else holders[name][-1]


def _second_copies(
    shards: Sequence[_Shard], holders: _Holders, index: _Index | None
) -> dict[str, list[str]]:
    """By shard, the tensors whose copy in another shard is the one analysed."""
    copies: dict[str, list[str]] = {}
    for shard in shards:
        for tensor in shard.tensors:
            name = tensor.name
            if len(holders[name]) > 1 and _owner(name, holders, index) != shard.name:
                copies.setdefault(shard.name, []).append(name)
    return copies


def _copy_problems(copies: Mapping[str, list[str]], holders: _Holders) -> Iterator[Problem]:
    for shard, names in copies.items():
        others = sorted({other for name in names for other in holders[name]} - {shard})
        message = (
            f"{_count(names, 'tensor')} of this shard are in other shards too "
            f"({listed(others, len(others))}): {listed(names, len(names))}; loaders disagree which "
            "copy wins (the index's choice is analysed, or else the last)"
        )
        remedy = "Shards of different revisions may be mixed: fetch all of them again from one."
        evidence: dict[str, int | float | str] = {"tensors": len(names), "first": names[0]}
        yield Problem("duplicate-tensor-name", shard, message, remedy, evidence)


# Shards to one checkpoint.


def _join(path: str, shards: Sequence[_Shard], index: _Index | None) -> Checkpoint:
    holders = _holders(shards)
    copies = _second_copies(shards, holders, index)
    mismatches = _mismatches(shards, index, holders) if index else ()
    whole = [shard.checkpoint for shard in shards if shard.checkpoint is not None]
    numbering = tuple(_numbering_problems(shard.name for shard in shards))
    checkpoint = Checkpoint(
        path=path,
        format=_format(shards),
        nbytes=sum(part.nbytes for part in whole),
        tensors=tuple(_tensors(shards, copies)),
        problems=(
            *(index.problems if index else ()),
            *_shard_problems(shards, _placed(index)),
            *numbering,
            *(mismatch.problem() for mismatch in mismatches),
            *_copy_problems(copies, holders),
        ),
        skipped=(*_skipped_in(shards, copies), *_skipped_by(index, shards, holders)),
        failures=(*_shard_failures(shards), *(() if index else _numbering_failures(numbering))),
        notes=tuple(_shard_notes(shards)),
        metadata=_metadata(whole, index),
        stamps={key: at for part in (index, *whole) if part for key, at in part.stamps.items()},
    )
    return _noted(checkpoint, _size_note(checkpoint, index))


def _format(shards: Sequence[_Shard]) -> str:
    formats = {shard.checkpoint.format for shard in shards if shard.checkpoint is not None}
    if formats:
        return "safetensors-sharded" if formats == {"safetensors"} else "torch-sharded"
    by_name = all(shard.name.endswith(".safetensors") for shard in shards)
    return "safetensors-sharded" if by_name else "torch-sharded"


def _tensors(shards: Sequence[_Shard], copies: Mapping[str, list[str]]) -> Iterator[TensorRef]:
    for shard in shards:
        second = set(copies.get(shard.name, ()))
        yield from (tensor for tensor in shard.tensors if tensor.name not in second)


def _skipped_in(shards: Sequence[_Shard], copies: Mapping[str, list[str]]) -> Iterator[Skipped]:
    for shard in shards:
        if shard.checkpoint is not None:
            yield from shard.checkpoint.skipped
        for name in copies.get(shard.name, ()):
            yield Skipped(name, f"the copy in {shard.name}: another shard's is analysed")


def _skipped_by(
    index: _Index | None, shards: Sequence[_Shard], holders: _Holders
) -> Iterator[Skipped]:
    """What the index promises and no shard holds."""
    states = {shard.name: _state(shard) for shard in shards}
    for name, shard in index.shard_of.items() if index else ():
        if name not in holders:
            yield Skipped(name, f"its shard {shard} {states[shard]}")


def _state(shard: _Shard) -> str:
    if shard.checkpoint is not None:
        return "does not hold it"
    return "is missing" if shard.missing else "cannot be read"


def _numbering_failures(numbering: Iterable[Problem]) -> Iterator[Failure]:
    for problem in numbering:
        yield Failure("missing", f"{problem.subject}: {problem.message}; {problem.remedy}")


def _shard_notes(shards: Sequence[_Shard]) -> Iterator[str]:
    """Each note once, however many shards it is about."""
    about: dict[str, list[str]] = {}
    for shard in shards:
        for note in shard.checkpoint.notes if shard.checkpoint else ():
            about.setdefault(note, []).append(shard.name)
    for note, names in about.items():
        yield f"{names[0]}: {note}" if len(names) == 1 else f"in {len(names):,} shards: {note}"


def _metadata(parts: Sequence[Checkpoint], index: _Index | None) -> dict[str, object]:
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


def _size_note(checkpoint: Checkpoint, index: _Index | None) -> Iterator[str]:
    total = index.metadata.get("total_size") if index else None
    nbytes = sum(tensor.nbytes for tensor in checkpoint.tensors)
    partial = checkpoint.failures or checkpoint.skipped
    if type(total) is int and abs(total) < 2**63 and total != nbytes and not partial:
        yield f"the index says total_size is {total:,} bytes; its tensors take {nbytes:,}"


def _noted(checkpoint: Checkpoint, notes: Iterable[str]) -> Checkpoint:
    return replace(checkpoint, notes=(*checkpoint.notes, *notes))


# Folders.


@dataclass(frozen=True, slots=True)
class _Choice:
    """Which files of a folder are the checkpoint; an index stands for the shards it names."""

    files: tuple[str, ...]
    notes: tuple[str, ...] = ()


def _names_in(folder: str) -> list[str]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entry.name for entry in entries if not entry.is_dir())
    except OSError as error:
        reason = error.strerror or str(error)
        raise InputError(folder, "missing", f"cannot be listed: {reason}") from None


def _choose(path: str, names: list[str]) -> _Choice:
    present = set(names)
    for name in _ranked(names):
        if name in present:
            return _Choice((name,), tuple(_not_used(name, names)))
    for suffixes in _SUFFIX_CLASSES:
        found = [name for name in _candidates(names) if name.endswith(suffixes)]
        if found:
            return _only(path, found, names)
    raise InputError(path, "missing", _nothing_in(path))


def _ranked(names: list[str]) -> Iterator[str]:
    """What is taken without asking. A torch index may be left over beside a safetensors model."""
    indexes = sorted((name for name in names if name.endswith(_INDEX)), key=_index_rank)
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
        name
        for name in names
        if name.endswith(sum(_SUFFIX_CLASSES, ())) and not _BESIDE.fullmatch(name)
    ]


def _not_used(chosen: str, names: list[str]) -> Iterator[str]:
    """An index notes by itself which files it does not name; other indexes are noted here."""
    is_index = chosen.endswith(_INDEX)
    others = [name for name in names if name.endswith(_INDEX) and name != chosen]
    if not is_index:
        others += [name for name in _candidates(names) if name != chosen]
    if others:
        yield f"{chosen} was read; not {listed(others, len(others))}, which the folder also has"
    elif is_index:
        yield f"{chosen} was read"


def _only(path: str, found: list[str], names: list[str]) -> _Choice:
    if len(found) == 1:
        return _Choice((found[0],), tuple(_not_used(found[0], names)))
    matches = [_NUMBERED.fullmatch(name) for name in found]
    groups = {(match["prefix"], match["suffix"]) if match else None for match in matches}
    if len(groups) > 1 or None in groups:
        raise UsageError(f"{path}: could mean {listed(found, len(found), 10)}; name one of them")
    return _Choice(tuple(found), (f"{len(found):,} numbered shards were read without an index",))


def _nothing_in(path: str) -> str:
    looked = "an index (*.index.json), *.safetensors, *.bin, *.pt, *.pth, *.ckpt, *.pt2, *.npz"
    message = f"the folder holds no checkpoint; looked for {looked}"
    inside = list(islice(_subfolders_with_checkpoints(path), 6))
    return (
        f"{message}; give one of its folders: {listed(inside, len(inside), 5)}"
        if inside
        else message
    )


def _subfolders_with_checkpoints(path: str) -> Iterator[str]:
    with os.scandir(path) as entries:
        folders = sorted(entry.name for entry in entries if entry.is_dir())
    for folder in folders:
        try:
            names = _names_in(os.path.join(path, folder))
        except InputError:
            continue
        if _candidates(names) or any(name.endswith(_INDEX) for name in names):
            yield folder


def _read_choice(path: str, choice: _Choice, read_one: ReadOne) -> Checkpoint:
    first = os.path.join(path, choice.files[0])
    if first.endswith(_INDEX):
        return read_index(first, read_one)
    if len(choice.files) == 1 and not _NUMBERED.fullmatch(choice.files[0]):
        return _with_config(read_one(first), path)
    shards = [_read_shard(path, name, read_one) for name in choice.files]
    return _with_config(_join(path, shards, None), path)


def _beside(names: list[str], shards: Sequence[str]) -> Iterator[str]:
    """Files that look like shards and that the index does not name: stale, or another variant."""
    known, suffixes = set(shards), {os.path.splitext(shard)[1] for shard in shards}
    stale = [
        name
        for name in _candidates(names)
        if name not in known and os.path.splitext(name)[1] in suffixes
    ]
    if stale:
        yield f"beside the index, not named by it and not read: {listed(stale, len(stale), 5)}"


def _with_config(checkpoint: Checkpoint, folder: str) -> Checkpoint:
    """Adds config.json, for rules that compare the tensors with what the model is meant to be."""
    config = os.path.join(folder, "config.json")
    try:
        if stamp(config)[0] > _CONFIG_CAP:
            raise MalformedError(f"is larger than {human_size(_CONFIG_CAP)}")
        value = strict_json(read_start(config, _CONFIG_CAP), "config.json")
    except InputError:
        return checkpoint
    except MalformedError as error:
        return _noted(checkpoint, (f"config.json was not used: {error}",))
    if not isinstance(value, dict):
        return _noted(checkpoint, ("config.json was not used: it is no JSON object",))
    return replace(checkpoint, metadata={**checkpoint.metadata, "config": value})
