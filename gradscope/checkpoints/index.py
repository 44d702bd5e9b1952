"""The index of a sharded checkpoint: a JSON file (``*.index.json``) from tensor to shard."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from gradscope.checkpoints.tensors import Problem
from gradscope.containers.files import Stamp, read_start, stamp
from gradscope.containers.strict_json import MalformedError, Repeated, is_text, parse
from gradscope.errors import InputError
from gradscope.text import listed, plural, quoted, size

_INDEX_CAP = 100_000_000


@dataclass(frozen=True, slots=True)
class Index:
    """Which shard holds each tensor, as the index says."""

    name: str
    shard_of: Mapping[str, str]
    metadata: Mapping[str, object] = field(default_factory=dict)
    problems: tuple[Problem, ...] = ()
    stamps: Mapping[str, Stamp] = field(default_factory=dict)

    @property
    def shards(self) -> list[str]:
        """The names of the shards, sorted."""
        return sorted(set(self.shard_of.values()))


def read_index_file(path: str) -> Index:
    """Raises InputError when the file is not an index, or sends a tensor outside its folder."""
    before = stamp(path)
    if before[0] > _INDEX_CAP:
        raise InputError(path, "malformed", f"is {size(before[0])}, too large for an index")
    try:
        value = parse(read_start(path, _INDEX_CAP), "the index")
        return _index(os.path.basename(path), value, {path: before})
    except MalformedError as error:
        raise InputError(path, "malformed", str(error)) from None


def _index(name: str, value: object, stamps: Mapping[str, Stamp]) -> Index:
    shard_of = value.get("weight_map") if isinstance(value, dict) else None
    if not isinstance(value, dict) or not isinstance(shard_of, dict):
        raise MalformedError("the index has no object weight_map from tensor to shard")
    for tensor, shard in shard_of.items():
        _check_shard_name(tensor, shard)
    metadata = value.get("metadata")
    return Index(
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
        what = f"the index names {plural(len(names), 'tensor')} more than once: "
        message = f"{what}{listed(map(quoted, names), len(names))}; the last shard named is taken"
        remedy = "Write the index again: parsers disagree which entry wins."
        evidence: dict[str, int | float | str] = {"tensors": len(names), "first": names[0]}
        yield Problem("index-mismatch", index, message, remedy, evidence)


def placed(index: Index | None) -> dict[str, list[str]]:
    """The tensors that the index places in each shard."""
    found: dict[str, list[str]] = {}
    for tensor, shard in index.shard_of.items() if index else ():
        found.setdefault(shard, []).append(tensor)
    return found
