"""What an index says of its shards, against what the shards hold."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from gradscope.checkpoints.index import Index, placed
from gradscope.checkpoints.prefixes import shared_prefix
from gradscope.checkpoints.shards import Shard
from gradscope.checkpoints.tensors import Problem, Skipped
from gradscope.text import listed, plural, quoted

#: The shards that hold each tensor.
Holders = Mapping[str, list[str]]


def without_wrappers(index: Index, shards: Sequence[Shard]) -> Index:
    """Torch's reader strips what DDP or torch.compile put before all names of a file: so here."""
    torch = [s for s in shards if s.checkpoint is not None and s.checkpoint.format != "safetensors"]
    if not torch:
        return index
    names_in = placed(index)
    for shard in torch:
        names = names_in[shard.name]
        prefix = shared_prefix(names)
        names_in[shard.name] = [name.removeprefix(prefix) for name in names]
    return replace(
        index, shard_of={name: shard for shard, names in names_in.items() for name in names}
    )


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
            names = listed(map(quoted, self.absent), len(self.absent))
            moved = f" ({self.elsewhere:,} of them in other shards)" if self.elsewhere else ""
            count = plural(len(self.absent), "tensor")
            yield f"the index places {count} in this shard that it does not hold: {names}{moved}"
        if self.unlisted:
            names = listed(map(quoted, self.unlisted), len(self.unlisted))
            count = plural(len(self.unlisted), "tensor")
            yield f"the shard holds {count} that the index does not place in it: {names}"


def mismatches(shards: Sequence[Shard], index: Index, holders: Holders) -> Iterator[Problem]:
    """Where readable shards and the index disagree."""
    names_in = placed(index)
    readable = {shard.name for shard in shards if shard.checkpoint is not None}
    for shard in shards:
        if shard.checkpoint is None:
            continue
        held = shard.names()
        absent = [name for name in names_in.get(shard.name, []) if name not in held]
        elsewhere = sum(name in holders for name in absent)
        # One that the index places in another readable shard is that shard's to report.
        unlisted = [
            tensor.name
            for tensor in shard.tensors
            if (place := index.shard_of.get(tensor.name)) != shard.name and place not in readable
        ]
        if absent or unlisted:
            yield _Mismatch(shard.name, absent, elsewhere, unlisted).problem()


def holders_in(shards: Sequence[Shard]) -> Holders:
    """The shards that hold each tensor."""
    holders: dict[str, list[str]] = {}
    for shard in shards:
        for name in shard.names():
            holders.setdefault(name, []).append(shard.name)
    return holders


def _owner(name: str, holders: Holders, index: Index | None) -> str:
    """The shard whose copy is analysed: the index's choice, else the last, as loaders do it."""
    place = index.shard_of.get(name) if index else None
    return place if place in holders[name] else holders[name][-1]


def second_copies(
    shards: Sequence[Shard], holders: Holders, index: Index | None
) -> dict[str, list[str]]:
    """By shard, the tensors whose copy in another shard is the one analysed."""
    copies: dict[str, list[str]] = {}
    for shard in shards:
        for tensor in shard.tensors:
            name = tensor.name
            if len(holders[name]) > 1 and _owner(name, holders, index) != shard.name:
                copies.setdefault(shard.name, []).append(name)
    return copies


def copy_problems(copies: Mapping[str, list[str]], holders: Holders) -> Iterator[Problem]:
    """Tensors that several shards hold."""
    for shard, names in copies.items():
        others = sorted({other for name in names for other in holders[name]} - {shard})
        where = listed(map(quoted, others), len(others))
        message = (
            f"other shards ({where}) also hold {plural(len(names), 'tensor')} of this one: "
            f"{listed(map(quoted, names), len(names))}; loaders disagree which copy wins (the "
            "index's choice is analysed, or else the last)"
        )
        remedy = "Shards of different revisions may be mixed: fetch all of them again from one."
        evidence: dict[str, int | float | str] = {"tensors": len(names), "first": names[0]}
        yield Problem("duplicate-tensor-name", shard, message, remedy, evidence)


def promised_only(
    index: Index | None, shards: Sequence[Shard], holders: Holders
) -> Iterator[Skipped]:
    """What the index promises and no shard holds."""
    states = {shard.name: _state(shard) for shard in shards}
    for name, shard in index.shard_of.items() if index else ():
        if name not in holders:
            yield Skipped(name, f"its shard {shard} {states[shard]}")


def _state(shard: Shard) -> str:
    if shard.checkpoint is not None:
        return "does not hold it"
    return "is missing" if shard.missing else "cannot be read"
