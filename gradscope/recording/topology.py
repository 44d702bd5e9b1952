"""The way parameters feed each other, read from one autograd graph; no module is hooked."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map

from gradscope.recording.modules import modules_of

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


def merged(first: Topology | None, second: Topology | None) -> Topology | None:
    """What two graphs of one model show together; the input feeds only what nothing else does."""
    if first is None or second is None:
        return first or second
    edges = dict.fromkeys((*first.edges, *second.edges))
    fed = {v for u, v in edges if u is not None}
    kept = [(u, v) for u, v in edges if u is not None or v not in fed]
    return Topology(tuple(dict.fromkeys((*first.order, *second.order))), tuple(kept))


def compiled_topology(
    model: torch.nn.Module, output: Any, inputs: Any, named: Any
) -> Topology | None:
    """The topology of a compiled model, whose graph hides its inside; None of any other.

    Its forward pass is run once more, uncompiled, on tensors without values: nothing is computed,
    no random number is drawn, and attributes that the pass sets are set back.
    """
    roots = [t.grad_fn for t in tree_leaves(output) if isinstance(t, torch.Tensor) and t.grad_fn]
    if not any(type(n).__name__.startswith("CompiledFunction") for n in _topological(roots)):
        return None
    from torch._subclasses.fake_tensor import FakeTensorMode

    kept = {module: dict(module.__dict__) for module in model.modules()}
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    try:
        with mode, torch.compiler.set_stance("force_eager"), torch.enable_grad():
            tensors = (*model.named_parameters(), *model.named_buffers())
            state = {name: _fake(mode, tensor) for name, tensor in tensors}
            names = (name for name, _ in model.named_parameters())
            owner = {
                id(state[name]): module
                for name, (_, module, _) in zip(names, modules_of(model), strict=True)
            }
            given = tree_map(
                lambda v: _fake(mode, v) if isinstance(v, torch.Tensor) else v,
                (tuple(inputs), dict(named)),
            )
            return topology(torch.func.functional_call(model, state, *given), owner)
    except Exception:  # what cannot run without values keeps its secret
        return None
    finally:
        for module, attributes in kept.items():
            module.__dict__.clear()
            module.__dict__.update(attributes)


def _fake(mode: Any, tensor: torch.Tensor) -> torch.Tensor:
    """A leaf like ``tensor``, without values."""
    fake: torch.Tensor = mode.from_tensor(tensor.detach())
    return fake.requires_grad_(tensor.requires_grad)


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
