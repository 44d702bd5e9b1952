"""Layers of a uniform series that lack a module which all the others have."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from gradscope.weights.experts import place
from gradscope.weights.names import series
from gradscope.weights.result import TensorResult
from gradscope.weights.roles import TRAINING, Role

#: What a module's main tensor is called, in whatever form it is stored.
_MAIN = re.compile(r"(q|_)?weight\w*|kernel|W_q|codes|Qidxs|trellis|B|_data|_weight_qdata")
_SUFFIX = re.compile(r"_(blocks|packed|quantized|int8)$")
_LEAST, _ALIKE = 5, 0.75


@dataclass(frozen=True, slots=True)
class Lost:
    """A module that one layer lacks."""

    stack: str
    number: int
    module: str
    layers: int

    @property
    def subject(self) -> str:
        """Its full name."""
        return f"{self.stack}.{self.number}.{self.module}"


def lost_modules(tensors: Iterable[TensorResult]) -> Iterator[Lost]:
    """Modules that one layer alone lacks, neither the first nor the last.

    Whole blocks of several modules are left out on purpose in some layers of some models; a module
    whose neighbours in its block are there is not.
    """
    names = (_module(t) for t in tensors if t.role not in TRAINING)
    for stack, members in series(filter(None, names)).items():
        if len(members) >= _LEAST and _alike(members):
            yield from _of_series(stack, members)


def _module(tensor: TensorResult) -> str | None:
    """The module that a tensor is the main part of, or the parameter itself."""
    where = place(tensor.name)
    if tensor.role in (Role.SCALE, Role.BIAS, Role.BUFFER) or (where and where.number is not None):
        return None
    module, _, leaf = tensor.name.rpartition(".")
    return module if _MAIN.fullmatch(leaf) else _SUFFIX.sub("", tensor.name)


def _alike(members: Mapping[int, frozenset[str]]) -> bool:
    """Whether nearly all layers hold the same modules, at least four."""
    ((commonest, count),) = Counter(members.values()).most_common(1)
    return len(commonest) >= 4 and count >= _ALIKE * len(members)


def _of_series(stack: str, members: Mapping[int, frozenset[str]]) -> Iterator[Lost]:
    having: dict[str, set[int]] = defaultdict(set)
    for number, held in members.items():
        for module in held:
            having[module].add(number)
    inner = set(members) - {min(members), max(members)}
    lacking: dict[int, list[str]] = defaultdict(list)
    for module, numbers in having.items():
        if len(numbers) == len(members) - 1 and (lost := set(members) - numbers) <= inner:
            lacking[lost.pop()].append(module)
    for number, modules in lacking.items():
        for module in modules:
            if not _in_lost_block(module, modules, members[number]):
                yield Lost(stack, number, module, len(members))


def _in_lost_block(module: str, lost: Iterable[str], held: Iterable[str]) -> bool:
    """Whether a block of several modules is gone with it, or something stands in its place."""
    block = module.rpartition(".")[0]
    if not block:
        return False
    inside = [m for m in lost if m.startswith(f"{block}.")]
    return len(inside) > 1 and not any(m.startswith(f"{block}.") for m in held)
