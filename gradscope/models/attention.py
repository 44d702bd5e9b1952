"""Attention weights of a forward pass, from fused attention too.

Fused kernels never materialise the weights, so scaled dot products run by the plain formula while
they are recorded; the answers differ by rounding alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from gradscope.errors import UsageError
from gradscope.models.model import Model
from gradscope.models.probe import logits_of

_SOFTMAX = (torch.ops.aten._softmax.default, torch.ops.aten._safe_softmax.default)
#: How far from one a row may sum: dropout, masks and sigmoid attention go farther.
_ROW_ERROR = 1e-3


@dataclass(frozen=True, eq=False, slots=True)
class Attentions:
    """One image's attention weights in the order of the blocks, and the logits [1, K]."""

    recorded: tuple[Tensor, ...]
    logits: Tensor
    batch: int

    @property
    def weights(self) -> tuple[Tensor, ...]:
        """Weights [heads, T, T] of every block; rows are queries."""
        return tuple(self._one(tensor.detach()) for tensor in self.recorded)

    def gradients(self, objective: Tensor) -> tuple[Tensor, ...]:
        """Gradients of a scalar by the weights [heads, T, T]; zero where none arrives."""
        found = torch.autograd.grad(
            objective, self.recorded, allow_unused=True, materialize_grads=True
        )
        return tuple(self._one(gradient) for gradient in found)

    def _one(self, recorded: Tensor) -> Tensor:
        return recorded.reshape(self.batch, -1, *recorded.shape[-2:])[0]


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[Tensor] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        output = function(*args, **(kwargs or {}))
        if function in _SOFTMAX and output.dim() in (3, 4) and output.shape[-1] > 1:
            self.found.append(output)
        return output


def attentions(model: Model, image: Tensor) -> Attentions:
    """The self-attention weights over all tokens that a held model gives an image [1, C, H, W].

    Raises UsageError where there is none, where attention goes over windows or tokens become
    fewer on the way, and where rows do not sum to one.
    """
    batch = model.batch or 1
    # A leaf that wants a gradient keeps nn.MultiheadAttention off its fused fast path.
    leaf = image.expand(batch, *image.shape[1:]).detach().clone().requires_grad_()
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), _Recorder() as recorder:
        answer = model.forward(leaf, {})
    square = tuple(w for w in recorder.found if w.shape[-1] == w.shape[-2] and w.requires_grad)
    _check(square, recorder.found, batch)
    return Attentions(square, logits_of(answer)[0][:1], batch)


def _check(square: tuple[Tensor, ...], found: list[Tensor], batch: int) -> None:
    advice = "take a CAM method, integrated-gradients or rise"
    if not square:
        seen = f" (softmax over {list(found[0].shape)} is none)" if found else ""
        raise UsageError(f"the model has no self-attention that can be seen{seen}: {advice}")
    shapes = {tuple(w.shape) for w in square}
    if len(shapes) > 1 or any(w.dim() == 4 and len(w) != batch for w in square):
        raise UsageError(
            "attention does not go over all tokens in every block (windows, or fewer tokens on "
            f"the way: {_listed(shapes)}), so blocks cannot be multiplied: {advice}"
        )
    error = max(float((w.detach().sum(-1) - 1).abs().max()) for w in square)
    if not error <= _ROW_ERROR:
        raise UsageError(
            f"rows of the attention weights sum to one only within {error:.2g}: masks, dropout or "
            f"another normalisation are at work; {advice}"
        )


def _listed(shapes: set[tuple[int, ...]]) -> str:
    return ", ".join(str(list(shape)) for shape in sorted(shapes)[:4])
