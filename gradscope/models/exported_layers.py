"""The convolutions and batch norms of an unflattened program, as layers that can be folded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node


def with_layers(module: nn.Module) -> nn.Module:
    """The module, whose parts that are one convolution or norm are replaced by such layers."""
    for name, part in list(module.named_modules()):
        layer = _layer(part) if name else None
        if layer is not None:
            module.set_submodule(name, layer)
    return module


def _layer(part: nn.Module) -> nn.Module | None:
    nodes = list(getattr(part, "graph", torch.fx.Graph()).nodes)
    calls = [node for node in nodes if node.op == "call_function"]
    made = _MADE.get(calls[0].target) if len(calls) == 1 else None
    if made is None or nodes[-1].args != (calls[0],):
        return None
    return made({name: _value(part, value) for name, value in _arguments(calls[0]).items()})


def _arguments(call: Node) -> dict[str, Any]:
    """The arguments of an operator by name, those with a default included."""
    schema = call.target._schema.arguments  # type: ignore[union-attr]
    defaults = {a.name: a.default_value for a in schema if a.has_default_value()}
    given = dict(zip((a.name for a in schema), call.args, strict=False))
    return defaults | given | call.kwargs


def _value(part: nn.Module, value: Any) -> Any:
    """An argument; a node is the tensor that it reads."""
    return getattr(part, str(value.target), None) if isinstance(value, Node) else value


def _convolution(given: Mapping[str, Any]) -> nn.Module | None:
    weight, bias = given["weight"], given["bias"]
    geometry = [given[name] for name in ("stride", "padding", "dilation")]
    if not isinstance(weight, Tensor) or not all(_ints(pair) for pair in geometry):
        return None
    outside, inside, *kernel = weight.shape
    groups: int = given["groups"]
    stride, padding, dilation = ((pair[0], pair[-1]) for pair in geometry)
    # On no device: weights would be drawn, and replaced at once.
    made = nn.Conv2d(
        inside * groups, outside, (kernel[0], kernel[1]), stride, padding, dilation, groups,
        bias=False, device="meta",
    )  # fmt: skip
    made.weight = nn.Parameter(weight.detach(), requires_grad=False)
    made.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
    return made


def _norm(given: Mapping[str, Any]) -> nn.Module | None:
    mean, variance, weight, bias = (
        given[name] for name in ("running_mean", "running_var", "weight", "bias")
    )
    if given["training"] or not isinstance(mean, Tensor) or not isinstance(variance, Tensor):
        return None
    made: Any = nn.BatchNorm2d(len(mean), given["eps"], affine=False, device="meta")
    made.running_mean, made.running_var = mean, variance
    made.weight, made.bias = (
        None if t is None else nn.Parameter(t.detach(), requires_grad=False) for t in (weight, bias)
    )
    layer: nn.Module = made.eval()
    return layer


def _ints(pair: Any) -> bool:
    return isinstance(pair, list | tuple) and all(isinstance(number, int) for number in pair)


_MADE: Mapping[Any, Callable[[Mapping[str, Any]], nn.Module | None]] = {
    torch.ops.aten.conv2d.default: _convolution,
    torch.ops.aten.batch_norm.default: _norm,
}
