"""What Accelerate does with a loss and with gradients, seen from a callback that it does not call.

Hugging Face's Trainer tells callbacks of an optimizer step when it has clipped, and never of the
loss. Both pass through its ``Accelerator``, whose ``backward`` and ``clip_grad_norm_`` are wrapped,
once a process; without a listener the wrapping only hands on.
"""

from __future__ import annotations

import weakref
from functools import wraps
from typing import Any, Protocol

from accelerate import Accelerator


class Listener(Protocol):
    """What is told."""

    def listens(self, accelerator: Any) -> bool:
        """Whether it is this accelerator's training that is listened to."""

    def heard_loss(self, loss: Any) -> None:
        """A micro-batch's loss, divided as its gradients will be."""

    def heard_clipping(self, accelerator: Any, max_norm: float) -> None:
        """Gradients are complete and about to be clipped."""


_listeners: weakref.WeakSet[Any] = weakref.WeakSet()


def listen(listener: Listener) -> None:
    """Tell a listener until ``leave``, or until nobody holds it."""
    if not hasattr(Accelerator.backward, "__wrapped__"):
        Accelerator.backward = _heard_backward(Accelerator.backward)
        Accelerator.clip_grad_norm_ = _heard_clipping(Accelerator.clip_grad_norm_)
    _listeners.add(listener)


def leave(listener: Listener) -> None:
    """Tell it nothing any more."""
    _listeners.discard(listener)


def _heard_backward(original: Any) -> Any:
    @wraps(original)
    def backward(self: Any, loss: Any, **options: Any) -> Any:
        for listener in list(_listeners):
            if listener.listens(self):
                listener.heard_loss(loss / self.gradient_accumulation_steps)
        return original(self, loss, **options)

    return backward


def _heard_clipping(original: Any) -> Any:
    @wraps(original)
    def clip_grad_norm_(self: Any, parameters: Any, max_norm: float, *rest: Any, **by: Any) -> Any:
        for listener in list(_listeners):
            if listener.listens(self):
                listener.heard_clipping(self, max_norm)
        return original(self, parameters, max_norm, *rest, **by)

    return clip_grad_norm_
