"""What tensors of a stack of layers are called together."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from gradscope.weights.result import TensorResult


def pattern(name: str) -> str:
    """A name with its layer numbers taken out: what the layers of a stack share."""
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", name)


def common_pattern(tensors: Sequence[TensorResult]) -> str:
    """One name for several tensors."""
    patterns = dict.fromkeys(pattern(t.name) for t in tensors)
    return next(iter(patterns)) + (f" (+{len(patterns) - 1} more)" if len(patterns) > 1 else "")


_NUMBERED = re.compile(
    r"^(.*?(?:^|\.)(?:layers?|blocks?|h|resblocks|encoder_layers?|\w*transformer_blocks))\.(\d+)\.(.+)$"
)


def series(names: Iterable[str]) -> Mapping[str, Mapping[int, frozenset[str]]]:
    """What the members of each numbered series of layers hold: stack -> number -> names in it."""
    found: dict[str, dict[int, set[str]]] = defaultdict(lambda: defaultdict(set))
    for name in names:
        if match := _NUMBERED.match(name):
            found[match[1]][int(match[2])].add(match[3])
    return {stack: {n: frozenset(held) for n, held in m.items()} for stack, m in found.items()}


_BLOCK = re.compile(r"((?:[^.]+\.)*?[^.]*?\.?\d+)\.")


def block_of(name: str) -> str | None:
    """The numbered block a tensor is in: ``layers.3`` of ``layers.3.mlp.weight``; None outside."""
    found = _BLOCK.match(name)
    return found[1] if found else None


def place_of(name: str) -> tuple[str, str]:
    """The block of a tensor, and where in it the tensor is: what the blocks of a stack share."""
    block = block_of(name)
    return (block, pattern(name[len(block) + 1 :])) if block else ("outside", name)
