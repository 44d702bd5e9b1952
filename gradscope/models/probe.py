"""Activations and gradients of a model at named layers, without leaving a trace in it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from difflib import get_close_matches

import torch
from torch import Tensor, nn

from gradscope.errors import UsageError


@contextmanager
def held(model: nn.Module) -> Iterator[nn.Module]:
    """The model in evaluation mode with frozen parameters; all is put back, after an error too.

    Training flags, ``requires_grad`` and the random state are restored; parameters, their
    gradients and buffers are never written.
    """
    modes = [(module, module.training) for module in model.modules()]
    wanted = [(p, p.requires_grad) for p in model.parameters()]
    state = torch.get_rng_state()
    try:
        model.eval()
        for parameter, _ in wanted:
            parameter.requires_grad_(False)
        yield model
    finally:
        for module, training in modes:
            module.training = training
        for parameter, needed in wanted:
            parameter.requires_grad_(needed)
        torch.set_rng_state(state)


@dataclass(frozen=True, eq=False, slots=True)
class Run:
    """One forward pass: logits [N, K], and the activations at the tapped layers."""

    logits: Tensor
    activations: Mapping[str, Tensor]

    def gradients(self, objective: Tensor, of: Sequence[Tensor]) -> list[Tensor]:
        """Gradients of a scalar; zero where it does not depend on a tensor. Keeps the graph."""
        found = torch.autograd.grad(objective, of, retain_graph=True, allow_unused=True)
        return [
            torch.zeros_like(t) if g is None else g.detach() for t, g in zip(of, found, strict=True)
        ]


def run(model: nn.Module, inputs: Tensor, layers: Sequence[str] = ()) -> Run:
    """A forward pass of a held model with taps at ``layers``.

    Where the inputs need no gradient, the graph begins at the taps: only the tail is ever
    differentiated. A module that is called several times is tapped at its last call. Raises
    UsageError for a layer that there is not, that is not called or gives no tensor, and for a
    model whose output is no [N, K] tensor.
    """
    modules = dict(model.named_modules())
    for layer in layers:
        if layer not in modules:
            raise UsageError(f"the model has no layer {layer!r}{_nearest(layer, modules)}")
    taps: dict[str, Tensor] = {}

    def tapped(name: str, output: object) -> Tensor:
        if not isinstance(output, Tensor):
            raise UsageError(f"layer {name!r} gives {type(output).__name__}, not a tensor")
        leaf = output if output.requires_grad else output.detach().requires_grad_()
        taps[name] = leaf
        # A copy goes on: what follows may write to it in place.
        return leaf.clone()

    with ExitStack() as hooks:
        for layer in layers:
            handle = modules[layer].register_forward_hook(
                lambda _module, _inputs, output, name=layer: tapped(name, output)
            )
            hooks.callback(handle.remove)
        with torch.enable_grad():
            logits = model(inputs)
    missing = [layer for layer in layers if layer not in taps]
    if missing:
        raise UsageError(f"layer {missing[0]!r} is not called by this model's forward pass")
    if not isinstance(logits, Tensor) or logits.dim() != 2:
        shape = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise UsageError(f"the model gives {shape}; attribution needs logits of shape [N, classes]")
    return Run(logits, taps)


def _nearest(layer: str, modules: Mapping[str, nn.Module]) -> str:
    close = get_close_matches(layer, [name for name in modules if name], n=3)
    return f"; did you mean {', '.join(close)}?" if close else ""


def last_map(model: nn.Module, inputs: Tensor) -> str:
    """The last leaf module that gives maps of more than one position: ``auto`` for CAM methods.

    Raises UsageError when no module gives [N, C, H, W] with H x W > 1.
    """
    found: list[str] = []
    with ExitStack() as hooks:
        for name, module in model.named_modules():
            if name and not any(module.children()):
                handle = module.register_forward_hook(
                    lambda _module, _inputs, output, name=name: _note(found, name, output)
                )
                hooks.callback(handle.remove)
        with torch.no_grad():
            model(inputs[:1])
    if not found:
        raise UsageError(
            "no layer gives maps of shape [N, C, H, W]; name one that does with layer=…"
        )
    return found[-1]


def _note(found: list[str], name: str, output: object) -> None:
    if isinstance(output, Tensor) and output.dim() == 4 and output.shape[2] * output.shape[3] > 1:
        found.append(name)
