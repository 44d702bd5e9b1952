"""Class activation maps: weighted sums of a layer's channels, from one forward and one backward.

The formulas take activations A and gradients g of the score, both [N, C, h, w], and give a map
[N, h, w] in the layer's geometry. Maps are signed: evidence against the target is negative, and is
cut off for display, or with ``relu=True`` as in the papers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from gradscope.attribution.formulas.gradients import Result
from gradscope.attribution.subject import Subject
from gradscope.errors import UsageError
from gradscope.models.probe import run

#: Activations and gradients -> what each channel adds to the map [N, C, h, w].
Formula = Callable[[Tensor, Tensor], Tensor]
#: Factors of the augmented smoothing, each on the image and its mirror image.
_BRIGHTNESS = (0.9, 1.0, 1.1)


def weighted(weights: Tensor, activations: Tensor) -> Tensor:
    """Sum over the channels of ``weights`` [N, C] times activations [N, C, h, w]."""
    return (weights[..., None, None] * activations).sum(1)


def rectified(values: Tensor, relu: bool) -> Tensor:
    """The map with the papers' final ReLU, or as it is."""
    return values.relu() if relu else values


def _method(parts: Callable[..., Tensor]) -> Callable[..., Result]:
    """A method of what its channels add, ``parts`` of a subject and the method's own options."""

    def compute(
        subject: Subject, *, relu: bool, eigen_smooth: bool, aug_smooth: bool, **options: Any
    ) -> Result:
        def one(subject: Subject) -> Tensor:
            found = parts(subject, **options)
            return first_component(found, found) if eigen_smooth else found.sum(1)

        return rectified(_augmented(subject, one) if aug_smooth else one(subject), relu), {}

    compute.__doc__ = parts.__doc__
    return compute


def _augmented(subject: Subject, one: Callable[[Subject], Tensor]) -> Tensor:
    """The mean map of the image and its mirror image, darker, as they are and brighter."""
    found = []
    for flipped in (False, True):
        inputs = subject.inputs.flip(3) if flipped else subject.inputs
        for factor in _BRIGHTNESS:
            seen = replace(subject, inputs=inputs * factor, layer=subject.layer_name, shared={})
            found.append(one(seen).flip(2) if flipped else one(seen))
    return torch.stack(found).mean(0)


def _of_gradients(formula: Formula) -> Callable[..., Result]:
    def parts(subject: Subject) -> Tensor:
        return formula(subject.activations, subject.activation_gradients)

    parts.__doc__ = formula.__doc__
    return _method(parts)


def gradcam_parts(activations: Tensor, gradients: Tensor) -> Tensor:
    """sum_k a_k A_k, a_k the mean of g_k over positions."""
    return gradients.mean((2, 3), keepdim=True) * activations


def gradcam_plus_plus_parts(activations: Tensor, gradients: Tensor) -> Tensor:
    """sum_k w_k A_k, w_k = sum alpha relu(g_k), alpha = g^2 / (2 g^2 + sum(A_k) g^3).

    Without an epsilon: one of 1e-6 changes the map by a tenth where gradients are 1e-4.
    """
    # alpha = 1 / (2 + sum(A) g) where g is not zero: its square may underflow.
    below = 2 + activations.sum((2, 3), keepdim=True) * gradients
    defined = (gradients != 0) & (below != 0)
    alpha = torch.where(defined, 1 / torch.where(defined, below, 1.0), 0.0)
    return (alpha * gradients.relu()).sum((2, 3), keepdim=True) * activations


def xgradcam_parts(activations: Tensor, gradients: Tensor) -> Tensor:
    """sum_k w_k A_k, w_k = sum(g_k A_k) / sum(A_k)."""
    total = activations.sum((2, 3), keepdim=True)
    inner = (gradients * activations).sum((2, 3), keepdim=True)
    return torch.where(total != 0, inner / torch.where(total != 0, total, 1.0), 0.0) * activations


def hirescam_parts(activations: Tensor, gradients: Tensor) -> Tensor:
    """sum_k g_k A_k at each position."""
    return activations * gradients


def layercam_parts(activations: Tensor, gradients: Tensor) -> Tensor:
    """sum_k relu(g_k) A_k at each position."""
    return activations * gradients.relu()


gradcam = _of_gradients(gradcam_parts)
gradcam_plus_plus = _of_gradients(gradcam_plus_plus_parts)
xgradcam = _of_gradients(xgradcam_parts)
hirescam = _of_gradients(hirescam_parts)
layercam = _of_gradients(layercam_parts)


@_method
def finercam(subject: Subject, *, alpha: float, classes: int) -> Tensor:
    """Grad-CAM of sum_d p_d (S_c - alpha S_d) / sum_d p_d, d the classes nearest to c by score.

    p are the softmax probabilities, differentiated too. With ``versus`` that class is the only d.
    """
    logits = subject.tapped.logits
    own = logits.gather(1, subject.targets[:, None])
    others = _nearest(subject, logits.detach(), classes)
    shares = logits.softmax(1).gather(1, others)
    less = (shares * (own - alpha * logits.gather(1, others))).sum(1) / (shares.sum(1) + 1e-9)
    pieces = subject.tapped.gradients(less.sum(), subject.layer_name)
    return gradcam_parts(subject.activations, subject.as_maps(pieces))


def _nearest(subject: Subject, logits: Tensor, count: int) -> Tensor:
    """The classes [N, M] whose logits are nearest to the target's."""
    if subject.versus is not None:
        return subject.versus[:, None]
    if count < 1:
        raise UsageError("classes has to be at least 1")
    own = subject.targets[:, None]
    apart = (logits - logits.gather(1, own)).abs().scatter(1, own, torch.inf)
    return apart.topk(min(count, logits.shape[1] - 1), dim=1, largest=False).indices


@_method
def shapleycam(subject: Subject, *, utility: str) -> Tensor:
    """sum_k w_k A_k, w_k the mean over positions of g - H A / 2, H the score's second derivative.

    The ``rest`` utility is the logit plus the logarithm of the class's probability.
    """
    # Fused attention has no second derivative.
    with sdpa_kernel(SDPBackend.MATH):
        seen = run(subject.model, subject.inputs, [subject.layer_name])
    pieces = seen.pieces[subject.layer_name]
    logits = seen.logits + seen.logits.log_softmax(1) if utility == "rest" else seen.logits
    total = subject.objective(logits, subject.images).sum()
    first = torch.autograd.grad(
        total, pieces, create_graph=True, allow_unused=True, materialize_grads=True
    )
    curved = [(g, a) for g, a in zip(first, pieces, strict=True) if g.requires_grad]
    second = torch.autograd.grad(
        [g for g, _ in curved], pieces, [a.detach() for _, a in curved], allow_unused=True,
        materialize_grads=True,
    ) if curved else [torch.zeros_like(a) for a in pieces]  # fmt: skip
    parts = tuple(g.detach() - h / 2 for g, h in zip(first, second, strict=True))
    return gradcam_parts(subject.activations, subject.as_maps(parts))


def first_component(values: Tensor, like: Tensor) -> Tensor:
    """Projection of [N, C, h, w] on its first principal component over positions [N, h, w].

    Its sign, which no decomposition fixes, is that of the sum of ``like`` over the channels.
    """
    points = _points(values)
    _, _, directions = torch.linalg.svd(points, full_matrices=False)
    return _signed((points @ directions[:, 0, :, None]).squeeze(-1), like)


def _points(values: Tensor) -> Tensor:
    """Channels at each position [N, h w, C], centred."""
    points = values.flatten(2).transpose(1, 2)
    return points - points.mean(1, keepdim=True)


def _signed(found: Tensor, like: Tensor) -> Tensor:
    """Projections [N, h w] as maps, with the sign that agrees with the sum over channels.

    Where a norm has made that sum the same everywhere, the farther end is the positive one.
    """
    total = _points(like).sum(2)
    agrees = torch.nn.functional.cosine_similarity(found, total, dim=1)
    constant = total.norm(dim=1) < 1e-4 * _points(like).flatten(1).norm(dim=1)
    agrees = torch.where(constant, found.amax(1) + found.amin(1), agrees)
    signed = found * torch.where(agrees < 0, -1.0, 1.0)[:, None]
    return signed.view(len(like), *like.shape[2:])


def eigencam(subject: Subject, *, relu: bool) -> Result:
    """Projection on the first principal component over positions; independent of the target."""
    return rectified(first_component(subject.activations, subject.activations), relu), {}


def kpcacam(subject: Subject, *, kernel: str, gamma: float, relu: bool) -> Result:
    """First kernel principal component of the activations; independent of the target."""
    points = _points(subject.activations)
    gamma = gamma or 1 / points.shape[2]
    found = _KERNELS[kernel](points, gamma)
    rows = found.mean(2, keepdim=True)
    centred = found - rows - rows.transpose(1, 2) + rows.mean(1, keepdim=True)
    values, vectors = torch.linalg.eigh(centred)
    component = vectors[..., -1] * values[:, -1:].clamp(min=0).sqrt()
    return rectified(_signed(component, subject.activations), relu), {}


def _inner(points: Tensor) -> Tensor:
    return points @ points.transpose(1, 2)


_KERNELS: Mapping[str, Callable[[Tensor, float], Tensor]] = {
    "sigmoid": lambda points, gamma: (gamma * _inner(points) + 1).tanh(),
    "rbf": lambda points, gamma: (-gamma * torch.cdist(points, points).square()).exp(),
    "poly": lambda points, gamma: (gamma * _inner(points) + 1) ** 3,
}
