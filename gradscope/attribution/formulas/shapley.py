"""Shapley values of superpixels: what each adds to the score, over all ways to show some of them.

Maps are [N, H, W] in input geometry; every pixel has the value of its superpixel.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from gradscope.attribution.formulas.gradients import Result
from gradscope.attribution.formulas.references import references
from gradscope.attribution.formulas.superpixels import superpixels
from gradscope.attribution.subject import Subject
from gradscope.errors import UsageError


def kernel_shap(
    subject: Subject, *, segments: int | Tensor, samples: int, reference: str | Tensor
) -> Result:
    """The additive game nearest to the score's, each coalition weighted by the Shapley kernel.

    Superpixels outside a coalition show the reference. Where there are no more than ``samples``
    coalitions all are asked, and the values are exact; otherwise coalitions are drawn by the
    kernel, each with its complement. Their sum is the change of the score in either case.
    """
    base = references(subject, reference)[0]
    labels = [_labels(image, segments) for image in subject.inputs]
    found = [
        _values(subject.only(number), base[number : number + 1], own, samples)
        for number, own in enumerate(labels)
    ]
    facts = {"segments": [int(own.max()) + 1 for own in labels], "exact": [e for _, e in found]}
    values = [phi[own] for (phi, _), own in zip(found, labels, strict=True)]
    return torch.stack(values).to(subject.inputs), facts


def _labels(image: Tensor, segments: int | Tensor) -> Tensor:
    """Which superpixel each pixel [H, W] belongs to, from 0 without gaps."""
    if isinstance(segments, int):
        if segments < 2:
            raise UsageError("segments has to be at least 2")
        return superpixels(image, min(segments, image[0].numel()))
    segments = torch.as_tensor(segments)
    if segments.shape != image.shape[1:]:
        raise UsageError(
            f"segments have shape {list(segments.shape)}, the image {list(image.shape[1:])}"
        )
    return torch.as_tensor(segments.to(image.device).unique(return_inverse=True)[1])


def _values(one: Subject, base: Tensor, labels: Tensor, samples: int) -> tuple[Tensor, bool]:
    """The value of each superpixel of one image, and whether it is exact."""
    count = int(labels.max()) + 1
    if samples < 2 * count:
        raise UsageError(f"samples has to be at least {2 * count}, twice the superpixels")
    exact = count <= math.log2(samples + 2)
    shown, weights = _all(count) if exact else _drawn(count, samples, one.seed)
    shown = shown.to(labels.device)

    def points(which: Tensor, images: Tensor) -> Tensor:
        return torch.where(shown[which][:, labels][:, None], one.inputs[images], base[images])

    scores = torch.cat([found for _, _, found in one.scores(points, len(shown))]).double()
    (empty,) = (found.double() for _, _, found in one.scores(lambda _, images: base[images]))
    change = one.own_scores.double() - empty
    return _additive(shown.double(), weights.to(scores), scores - empty, change), exact


def _additive(shown: Tensor, weights: Tensor, gains: Tensor, change: Tensor) -> Tensor:
    """Weighted least squares of gains [S] on coalitions [S, M], the sum held to the change."""
    squares = shown.T @ (weights[:, None] * shown)
    inverse = torch.linalg.pinv(squares, hermitian=True)
    free, ones = inverse @ (shown.T @ (weights * gains)), inverse.sum(1)
    return torch.as_tensor(free - ones * (free.sum() - change) / ones.sum())


def _all(count: int) -> tuple[Tensor, Tensor]:
    """Every coalition but none and all, with the Shapley kernel (M - 1) / (C(M, k) k (M - k))."""
    number = torch.arange(1, 2**count - 1)
    shown = (number[:, None] >> torch.arange(count)) % 2 == 1
    kernel = [(count - 1) / (math.comb(count, k) * k * (count - k)) for k in range(1, count)]
    return shown, torch.tensor(kernel, dtype=torch.double)[shown.sum(1) - 1]


def _drawn(count: int, samples: int, seed: int) -> tuple[Tensor, Tensor]:
    """Coalitions drawn by the kernel, so that each weighs the same; each with its complement."""
    shown = torch.stack(list(_pairs(count, samples // 2, seed))).flatten(0, 1)
    return shown, torch.ones(len(shown), dtype=torch.double)


def _pairs(count: int, pairs: int, seed: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.arange(1, count, dtype=torch.double)
    drawn = torch.multinomial(1 / (sizes * (count - sizes)), pairs, True, generator=generator)
    for size in (drawn + 1).tolist():
        ranks = torch.randperm(count, generator=generator)
        yield torch.stack([ranks < size, ranks >= size])
