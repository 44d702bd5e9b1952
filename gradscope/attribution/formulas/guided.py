"""Gradients that are rectified at activations. Values [N, C, H, W].

Operators of the backward pass are overridden, so rectifiers are found however they are written:
as modules, functions, in place, used twice, in TorchScript and exported programs. The gradient is
rectified where it arrives at a rectifier's output; at its input, this would also affect what comes
through a skip connection.

The maps hardly depend on the parameters of late layers (Adebayo et al. 2018): they show edges of
the image, as ``--evaluate`` reports.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gradscope.attribution.formulas.cams import gradcam_parts
from gradscope.attribution.formulas.gradients import Result
from gradscope.attribution.subject import Subject
from gradscope.errors import NotApplicableError

_aten = torch.ops.aten
#: The derivatives of rectifying activations; not of gates such as sigmoid.
_RECTIFIERS = frozenset(
    getattr(_aten, f"{name}_backward").default
    for name in ("threshold", "hardtanh", "hardswish", "silu", "gelu", "leaky_relu", "elu", "mish",
                 "softplus", "rrelu_with_noise")
)  # fmt: skip
_PRELU = _aten._prelu_kernel_backward.default


class Rectifiers(TorchDispatchMode):
    """Changes gradients that arrive at rectifiers, with or without the rectifiers' own gates."""

    def __init__(self, change: Callable[[Tensor], Tensor], gated: bool) -> None:
        super().__init__()
        self.change, self.gated = change, gated
        self.seen = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function not in _RECTIFIERS and function is not _PRELU:
            return function(*args, **(kwargs or {}))
        self.seen += 1
        arriving = self.change(args[0])
        if self.gated:
            return function(arriving, *args[1:], **(kwargs or {}))
        return (arriving, torch.zeros_like(args[2])) if function is _PRELU else arriving


def _rectified(subject: Subject, gated: bool) -> Result:
    parts, seen = [], 0
    leaf = subject.inputs.detach().clone().requires_grad_()
    for images in subject.images.split(subject.model.batch or 1):
        part = leaf[images]
        with torch.enable_grad():
            total = subject.score(part, images).sum()
        with Rectifiers(_positive, gated) as mode:
            parts.append(torch.autograd.grad(total, part)[0].detach())
        seen = mode.seen
    if not seen:
        raise NotApplicableError(
            "no rectifier in the backward pass: the map would be the plain gradient; use "
            "saliency, smoothgrad or a CAM method"
        )
    return torch.cat(parts), {"rectifiers": seen}


def _positive(gradient: Tensor) -> Tensor:
    return gradient.clamp(min=0)


def guided_backprop(subject: Subject) -> Result:
    """R_in = 1[x > 0] 1[R_out > 0] R_out at every rectifier; f'(x) max(R_out, 0) at smooth ones."""
    return _rectified(subject, gated=True)


def deconvnet(subject: Subject) -> Result:
    """R_in = 1[R_out > 0] R_out at every rectifier, whatever its input was."""
    return _rectified(subject, gated=False)


def guided_gradcam(subject: Subject) -> Result:
    """Guided backpropagation times the rectified Grad-CAM map, upsampled bilinearly."""
    values, facts = guided_backprop(subject)
    small = gradcam_parts(subject.activations, subject.activation_gradients).sum(1).relu()
    large = torch.nn.functional.interpolate(
        small[:, None], size=subject.inputs.shape[2:], mode="bilinear", align_corners=False
    )
    return values * large, facts
