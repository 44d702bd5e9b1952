"""The rule about matrices that are equal: copied by mistake, tied, or kept twice."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile

from gradscope.report.rules import Observation, rule
from gradscope.report.severity import Severity
from gradscope.weights.result import Examined, Need, TensorResult
from gradscope.weights.roles import MATRICES, TABLES, Role
from gradscope.weights.rules.tensors import measured


@rule("W113", "duplicate-tensors", Severity.MEDIUM, reads=Examined, needs=Need.STATISTICS)
def duplicate_tensors(examined: Examined, *, least: int = 64) -> Iterator[Observation]:
    """Matrices of different layers that are equal bit for bit.

    Two layers never train to the same weights: one was copied over the other, by a merge, a
    wrong conversion or a failed restart. Equal on purpose, and info: a table and the output layer
    tied to it, and networks that follow another (target, EMA, teacher), told by the part of their
    names in which they differ. Single experts belong to `dead-expert`.
    """
    groups: dict[str, list[TensorResult]] = defaultdict(list)
    for tensor, s in measured(examined, MATRICES | {Role.QUANTIZED}):
        if tensor.content_hash and tensor.numel >= least and s.min != s.max:
            groups[tensor.content_hash].append(tensor)
    copies: dict[_Relation, list[tuple[TensorResult, TensorResult]]] = defaultdict(list)
    for group in groups.values():
        tied = any(t.role in TABLES for t in group)
        for other in group[1:]:
            if examined.experts.covers(other.name):
                continue
            copies[_relation(group[0].name, other.name, tied)].append((group[0], other))
    for relation, pairs in copies.items():
        yield _copied(relation, pairs)


@dataclass(frozen=True, slots=True)
class _Relation:
    """The layers or networks that two equal matrices belong to, and why they may be equal."""

    first: str
    second: str
    remedy: str
    meant: bool = True


def _relation(original: str, copy: str, tied: bool) -> _Relation:
    first, second = _differing(original, copy)
    if tied:
        return _Relation(first, second, "store tied weights once")
    if networks := _following(original, copy):
        remedy = (
            "nothing to do if one follows the other (a target, an EMA, a teacher) and was just "
            "made; if training went on, check that it is updated"
        )
        return _Relation(*networks, remedy)
    remedy = "compare with the source of the checkpoint; retrain or restore the copied layer"
    return _Relation(first, second, remedy, meant=False)


def _copied(relation: _Relation, pairs: Sequence[tuple[TensorResult, TensorResult]]) -> Observation:
    original, copy = pairs[0]
    return Observation(
        copy.name,
        f"{copy.name} equals {original.name}"
        if len(pairs) == 1
        else f"{len(pairs)} matrices of {relation.second or 'the model'} equal those of "
        f"{relation.first or 'the model'}, e.g. {copy.name}",
        relation.remedy,
        {"equal_tensors": len(pairs), "original": original.name, "affected_fraction": 1.0},
        severity=Severity.INFO if relation.meant else None,
    )


def _differing(first: str, second: str) -> tuple[str, str]:
    """Two names up to where they last differ: the layers that they belong to."""
    a, b = first.split("."), second.split(".")
    while len(a) > 1 and len(b) > 1 and a[-1] == b[-1]:
        a, b = a[:-1], b[:-1]
    return ".".join(a), ".".join(b)


_FOLLOWS = re.compile(
    r"avg|averaged?|backup|copy|ema|frozen|key|momentum|old|online|polyak|ref|shadow|slow|student|"
    r"swa|targets?|teacher"
)


def _following(first: str, second: str) -> tuple[str, str] | None:
    """The networks of two names, if one is called as one that follows another."""
    a, b = first.split("."), second.split(".")
    head = _alike(a, b)
    tail = _alike(a[head:][::-1], b[head:][::-1])
    for end in range(head + 1, max(len(a), len(b)) - tail + 1):
        networks = a[: min(end, len(a) - tail)], b[: min(end, len(b) - tail)]
        if any(_follows(part) for network in networks for part in network[head:]):
            return ".".join(networks[0]), ".".join(networks[1])
    return None


def _alike(a: Sequence[str], b: Sequence[str]) -> int:
    """How many parts two names begin with alike."""
    return len(list(takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False))))


def _follows(part: str) -> bool:
    tokens = re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", part)
    words = [t.lower() for t in tokens]
    return any(_FOLLOWS.fullmatch(w) for w in words if w != "key" or "encoder" in words)
