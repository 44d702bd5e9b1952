"""Copies of modules whose batch norms are folded into the convolutions before them.

Which norm follows which convolution is seen in a pass, not guessed from names.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gradscope.errors import UsageError
from gradscope.models.model import Copy, Forward

#: Convolutions from which on their memory layout matters.
_SEVERAL = 2


def folded_copies(
    made: Callable[[], nn.Module], hooked: Callable[[nn.Module], Forward], image: Tensor
) -> Iterator[Copy]:
    """Copies, the faster first; none where nothing would be faster.

    ``made`` makes a copy in evaluation mode that may be changed, ``hooked`` its forward pass.
    """
    for layout in (torch.channels_last, torch.contiguous_format):
        module = made()
        pairs = dict(_pairs(module, lambda m=module: hooked(m)(image, {})))  # type: ignore[misc]
        plain = [name for name, part in module.named_modules() if _plain(part)]
        if not pairs and len(plain) < _SEVERAL:
            return
        _fold(module, pairs, plain, layout)
        yield Copy(laid(hooked(module), layout), frozenset(pairs))


def sharing(module: nn.Module) -> nn.Module:
    """A copy of a module's structure that shares its tensors. Raises UsageError for some."""
    # Such a function belongs to the module that it was made for.
    if any("forward" in vars(part) for part in module.modules()):
        raise UsageError("a forward function was replaced")
    shared = {id(t): t for t in (*module.parameters(), *module.buffers())}
    return copy.deepcopy(module, shared)


def laid(forward: Forward, layout: torch.memory_format) -> Forward:
    """A forward pass that sees its inputs in a memory layout."""

    def passed(inputs: Tensor, taps: Mapping[str, Any]) -> Any:
        return forward(inputs.contiguous(memory_format=layout), taps)

    return passed


def _fold(
    module: nn.Module, pairs: Mapping[str, str], plain: list[str], layout: torch.memory_format
) -> None:
    """Give the convolutions new weights; a norm whose work they do becomes the identity."""
    for name in plain:
        convolution: Any = module.get_submodule(name)
        norm = module.get_submodule(pairs[name]) if name in pairs else None
        weight, bias = weights(convolution, norm, layout)
        convolution.weight = nn.Parameter(weight, requires_grad=False)
        convolution.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
    for name in pairs.values():
        module.set_submodule(name, nn.Identity())


def weights(
    convolution: Any, norm: Any, layout: torch.memory_format
) -> tuple[Tensor, Tensor | None]:
    """The weight and bias of a convolution and the batch norm that follows it, if any."""
    weight, bias = convolution.weight.detach(), convolution.bias
    if norm is None:
        return weight.contiguous(memory_format=layout), bias
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    scale = scale if norm.weight is None else scale * norm.weight.detach().double()
    shift = -norm.running_mean.double() if bias is None else bias.detach() - norm.running_mean
    shift = shift * scale if norm.bias is None else shift * scale + norm.bias.detach()
    scaled = torch.empty_like(weight, memory_format=layout)
    torch.mul(weight, scale.to(weight)[:, None, None, None], out=scaled)
    return scaled, shift.to(weight)


def _plain(part: nn.Module) -> bool:
    """A convolution that computes nothing else: no hooks, no parametrised weight."""
    return type(part) is nn.Conv2d and not part._forward_hooks and not part._forward_pre_hooks


def _norm(part: nn.Module) -> bool:
    return (
        type(part) is nn.BatchNorm2d
        and part.running_mean is not None
        and not part._forward_hooks
        and not part._forward_pre_hooks
    )


#: A tensor and how often it had been written to.
_Version = tuple[Tensor, int]


@dataclass(slots=True)
class _Calls:
    """What one pass put into the norms and got from the convolutions, and the tensors' versions.

    The lists keep the tensors alive: an address says which is which.
    """

    outputs: dict[str, list[_Version]] = field(default_factory=dict)
    inputs: dict[str, list[_Version]] = field(default_factory=dict)

    def after(self, name: str, _part: nn.Module, _inputs: Any, output: Tensor) -> None:
        self.outputs.setdefault(name, []).append((output, output._version))

    def before(self, name: str, _part: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.inputs.setdefault(name, []).append((inputs[0], inputs[0]._version))


def _pairs(module: nn.Module, go: Callable[[], Any]) -> Iterator[tuple[str, str]]:
    """Each convolution and the norm that reads its output, where both are called once."""
    calls, parts = _Calls(), list(module.named_modules())
    with ExitStack() as hooks, torch.no_grad():
        for name, part in parts:
            if _plain(part):
                handle = part.register_forward_hook(partial(calls.after, name))
                hooks.callback(handle.remove)
            elif _norm(part):
                early = part.register_forward_pre_hook(partial(calls.before, name))
                hooks.callback(early.remove)
        go()
    by_output = {_key(out[0]): name for name, out in calls.outputs.items() if len(out) == 1}
    for name, given in calls.inputs.items():
        if len(given) == 1 and _key(given[0]) in by_output:
            yield by_output.pop(_key(given[0])), name


def _key(tensor: _Version) -> tuple[int, int]:
    return id(tensor[0]), tensor[1]
