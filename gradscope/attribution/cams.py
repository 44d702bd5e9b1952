"""Class activation maps: weighted sums of a layer's channels, from one forward and one backward.

The formulas take activations A and gradients g of the score, both [N, C, h, w], and give a map
[N, h, w] in the layer's geometry. Maps are signed: evidence against the target is negative, and is
cut off for display, or with ``relu=True`` as in the papers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gradscope.attribution.subject import Subject

Formula = Callable[[Tensor, Tensor], Tensor]


def weighted(weights: Tensor, activations: Tensor) -> Tensor:
    """Sum over the channels of ``weights`` [N, C] times activations [N, C, h, w]."""
    return (weights[..., None, None] * activations).sum(1)


def rectified(values: Tensor, relu: bool) -> Tensor:
    """The map with the papers' final ReLU, or as it is."""
    return values.relu() if relu else values


def _method(formula: Formula) -> Callable[..., tuple[Tensor, dict[str, Any]]]:
    def compute(subject: Subject, *, relu: bool) -> tuple[Tensor, dict[str, Any]]:
        values = formula(subject.activations, subject.activation_gradients)
        return rectified(values, relu), {}

    compute.__doc__ = formula.__doc__
    return compute


def gradcam_map(activations: Tensor, gradients: Tensor) -> Tensor:
    """sum_k a_k A_k, a_k the mean of g_k over positions."""
    return weighted(gradients.mean((2, 3)), activations)


def gradcam_plus_plus_map(activations: Tensor, gradients: Tensor) -> Tensor:
    """sum_k w_k A_k, w_k = sum alpha relu(g_k), alpha = g^2 / (2 g^2 + sum(A_k) g^3).

    Without an epsilon: one of 1e-6 changes the map by a tenth where gradients are 1e-4.
    """
    # alpha = 1 / (2 + sum(A) g) where g is not zero: its square may underflow.
    below = 2 + activations.sum((2, 3), keepdim=True) * gradients
    defined = (gradients != 0) & (below != 0)
    alpha = torch.where(defined, 1 / torch.where(defined, below, 1.0), 0.0)
    return weighted((alpha * gradients.relu()).sum((2, 3)), activations)


def xgradcam_map(activations: Tensor, gradients: Tensor) -> Tensor:
    """sum_k w_k A_k, w_k = sum(g_k A_k) / sum(A_k)."""
    total = activations.sum((2, 3))
    inner = (gradients * activations).sum((2, 3))
    weights = torch.where(total != 0, inner / torch.where(total != 0, total, 1.0), 0.0)
    return weighted(weights, activations)


def hirescam_map(activations: Tensor, gradients: Tensor) -> Tensor:
    """sum_k g_k A_k at each position."""
    return (activations * gradients).sum(1)


def layercam_map(activations: Tensor, gradients: Tensor) -> Tensor:
    """sum_k relu(g_k) A_k at each position."""
    return (activations * gradients.relu()).sum(1)


gradcam = _method(gradcam_map)
gradcam_plus_plus = _method(gradcam_plus_plus_map)
xgradcam = _method(xgradcam_map)
hirescam = _method(hirescam_map)
layercam = _method(layercam_map)


def eigencam(subject: Subject, *, relu: bool) -> tuple[Tensor, dict[str, Any]]:
    """Projection on the first principal component over positions; independent of the target.

    Its sign, which no decomposition fixes, is the one that correlates with the activations' sum.
    """
    activations = subject.activations
    points = activations.flatten(2).transpose(1, 2)
    centred = points - points.mean(1, keepdim=True)
    _, _, directions = torch.linalg.svd(centred, full_matrices=False)
    found = (centred @ directions[:, 0, :, None]).squeeze(-1)
    agrees = (found * centred.sum(2)).sum(1, keepdim=True)
    signed: Tensor = found * torch.where(agrees < 0, -1.0, 1.0)
    return rectified(signed.view(len(activations), *activations.shape[2:]), relu), {}
