"""Class activation maps: weighted sums of a layer's channels, from one forward and one backward.

Each takes activations A and gradients g of the score, both [N, C, H, W], and gives a map [N, H, W]
in the layer's geometry. Maps are signed: what speaks against the target is negative, and is cut off
for display only where the paper does (``ReLU``).
"""

from __future__ import annotations

import torch
from torch import Tensor

from gradscope.explain.registry import method


def _weighted(weights: Tensor, activations: Tensor) -> Tensor:
    return (weights[..., None, None] * activations).sum(1)


@method("gradcam", "activation", "Selvaraju et al. 2017, arXiv:1610.02391")
def gradcam(activations: Tensor, gradients: Tensor) -> Tensor:
    """Channels weighted by their mean gradient, rectified."""
    return _weighted(gradients.mean((2, 3)), activations).relu()


@method("gradcam++", "activation", "Chattopadhyay et al. 2018, arXiv:1710.11063, eq. 19")
def gradcam_plus_plus(activations: Tensor, gradients: Tensor) -> Tensor:
    """Channels weighted by positive gradients, each by alpha = g^2 / (2 g^2 + sum(A) g^3).

    Without an epsilon: one of 1e-6 changes the map by a tenth where gradients are 1e-4.
    """
    square = gradients**2
    total = activations.sum((2, 3), keepdim=True)
    below = 2 * square + total * square * gradients
    alpha = torch.where(below != 0, square / torch.where(below != 0, below, 1.0), 0.0)
    return _weighted((alpha * gradients.relu()).sum((2, 3)), activations).relu()


@method("xgradcam", "activation", "Fu et al. 2020, arXiv:2008.02312")
def xgradcam(activations: Tensor, gradients: Tensor) -> Tensor:
    """Channels weighted by their gradients, themselves weighted by the activations' shares."""
    total = activations.sum((2, 3))
    inner = (gradients * activations).sum((2, 3))
    weights = torch.where(total != 0, inner / torch.where(total != 0, total, 1.0), 0.0)
    return _weighted(weights, activations).relu()


@method("hirescam", "activation", "Draelos & Carin 2020, arXiv:2011.08891")
def hirescam(activations: Tensor, gradients: Tensor) -> Tensor:
    """Activations times gradients, position by position, summed over channels and rectified."""
    return (activations * gradients).sum(1).relu()


@method("layercam", "activation", "Jiang et al. 2021, IEEE TIP 30:5875")
def layercam(activations: Tensor, gradients: Tensor) -> Tensor:
    """As HiResCAM with positive gradients only."""
    return (activations * gradients.relu()).sum(1).relu()


@method("eigencam", "activation", "Muhammad & Yeasin 2020, arXiv:2008.00299")
def eigencam(activations: Tensor, _gradients: Tensor) -> Tensor:
    """Projection on the first principal direction of the positions; knows no target.

    Its sign, which no decomposition fixes, is the one that correlates with the activations' sum.
    """
    count, _, height, width = activations.shape
    points = activations.flatten(2).transpose(1, 2)
    centred = points - points.mean(1, keepdim=True)
    _, _, directions = torch.linalg.svd(centred, full_matrices=False)
    found = (centred @ directions[:, 0, :, None]).squeeze(-1)
    agrees = (found * centred.sum(2)).sum(1, keepdim=True)
    signed: Tensor = found * torch.where(agrees < 0, -1.0, 1.0)
    return signed.view(count, height, width)
