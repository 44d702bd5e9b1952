"""A TorchScript graph with batch norms folded into convolutions and weights laid out for a CPU.

The weights become constants of the graph, so the program itself stays as it is. What stands in
branches, as in scripted convolutions, is not folded.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import reduce
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from gradscope.models.folding import weights

#: Convolutions, whose first inputs are x, weight and bias, and where ``transposed`` is among them.
_CONVOLUTIONS = {"aten::conv2d": None, "aten::_convolution": 6}
#: x, weight, bias, running mean, running variance, training, momentum, epsilon, cuDNN.
_NORM = "aten::batch_norm"


def rewrite(graph: Any, nodes: Iterable[Any], script: Any, layout: torch.memory_format) -> None:
    """Change a graph in place. A convolution whose output is tapped keeps its own numbers."""
    # Nodes that are removed on the way can no longer be asked.
    for node in [node for node in nodes if node.kind() in _CONVOLUTIONS]:
        _rewrite(graph, node, script, layout)


def worthwhile(nodes: Iterable[Any]) -> bool:
    """Whether there is more than the one convolution that cuts a transformer's patches."""
    return sum(node.kind() in _CONVOLUTIONS for node in nodes) > 1


def _rewrite(graph: Any, node: Any, script: Any, layout: torch.memory_format) -> None:
    inputs = list(node.inputs())
    at = _CONVOLUTIONS[node.kind()]
    weight, bias = (_constant(value, script) for value in inputs[1:3])
    if not isinstance(weight, Tensor) or weight.dim() != 4 or (at and inputs[at].toIValue()):
        return
    if not isinstance(bias, Tensor | None):
        return
    norm = _norm_after(node, script)
    read = None if norm is None else norm[1]
    found = weights(SimpleNamespace(weight=weight, bias=bias), read, layout)
    graph.setInsertPoint(node)
    for place, tensor in enumerate(found, start=1):
        if tensor is not None:
            node.replaceInput(place, graph.insertConstant(tensor.detach()))
    if norm is not None:
        norm[0].output().replaceAllUsesWith(node.output())
        norm[0].destroy()


_UNKNOWN = object()


def _constant(value: Any, script: Any) -> Any:
    """What an input always is: a constant of the graph, or an attribute of the program."""
    source, parts = value.node(), list[str]()
    while source.kind() == "prim::GetAttr":
        parts.append(source.s("name"))
        source = source.input().node()
    if parts:
        return reduce(getattr, reversed(parts), script)
    return value.toIValue() if source.kind() == "prim::Constant" else _UNKNOWN


def _norm_after(node: Any, script: Any) -> tuple[Any, SimpleNamespace] | None:
    """The norm that alone reads a convolution's output, and its numbers."""
    uses = node.output().uses()
    if len(uses) != 1 or uses[0].user.kind() != _NORM or uses[0].offset != 0:
        return None
    norm = uses[0].user
    _, weight, bias, mean, variance, training, _, epsilon, _ = (
        _constant(value, script) if place else None for place, value in enumerate(norm.inputs())
    )
    known = all(isinstance(t, Tensor) for t in (mean, variance)) and training is False
    if not known or any(value is _UNKNOWN for value in (weight, bias, epsilon)):
        return None
    return norm, SimpleNamespace(
        weight=weight, bias=bias, running_mean=mean, running_var=variance, eps=epsilon
    )
