"""The files of a sharded checkpoint, each read as far as it can be."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from gradscope.checkpoints.tensors import Checkpoint, Failure, Problem, TensorRef
from gradscope.errors import InputError
from gradscope.text import listed, plural, quoted

ReadOne = Callable[[str], Checkpoint]


@dataclass(frozen=True, slots=True)
class Shard:
    """One file of a sharded checkpoint, or why it cannot be read."""

    name: str
    checkpoint: Checkpoint | None = None
    error: InputError | None = None

    @property
    def tensors(self) -> tuple[TensorRef, ...]:
        """The tensors that can be analysed."""
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
        """Whether there is no such file."""
        return self.error is not None and self.error.kind == "missing"


def read_shard(folder: str, name: str, read_one: ReadOne) -> Shard:
    """Read one file of a folder; an unreadable one is a Shard too."""
    try:
        return Shard(name, checkpoint=read_one(os.path.join(folder, name)))
    except InputError as error:
        return Shard(name, error=error)


def prefixed(shard: Shard, prefix: str) -> Shard:
    """The shard with a prefix before the names of all its tensors."""
    if shard.checkpoint is None or not prefix:
        return shard
    whole = shard.checkpoint
    tied = whole.metadata.get("tied")
    metadata = dict(whole.metadata)
    if isinstance(tied, Mapping):
        metadata["tied"] = {f"{prefix}.{a}": f"{prefix}.{b}" for a, b in tied.items()}
    renamed = replace(
        whole,
        tensors=tuple(replace(ref, name=f"{prefix}.{ref.name}") for ref in whole.tensors),
        skipped=tuple(replace(s, subject=f"{prefix}.{s.subject}") for s in whole.skipped),
        metadata=metadata,
    )
    return replace(shard, checkpoint=renamed)


def shard_failures(shards: Sequence[Shard]) -> Iterator[Failure]:
    """What of the shards could not be read."""
    missing = [shard.name for shard in shards if shard.missing]
    if missing:
        names = listed(map(quoted, missing), len(missing), 5)
        of = f"{len(missing):,} of {len(shards):,} shards cannot be opened"
        yield Failure("missing", f"{of}: {names}; fetch them into the same folder")
    for shard in shards:
        if shard.error is not None and not shard.missing:
            yield Failure(shard.error.kind, f"{shard.name}: {shard.error.message}")
        if shard.checkpoint is not None:
            for failure in shard.checkpoint.failures:
                yield Failure(failure.kind, f"{shard.name}: {failure.message}")


def shard_problems(shards: Sequence[Shard], placed: Mapping[str, list[str]]) -> Iterator[Problem]:
    """The shards\' own problems, and those that are missing or truncated."""
    for shard in shards:
        if shard.checkpoint is not None:
            yield from shard.checkpoint.problems
        elif shard.error is not None and shard.missing:
            yield _missing_shard(shard.name, shard.error.message, placed.get(shard.name, []))
        elif shard.error is not None and shard.error.kind == "truncated":
            remedy = "Fetch the shard again and compare its size or SHA-256."
            yield Problem("truncated-file", shard.name, shard.error.message, remedy)


def _missing_shard(shard: str, why: str, tensors: list[str]) -> Problem:
    names = listed(map(quoted, tensors), len(tensors))
    what = f"the index places {plural(len(tensors), 'tensor')} in this shard ({names})"
    message = f"{what}, which cannot be opened: {why}"
    remedy = "Fetch the shard into the folder of the index; what it holds was not analysed."
    return Problem("missing-shard", shard, message, remedy, {"tensors": len(tensors)})
