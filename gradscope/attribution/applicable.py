"""Whether a method can read a model, asked before any work."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gradscope.attribution.method import Method
from gradscope.attribution.methods import methods
from gradscope.attribution.subject import Subject
from gradscope.errors import NotApplicableError
from gradscope.models.graph import has_dead_end, reaches
from gradscope.models.probe import run


def check_applicable(subject: Subject, method: Method) -> None:
    """Raise NotApplicableError for a method that differentiates what cannot be differentiated."""
    if method.differentiates is None or (method.differentiates == "layer" and _layer_read(subject)):
        return
    known = subject.model.known
    if "undifferentiable" not in known:
        known["undifferentiable"] = undifferentiable(subject)
    if known["undifferentiable"] is not None:
        without = ", ".join(m.name for m in methods().values() if m.differentiates is None)
        raise NotApplicableError(
            f"the model cannot be differentiated: {known['undifferentiable']}; methods that need "
            f"no gradient: {without}"
        )


def _layer_read(subject: Subject) -> bool:
    """Whether the score has a gradient at the layer, and the whole of it."""
    logits, pieces = subject.tapped.logits, subject.tapped.pieces[subject.layer_name]
    return not has_dead_end(logits) and any(reaches(logits, piece) for piece in pieces)


def undifferentiable(subject: Subject) -> str | None:
    """Why the score has no gradient, or not the whole of it, at the image; None where it has."""
    leaf = subject.inputs[:1].detach().clone().requires_grad_()
    with torch.enable_grad(), _Watch() as watch:
        values = run(subject.model, leaf).logits
    if watch.quantised is not None:
        return f"it is quantised ({watch.quantised})"
    if reaches(values, leaf) and not has_dead_end(values):
        return None
    if watch.unrecorded:
        return "its forward pass runs under torch.no_grad()"
    return "its answer is detached from the image (detach, or a step through integers)"


class _Watch(TorchDispatchMode):
    """Sees what gradients do not pass."""

    def __init__(self) -> None:
        super().__init__()
        self.quantised: str | None = None
        self.unrecorded = False

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = function._schema.name
        if name.startswith("quantized"):
            self.quantised = self.quantised or name
        self.unrecorded |= not torch.is_grad_enabled()
        return function(*args, **(kwargs or {}))
