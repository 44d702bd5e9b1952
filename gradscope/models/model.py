"""A model of any kind as one thing: inputs and taps at named layers go in, its answer comes out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.immutable_collections import immutable_list

from gradscope.errors import UsageError

#: Sees a layer's output; what it returns, unless None, goes on in its place.
Tap = Callable[[Tensor], Tensor | None]
Forward = Callable[[Tensor, Mapping[str, Tap]], Any]


@dataclass(frozen=True, eq=False, slots=True)
class Model:
    """A vision model that can be tapped: an ``nn.Module``, TorchScript or an exported program."""

    #: Owns the parameters and the training flags.
    module: nn.Module
    format: str
    #: The names that taps can have, in the order of definition.
    layers: tuple[str, ...]
    forward: Forward
    #: The one batch size that an exported program takes; None for any.
    batch: int | None = None
    #: The one size [C, H, W] of its images, where it is known; each None where it is free.
    size: tuple[int | None, int | None, int | None] = (None, None, None)
    notes: tuple[str, ...] = ()
    #: What was found out about the model and costs a pass to find again.
    known: dict[Any, Any] = field(default_factory=dict)

    def check_layers(self, names: Iterable[str]) -> None:
        """Raise UsageError for a name that no layer has, with the nearest that are."""
        for name in names:
            if name not in self.layers:
                raise UsageError(f"the model has no layer {name!r}{nearest(name, self.layers)}")


def nearest(name: str, names: Iterable[str]) -> str:
    """The end of a sentence that offers names like ``name``; ends alike count as like."""
    offered = list(names)
    ends = [n for n in offered if n.rsplit(".", 1)[-1] == name.rsplit(".", 1)[-1]]
    close = list(dict.fromkeys(get_close_matches(name, offered, n=3) + ends))[:3]
    return f"; did you mean {', '.join(close)}?" if close else ""


def as_model(model: object) -> Model:
    """Anything torch runs as a Model. Raises UsageError for what is none of them."""
    if isinstance(model, Model):
        return model
    if isinstance(model, torch.jit.ScriptModule):
        from gradscope.models.torchscript import script_model

        return script_model(model)
    if isinstance(model, torch.export.ExportedProgram):
        from gradscope.models.exported import exported_model

        return exported_model(model)
    if isinstance(model, nn.Module):
        return module_model(model)
    raise UsageError(
        f"a model is an nn.Module, a ScriptModule or an ExportedProgram, not {type(model).__name__}"
    )


def module_model(module: nn.Module) -> Model:
    """A model of named modules; ``torch.compile`` and data parallel wrappers are looked through."""
    # Hooks on a compiled module never fire.
    module = getattr(module, "_orig_mod", module)
    if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
        module = module.module
    return Model(
        module,
        "module",
        tuple(name for name, _ in module.named_modules() if name),
        hooked(module, module),
        size=(_channels(module), *_image_size(module)),
    )


def hooked(module: nn.Module, call: Callable[[Tensor], Any]) -> Forward:
    """A forward pass whose taps are forward hooks."""
    modules = dict(module.named_modules())

    def forward(inputs: Tensor, taps: Mapping[str, Tap]) -> Any:
        with ExitStack() as hooks:
            for name, tap in taps.items():
                handle = modules[name].register_forward_hook(
                    lambda _module, _inputs, output, tap=tap: _through(tap, output)
                )
                hooks.callback(handle.remove)
            return call(inputs)

    return forward


def _through(tap: Tap, output: Any) -> Any:
    """A layer that gives several things is tapped at the first, as attention blocks mean it.

    A part of an exported program also hands on what later parts need of its inside; what it gives
    itself comes last.
    """
    if isinstance(output, Tensor):
        return tap(output)
    if not isinstance(output, tuple | list):
        return None
    tensors = [i for i, part in enumerate(output) if isinstance(part, Tensor)]
    inside = isinstance(output, immutable_list)
    if not tensors or (tensors[0] != 0 and not inside):
        return None
    at = tensors[-1] if inside else 0
    found = tap(output[at])
    return None if found is None else _like(output, [*output[:at], found, *output[at + 1 :]])


def _like(output: Any, parts: list[Any]) -> Any:
    """Parts in the container that they were in; a named tuple has fields of its own."""
    return (
        output._replace(**dict(zip(output._fields, parts, strict=True)))
        if hasattr(output, "_replace")
        else type(output)(parts)
    )


def first_convolution(parameters: Iterable[Tensor]) -> Tensor | None:
    """The first four-dimensional weight, which in vision models reads the image."""
    return next((p for p in parameters if p.dim() == 4), None)


def _channels(module: nn.Module) -> int | None:
    for child in module.modules():
        if isinstance(child, nn.Conv2d):
            return child.in_channels
    weight = first_convolution(module.parameters())
    return None if weight is None else int(weight.shape[1])


def _image_size(module: nn.Module) -> tuple[int | None, int | None]:
    """The size that vision transformers are built for, by the names libraries give it."""
    config = getattr(module, "config", None)
    embedding = getattr(module, "patch_embed", None)
    for holder, name in (
        (module, "image_size"),
        (module, "img_size"),
        (embedding, "img_size"),
        (config, "image_size"),
    ):
        size = getattr(holder, name, None)
        if isinstance(size, int) and size > 0:
            return size, size
        if isinstance(size, tuple | list) and len(size) == 2:
            return int(size[0]), int(size[1])
    return None, None
