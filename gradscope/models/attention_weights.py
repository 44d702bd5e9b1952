"""Attention weights of a forward pass, also where attention is fused.

Fused kernels never materialise the weights, so scaled dot products use the plain formula while
they are recorded; outputs differ by rounding only.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from gradscope.errors import NotApplicableError
from gradscope.models.model import Model
from gradscope.text import listed

_SOFTMAX = (torch.ops.aten._softmax.default, torch.ops.aten._safe_softmax.default)
_SUMS = (torch.ops.aten.add.Tensor, torch.ops.aten.add_.Tensor)
#: How far a row's sum may be from one; dropout, masks and sigmoid attention are farther off.
_ROW_ERROR = 1e-3
_ADVICE = "use a CAM method, integrated-gradients or rise"


@dataclass(frozen=True, eq=False, slots=True)
class Attentions:
    """One image's attention weights in the order of the blocks, and its logits [1, K]."""

    recorded: tuple[Tensor, ...]
    logits: Tensor
    batch: int

    @property
    def weights(self) -> tuple[Tensor, ...]:
        """Weights [heads, T, T] of every block; rows are queries."""
        return tuple(self._one(tensor.detach()) for tensor in self.recorded)

    def gradients(self, objective: Tensor) -> tuple[Tensor, ...]:
        """Gradients of a scalar by the weights [heads, T, T]; zero where it has none."""
        found = torch.autograd.grad(
            objective, self.recorded, allow_unused=True, materialize_grads=True
        )
        return tuple(self._one(gradient) for gradient in found)

    def _one(self, recorded: Tensor) -> Tensor:
        return recorded.reshape(self.batch, -1, *recorded.shape[-2:])[0]


class _Recorder(TorchDispatchMode):
    """What softmax makes, what it weighs, and how many positions the sums of the model have."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Tensor] = []
        #: (T, N) of products of [T, T] and [T, N].
        self.weighed: set[tuple[int, int]] = set()
        self.positions: set[int] = set()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        output = function(*args, **(kwargs or {}))
        if function in _SOFTMAX and output.dim() in (3, 4) and output.shape[-1] > 1:
            self.found.append(output)
        elif function is torch.ops.aten.bmm.default:
            self.weighed.add((args[0].shape[-1], args[1].shape[-1]))
        elif function in _SUMS and isinstance(output, Tensor):
            self.positions.update(_positions(output.shape))
        return output


def _positions(shape: torch.Size) -> Iterator[int]:
    """How many positions a sum may have: tokens, or the places of maps."""
    if len(shape) == 3:
        yield from shape[:2]
    if len(shape) == 4:
        yield from (shape[1] * shape[2], shape[2] * shape[3])


def _over_channels(count: int, recorder: _Recorder) -> bool:
    """Whether [count, count] weighs channels, each with its values of all tokens (XCiT)."""
    weighed = {n for t, n in recorder.weighed if t == count}
    return count not in recorder.positions and not weighed.isdisjoint(recorder.positions)


def is_attention(weights: Tensor) -> bool:
    """Whether the result of a softmax can be that of all tokens about all: square matrices."""
    rows, columns = weights.shape[-2:] if weights.dim() in (3, 4) else (0, 1)
    return rows == columns > 1


def attentions(model: Model, image: Tensor) -> Attentions:
    """The self-attention weights over all tokens for an image [1, C, H, W]; the model is held.

    Raises UsageError for a model without self-attention, with windowed attention, one over channels
    or a changing number of tokens, and where rows do not sum to one.
    """
    batch = model.batch or 1
    # A leaf that requires a gradient keeps nn.MultiheadAttention off its fused fast path.
    leaf = image.expand(batch, *image.shape[1:]).detach().clone().requires_grad_()
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), _Recorder() as recorder:
        answer = model.forward(leaf, {})
    square = tuple(w for w in recorder.found if is_attention(w) and w.requires_grad)
    _check(square, recorder.found, batch)
    count = square[0].shape[-1]
    if _over_channels(count, recorder):
        raise NotApplicableError(
            f"attention is over {count} channels, not over the image's tokens (as in XCiT): its "
            f"weights have no place; {_ADVICE}"
        )
    return Attentions(square, model.scores(answer).values[:1], batch)


def _check(square: tuple[Tensor, ...], found: list[Tensor], batch: int) -> None:
    if not square:
        seen = f" (its softmax over {list(found[0].shape)} is not one)" if found else ""
        raise NotApplicableError(f"no self-attention found in the model{seen}; {_ADVICE}")
    shapes = {tuple(w.shape) for w in square}
    if len(shapes) > 1 or any(w.dim() == 4 and len(w) != batch for w in square):
        raise NotApplicableError(
            "attention does not cover all tokens in every block (it is windowed, or the number of "
            f"tokens changes: {listed(map(list, sorted(shapes)), len(shapes), 4)}), so blocks "
            f"cannot be multiplied; {_ADVICE}"
        )
    error = max(float((w.detach().sum(-1) - 1).abs().max()) for w in square)
    if not error <= _ROW_ERROR:
        raise NotApplicableError(
            f"rows of the attention weights miss one by up to {error:.2g} (a mask, dropout or "
            f"another normalisation); {_ADVICE}"
        )
