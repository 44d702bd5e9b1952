"""The way parameters feed each other, read from one autograd graph; no module is hooked."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

Node = Any

#: What stands between a parameter and the operation that uses it.
_VIEWS = ("T", "Transpose", "Permute", "View", "UnsafeView", "Reshape", "ReshapeAlias", "ToCopy",
          "Expand", "Slice", "Alias", "Squeeze", "Unsqueeze", "Clone", "Select", "Split",
          "SplitWithSizes", "Unbind", "Chunk", "Mul", "Contiguous")  # fmt: skip
#: Operations whose inside the graph does not show.
_OPAQUE = ("CheckpointFunctionBackward", "CompiledFunctionBackward")


@dataclass(frozen=True, slots=True)
class Topology:
    """Modules in the order of their first use, and which feed which; the loss is None."""

    order: tuple[str, ...]
    edges: tuple[tuple[str | None, str | None], ...]


def topology(output: Any, owner: Mapping[int, str]) -> Topology | None:
    """The topology behind a model's output (any nesting of tensors that require gradients).

    ``owner`` maps the id of a parameter to its module. An operation belongs to the modules whose
    parameters enter it; its predecessors are the nearest such operations upstream, found through
    residual sums, concatenations and functional calls alike. None where part of the graph is
    hidden: compiled models and reentrant checkpoints.
    """
    roots = [t.grad_fn for t in tree_leaves(output) if isinstance(t, torch.Tensor) and t.grad_fn]
    nodes = _topological(roots)
    if not nodes or any(type(node).__name__ in _OPAQUE for node in nodes):
        return None
    users = _users(nodes, owner)
    nearest: dict[Node, frozenset[str]] = {}
    edges: dict[tuple[str | None, str | None], None] = {}
    first_use: dict[str, int] = {}
    for node in nodes:
        above = frozenset().union(*(nearest[n] for n in _inputs(node)))
        modules = users.get(node, frozenset())
        for module in sorted(modules):
            first_use[module] = min(first_use.get(module, 1 << 62), _sequence(node))
            edges |= {(u, module): None for u in above if u != module}
        nearest[node] = modules or above
    order = tuple(sorted(first_use, key=lambda m: first_use[m]))
    ends = frozenset().union(*(nearest[root] for root in roots))
    place = {module: i for i, module in enumerate(order)}
    fed = {v for _, v in edges}
    full = [
        *((None, m) for m in order if m not in fed),
        *sorted(edges, key=lambda e: (place[str(e[0])], place[str(e[1])])),
        *((m, None) for m in order if m in ends),
    ]
    return Topology(order, tuple(full))


def _inputs(node: Node) -> list[Node]:
    return [following for following, _ in node.next_functions if following is not None]


def _sequence(node: Node) -> int:
    """When the forward pass made the node."""
    return int(node._sequence_nr())


def _topological(roots: Iterable[Node]) -> list[Node]:
    """Every node below the roots, each after all that it leads to."""
    done: dict[Node, None] = {}
    stack = [(root, False) for root in roots]
    while stack:
        node, expanded = stack.pop()
        if node in done:
            continue
        if expanded:
            done[node] = None
        else:
            stack.append((node, True))
            stack.extend((n, False) for n in _inputs(node) if n not in done)
    return list(done)


def _users(nodes: Iterable[Node], owner: Mapping[int, str]) -> dict[Node, frozenset[str]]:
    """The operations that parameters enter, through views and casts, and their modules."""
    carried: dict[Node, str] = {}
    found: dict[Node, set[str]] = {}
    for node in nodes:
        variable = getattr(node, "variable", None)
        if variable is not None:
            if id(variable) in owner:
                carried[node] = owner[id(variable)]
            continue
        below = _inputs(node)
        if len(node.next_functions) == 1 and below and below[0] in carried and _is_view(node):
            carried[node] = carried[below[0]]
            continue
        for module in (carried[n] for n in below if n in carried):
            found.setdefault(node, set()).add(module)
    return {node: frozenset(modules) for node, modules in found.items()}


def _is_view(node: Node) -> bool:
    name = type(node).__name__.rstrip("0123456789").removesuffix("Backward")
    return name in _VIEWS


def modules_of(model: torch.nn.Module) -> Iterator[tuple[str, str, torch.nn.Parameter]]:
    """(parameter's name, its module's name, the parameter), tied ones once."""
    for name, parameter in model.named_parameters():
        yield name, name.rpartition(".")[0], parameter
