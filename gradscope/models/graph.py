"""What autograd's graph tells of a tensor: which operators made it, and from what."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from itertools import permutations
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


def is_attended(tensor: Tensor) -> bool:
    """Whether attention's result, or one dense layer's projection of it, is the tensor.

    Attention that is not fused is a product with a softmax.
    """
    return any(
        _attends(node) or any(map(_attends, _behind(node, VIEWS)))
        for node in origins(tensor)
        if operator(node) in (*_DENSE, "Bmm") or _attends(node)
    )


def is_residual(tensor: Tensor) -> bool:
    """Whether the tensor is a sum of something and of what was computed from it."""
    return any(
        operator(node) == "Add"
        and any(_follows(one, other) for one, other in permutations(parts, 2))
        for node in origins(tensor)
        for parts in [[part for part, _ in node.next_functions if part is not None]]
    )


_DENSE = ("Addmm", "Mm", "MkldnnLinear", "Linear")


def _attends(node: Any) -> bool:
    name = operator(node)
    softmax = name == "Bmm" and any(operator(n) in _SOFTMAX for n in _behind(node, VIEWS))
    return softmax or "ScaledDotProduct" in name or name == "NativeMultiHeadAttention"


_SOFTMAX = ("Softmax", "SafeSoftmax")


def _behind(node: Any, through: Collection[str]) -> Iterator[Any]:
    """What a node read, behind operators in ``through``."""
    for part, _ in node.next_functions:
        yield from (n for n in _nodes(part, through) if operator(n) not in through)


def _follows(node: Any, other: Any) -> bool:
    return node is not other and any(before is other for before in _nodes(node))


def _walk(tensor: Tensor, through: Collection[str] | None = None) -> Iterator[Any]:
    """The nodes behind a tensor, each once; beyond a node only where ``through`` has it."""
    yield from _nodes(tensor.grad_fn, through)


def _nodes(first: Any, through: Collection[str] | None = None) -> Iterator[Any]:
    waiting, seen = [first], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        if through is None or operator(node) in through:
            waiting.extend(following for following, _ in node.next_functions)
