"""What a recorder has itself told of: the steps of optimizers, and the first forward pass.

Hooks hold no recorder: one that nobody else holds writes what it has and is gone.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from typing import Any, Protocol

import torch
from torch.utils.hooks import RemovableHandle


class Told(Protocol):
    """What is told."""

    def before_step(self, owner: int) -> None:
        """An optimizer is about to step."""

    def after_step(self, owner: int) -> None:
        """It has stepped."""

    def look_once(self, output: Any, inputs: Any, named: Any) -> None:
        """The first output that can be differentiated, and what it was computed from."""


def before_steps(optimizers: Iterable[Any], told: Told) -> Iterator[Any]:
    """The handles of hooks before each optimizer's steps."""
    for owner, optimizer in enumerate(optimizers):
        # What an optimizer of another library lacks is not asked of it.
        if hasattr(optimizer, "register_step_pre_hook"):
            yield optimizer.register_step_pre_hook(_calling(told, type(told).before_step, owner))


def after_steps(optimizers: Iterable[Any], told: Told) -> Iterator[Any]:
    """The handles of hooks after each optimizer's steps."""
    for owner, optimizer in enumerate(optimizers):
        if hasattr(optimizer, "register_step_post_hook"):
            yield optimizer.register_step_post_hook(_calling(told, type(told).after_step, owner))


def _calling(told: Told, method: Callable[[Any, int], None], owner: int) -> Callable[..., None]:
    me = weakref.ref(told)

    def hook(*_: Any) -> None:
        if (recorder := me()) is not None:
            method(recorder, owner)

    return hook


def of_forward(model: torch.nn.Module, told: Told) -> Any:
    """The handle of a hook that sees outputs; ``look_once`` removes it."""
    seen = Seen(told)
    if isinstance(model, torch.jit.ScriptModule):  # takes no hooks; the loss shows as much
        return RemovableHandle(OrderedDict())
    if getattr(model, "_compiled_call_impl", None) is not None:
        return CompiledCall(model, seen)
    return model.register_forward_hook(seen, with_kwargs=True)


class Seen:
    """A forward hook. That of a copy of the model does nothing, pickled ones without gradscope."""

    def __init__(self, told: Told) -> None:
        self._told = weakref.ref(told)

    def __call__(self, _module: Any, inputs: Any, named: Any, output: Any) -> None:
        """Tell of an output that can be differentiated."""
        recorder = self._told()
        if recorder is not None and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            recorder.look_once(output, inputs, named)

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (nullcontext(), "__exit__")


class CompiledCall:
    """A forward hook, for one call, of a module that ``nn.Module.compile`` has compiled.

    It would compile the hook with it; this one is called outside.
    """

    def __init__(self, model: torch.nn.Module, seen: Seen) -> None:
        call: Any = model._compiled_call_impl
        self._model, self._call = model, call

        def first(*inputs: Any, **named: Any) -> Any:
            output = call(*inputs, **named)
            seen(model, inputs, named, output)
            return output

        self._ours = model._compiled_call_impl = first

    def remove(self) -> None:
        """Leave the module as it was."""
        if self._model._compiled_call_impl is self._ours:
            self._model._compiled_call_impl = self._call
