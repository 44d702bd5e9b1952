"""Which tensors each of several jobs measures: whole ones, decided from the headers alone.

Every job decides alike and by itself. Tensors one of which cannot be measured without another stay
together: the codes of a quantised weight and their scales, the queries and keys of an attention.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from heapq import heappop, heappush

from gradscope.checkpoints.tensors import Checkpoint
from gradscope.errors import InputError, UsageError
from gradscope.quantization.weights import Quantization
from gradscope.text import quoted


@dataclass(frozen=True, slots=True)
class Share:
    """One job of several, counted from 0."""

    index: int
    of: int

    def __str__(self) -> str:
        return f"{self.index}/{self.of}"


def share(text: str) -> Share:
    """``0/4`` to ``3/4``. Raises UsageError for anything else."""
    found = re.fullmatch(r"\s*(\d{1,6})/(\d{1,6})\s*", text)
    if found is None or not int(found[1]) < int(found[2]):
        raise UsageError(
            f"--shard takes i/n, from 0/4 to 3/4 for four jobs, not {quoted(text, 40)}"
        )
    return Share(int(found[1]), int(found[2]))


def owned(checkpoints: Sequence[Checkpoint], part: Share, heads: bool) -> list[frozenset[str]]:
    """The names of the tensors of each checkpoint that a job measures.

    ``heads`` keeps those together that its attention is measured by.
    """
    units = [
        (place, names)
        for place, checkpoint in enumerate(checkpoints)
        for names in _units(checkpoint, heads)
    ]
    sizes = [{ref.name: ref.nbytes for ref in c.tensors} for c in checkpoints]
    jobs = balanced([sum(sizes[place][n] for n in names) for place, names in units], part.of)
    own: list[set[str]] = [set() for _ in checkpoints]
    for (place, names), job in zip(units, jobs, strict=True):
        if job == part.index:
            own[place].update(names)
    return list(map(frozenset, own))


def balanced(sizes: Sequence[int], jobs: int) -> list[int]:
    """The job of each unit: the greatest first, each for the job with the least so far.

    No job then has more than 4/3 of what the best division would give it (Graham 1969).
    """
    loads = [(0, job) for job in range(jobs)]
    found = [0] * len(sizes)
    for unit in sorted(range(len(sizes)), key=lambda u: (-sizes[u], u)):
        load, found[unit] = heappop(loads)
        heappush(loads, (load + sizes[unit], found[unit]))
    return found


def _units(checkpoint: Checkpoint, heads: bool) -> Iterable[Sequence[str]]:
    """The names of tensors that are measured together, in file order."""
    from networkx.utils import UnionFind

    joined = UnionFind(ref.name for ref in checkpoint.tensors)
    for group in _groups(checkpoint, heads):
        joined.union(*group)
    units: dict[str, list[str]] = defaultdict(list)
    for ref in checkpoint.tensors:
        units[joined[ref.name]].append(ref.name)
    return units.values()


def _groups(checkpoint: Checkpoint, heads: bool) -> Iterator[list[str]]:
    from gradscope.quantization.recognise import recognise

    known = {ref.name for ref in checkpoint.tensors}
    quantization = Quantization()
    with suppress(InputError):  # which whoever measures is told
        quantization = recognise(checkpoint)
    for weight in quantization.weights:
        read = weight.decoding.refs if weight.decoding is not None else ()
        beside = (*(c.name for c in weight.companions), *(ref.name for ref in read))
        yield [weight.codes.name, *(name for name in beside if name in known)]
    if heads:
        from gradscope.weights.spectral import attention_groups

        for names in attention_groups(checkpoint, quantization):
            yield [name for name in names if name in known]
