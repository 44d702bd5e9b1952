"""A private copy of a model: the same function, sooner.

Batch norms become part of the convolutions before them and weights lie with the channels last,
in which order convolutions on a CPU are fastest. The user's model stays as it is, and answers
itself where the copy cannot stand for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode
from torch.utils._pytree import tree_leaves

from gradscope.models.model import Copy, Forward, Model, Tap
from gradscope.models.unchanged import Looks, looks

#: How far the copy's answers may lie from the model's, of the greatest of them.
AGREES = 1e-5
#: Images seen before a copy pays, those that are differentiated counted twice.
_WORTH = 16


def quick(model: Model, worth: int = _WORTH) -> Model:
    """The model, answered by a private copy once that pays: after ``worth`` images.

    Answers of the copy agree within ``AGREES`` of the greatest one. Models on an accelerator, in
    other types than float32 and float64, and without convolutions answer themselves. The copy is
    made while the model is held. It stays with the ``Model`` for as long as nothing is changed in
    that, so one that is asked picture by picture makes it once.
    """
    parameters = list(model.module.parameters())
    held = [*parameters, *model.module.buffers()]
    suits = all(p.dtype in _FULL for p in parameters) and all(map(_plain, held))
    if model.copied is None or not suits:
        return replace(model, quick=True)
    return replace(model, forward=_Answering(model, _state(model), worth), quick=True)


def _plain(tensor: Tensor) -> bool:
    strided = tensor.device.type == "cpu" and tensor.layout == torch.strided
    return strided and not tensor.is_complex() and not tensor.is_quantized


@dataclass(eq=False, slots=True)
class _State:
    """How many images a model has seen, and its copy with how the model looked then."""

    seen: int = 0
    copy: Copy | None = None
    looks: Looks | None = None
    weights: _Watched | None = None


def _state(model: Model) -> _State:
    known: _State = model.lasting.setdefault("quick", _State())
    if known.looks is not None and not known.looks.same(looks(model.module)):
        known = model.lasting["quick"] = _State()
    return known


def same_answers(model: Model, inputs: Tensor, others: Tensor) -> bool:
    """Whether a held model answers alike to the same images in another form."""
    return _agrees(model.forward, others, _answers(model.forward, inputs))


_FULL = (torch.float32, torch.float64)


@dataclass(frozen=True, eq=False, slots=True)
class _Answering:
    """A forward pass by the model itself at first, then by its copy."""

    model: Model
    state: _State
    worth: int

    @property
    def copy(self) -> Copy | None:
        """The copy, once there is one."""
        return self.state.copy

    def __call__(self, inputs: Tensor, taps: Mapping[str, Tap]) -> Any:
        # Who watches the operators, as relevance propagation does, wants those of the model.
        watched = _get_current_dispatch_mode() is not None
        copy = None if watched else self._copied(inputs)
        if copy is None or not copy.changed.isdisjoint(taps):
            return self.model.forward(inputs, taps)
        return copy.forward(inputs, taps)

    def _copied(self, inputs: Tensor) -> Copy | None:
        state = self.state
        state.seen += len(inputs) * (1 + inputs.requires_grad)
        if state.weights is None and state.seen >= self.worth:
            state.weights = _Watched(self.model)
            state.copy = _proved(self.model, inputs.clone().detach())
            state.looks = looks(self.model.module) if state.copy else None
        # Parameters that were changed meanwhile, to see what that does, are not in the copy.
        return state.copy if state.weights is not None and state.weights.same() else None


def _proved(model: Model, inputs: Tensor) -> Copy | None:
    """The first copy whose answers are the model's."""
    assert model.copied is not None
    image = inputs[: model.batch or 1]
    try:
        wanted = _answers(model.forward, image)
        copies = (copy for copy in model.copied(image) if _agrees(copy.forward, image, wanted))
        return next(copies, None)
    # Modules that cannot be copied raise anything; then the model answers itself.
    except Exception:
        return None


def _agrees(forward: Forward, image: Tensor, wanted: list[Tensor]) -> bool:
    """Whether a copy gives the answers; some models use views that its layout does not allow."""
    try:
        pairs = list(zip(_answers(forward, image), wanted, strict=True))
    except (RuntimeError, ValueError):
        return False
    return bool(pairs) and all(_close(found, right) for found, right in pairs)


def _close(found: Tensor, wanted: Tensor) -> bool:
    if found.shape != wanted.shape or not wanted.isfinite().all():
        return False
    return bool(((found - wanted).abs() <= AGREES * wanted.abs().max()).all())


def _answers(forward: Forward, image: Tensor) -> list[Tensor]:
    with torch.no_grad():
        leaves = tree_leaves(forward(image, {}))
    return [t for t in leaves if isinstance(t, Tensor) and t.is_floating_point() and t.numel()]


class _Watched:
    """The first and the last element of every parameter and buffer, to see whether they change."""

    def __init__(self, model: Model) -> None:
        tensors = (*model.module.parameters(), *model.module.buffers())
        self.ends: dict[torch.dtype, list[Tensor]] = {}
        for tensor in tensors:
            if tensor.numel():
                ends = [tensor.detach()[(at,) * tensor.dim()] for at in (0, -1)]
                self.ends.setdefault(tensor.dtype, []).extend(ends)
        self.before = self._now()

    def _now(self) -> list[Tensor]:
        return [torch.stack(ends) for ends in self.ends.values()]

    def same(self) -> bool:
        return all(map(torch.equal, self._now(), self.before))
