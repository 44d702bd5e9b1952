"""What autograd's graph tells of a tensor: which operators made it, and from what."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from typing import Any

from torch import Tensor

#: Operators that only rearrange elements.
VIEWS = frozenset(
    ("View", "UnsafeView", "ReshapeAlias", "Squeeze", "Unsqueeze", "Select", "Slice", "Alias",
     "Clone", "Permute", "T", "Transpose", "ToCopy", "Expand", "Index", "Unbind", "Split", "Cat",
     "Stack", "AsStrided", "SplitWithSizes", "Narrow")
)  # fmt: skip


def operator(node: Any) -> str:
    """A node's operator: ``Softmax`` for ``SoftmaxBackward0``."""
    return re.sub(r"Backward\d*$", "", node.name())


def origins(tensor: Tensor, through: Collection[str] = VIEWS) -> list[Any]:
    """The nodes that made a tensor, behind operators in ``through``; none without a graph."""
    return [n for n in _walk(tensor, through) if operator(n) not in through]


def made_by(tensor: Tensor, through: Collection[str] = VIEWS) -> set[str]:
    """The operators of these nodes."""
    return {operator(node) for node in origins(tensor, through)}


def reaches(tensor: Tensor, source: Tensor) -> bool:
    """Whether a gradient of ``tensor`` gets to ``source``."""
    wanted = source.grad_fn
    return any(
        node is wanted if wanted is not None else getattr(node, "variable", None) is source
        for node in _walk(tensor)
    )


def has_dead_end(tensor: Tensor) -> bool:
    """Whether a tensor's graph has an operator without a derivative, so that a part is missing."""
    return any(node.name().endswith("NotImplemented") for node in _walk(tensor))


def made_from(tensor: Tensor, other: Tensor) -> bool:
    """Whether ``other``, or what it is a view of, went into ``tensor``."""
    sources = origins(other)
    own = origins(tensor)
    before = set(_walk(tensor)) - set(own)
    return bool(sources) and all(source in before for source in sources)


def _walk(tensor: Tensor, through: Collection[str] | None = None) -> Iterator[Any]:
    """The nodes behind a tensor, each once; beyond a node only where ``through`` has it."""
    waiting, seen = [tensor.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        if through is None or operator(node) in through:
            waiting.extend(following for following, _ in node.next_functions)
