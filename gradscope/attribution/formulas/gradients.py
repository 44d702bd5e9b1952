"""Methods that differentiate the score by the input. Signed values [N, C, H, W]."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gradscope.attribution.formulas.adaptive import mean_gradient
from gradscope.attribution.formulas.references import references
from gradscope.attribution.subject import Subject
from gradscope.errors import UsageError

Result = tuple[Tensor, dict[str, Any]]


def gradient(subject: Subject) -> Tensor:
    """The gradient of each image's score by that image [N, C, H, W]."""
    return torch.cat([found for _, _, found in subject.gradients(subject.own)])


def saliency(subject: Subject) -> Result:
    """dS/dx, signed; the paper's map is its greatest magnitude over the channels."""
    return gradient(subject), {}


def input_x_gradient(subject: Subject) -> Result:
    """x dS/dx."""
    return subject.inputs * gradient(subject), {}


def smoothgrad(subject: Subject, *, samples: int, noise: float) -> Result:
    """The mean of dS/dx over x + e, e Gaussian of ``noise`` times each image's range.

    Noise is drawn on the CPU, one generator per sample, the same for every image: neither chunk nor
    device changes it, nor which images share a batch.
    """
    return _noisy(subject, samples, noise)[0], {}


def vargrad(subject: Subject, *, samples: int, noise: float) -> Result:
    """The variance of the gradient (population) over SmoothGrad's noise, by Welford's sums."""
    return _noisy(subject, samples, noise)[1], {}


def _noisy(subject: Subject, samples: int, noise: float) -> tuple[Tensor, Tensor]:
    _check_samples(samples, noise)
    inputs = subject.inputs
    width = _ranges(inputs, noise)

    def points(which: Tensor, images: Tensor) -> Tensor:
        drawn = {s: _drawn(subject, s).to(inputs) for s in set(which.tolist())}
        return inputs[images] + width[images] * torch.stack([drawn[s] for s in which.tolist()])

    mean, scatter = torch.zeros_like(inputs), torch.zeros_like(inputs)
    for which, images, found in subject.gradients(points, samples):
        for sample, image, values in zip(which.tolist(), images.tolist(), found, strict=True):
            before = values - mean[image]
            mean[image] += before / (sample + 1)
            scatter[image] += before * (values - mean[image])
    return mean, scatter / samples


def _check_samples(samples: int, noise: float) -> None:
    if samples < 1 or noise < 0:
        raise UsageError("samples has to be at least 1, and noise at least 0")


def _ranges(inputs: Tensor, share: float) -> Tensor:
    """A share of each image's range [N, 1, 1, 1]."""
    flat = inputs.flatten(1)
    return share * (flat.amax(1) - flat.amin(1)).view(-1, 1, 1, 1)


def _drawn(subject: Subject, sample: int) -> Tensor:
    generator = torch.Generator().manual_seed(subject.seed * 1_000_003 + sample)
    return torch.randn(subject.inputs.shape[1:], generator=generator)


def integrated_gradients(
    subject: Subject,
    *,
    steps: int,
    reference: str | Tensor,
    rule: str,
    tolerance: float,
    draws: int,
) -> Result:
    """(x - x') times the mean of dS/dx over the straight path from the reference x' to x.

    The difference between the values' sum and S(x) - S(x') is reported for each image, absolute
    and relative. With ``tolerance`` points are added where the path bends, until no relative one
    exceeds it; ``steps`` and ``rule`` are then not used. For several references (random ones)
    values and deltas are means, and the spread is reported.
    """
    bases = references(subject, reference, draws)
    if tolerance > 0:
        found = [_refined(subject, base, tolerance) for base in bases]
        means, steps = [mean for mean, _ in found], max(points for _, points in found)
    else:
        means = [_along(subject, base, steps, rule) for base in bases]
    values, deltas, changes = _integrated(subject, bases, means)
    return values, {"steps": steps} | added_up(deltas, changes)


def added_up(deltas: Tensor, changes: Tensor) -> dict[str, Any]:
    """How far values miss the change of the score, from each reference's [references, N]."""
    delta, change = deltas.mean(0), changes.mean(0)
    facts: dict[str, Any] = {
        "completeness_delta": delta.tolist(),
        # Undefined where the score does not change at all.
        "relative_delta": [
            abs(d / c) if c else None for d, c in zip(delta.tolist(), change.tolist(), strict=True)
        ],
    }
    if len(deltas) > 1:
        facts["reference_spread"] = deltas.std(0, correction=0).tolist()
    return facts


def gradient_shap(
    subject: Subject, *, samples: int, reference: str | Tensor, noise: float
) -> Result:
    """The mean of (x + e - x') dS/dx at random points between a random reference x' and x + e.

    Positions on the path are drawn one in each of ``samples`` equal parts of it, which leaves their
    distribution uniform and most of their variance out. ``reference`` is one, several tensors to
    draw from, or "random", which is another one for every sample.
    """
    _check_samples(samples, noise)
    bases = references(subject, reference, samples)
    positions, picks = _placed(subject.seed, samples, len(bases))
    width = _ranges(subject.inputs, noise)

    def ends(which: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
        drawn = {s: _drawn(subject, s) for s in set(which.tolist())} if noise else {}
        pairs = list(zip(which.tolist(), images.tolist(), strict=True))
        end = subject.inputs[images]
        if noise:
            end = end + width[images] * torch.stack([drawn[s] for s, _ in pairs]).to(end)
        return torch.stack([bases[picks[s]][i] for s, i in pairs]), end

    def points(which: Tensor, images: Tensor) -> Tensor:
        start, end = ends(which, images)
        return start + positions[which.cpu()].view(-1, 1, 1, 1).to(end) * (end - start)

    total = torch.zeros_like(subject.inputs)
    for which, images, found in subject.gradients(points, samples):
        start, end = ends(which, images)
        total.index_add_(0, images, (end - start) * found / samples)
    before = torch.stack([_all_scores(subject, base) for base in bases])[picks].mean(0)
    change = (subject.own_scores.double() - before)[None]
    return total, added_up(total.flatten(1).double().sum(1) - change, change)


def _placed(seed: int, samples: int, references: int) -> tuple[Tensor, list[int]]:
    """Each sample's position on its path, and the reference it starts from."""
    generator = torch.Generator().manual_seed(seed)
    parts = torch.randperm(samples, generator=generator)
    positions = (parts + torch.rand(samples, generator=generator)) / samples
    if references == samples:
        return positions, list(range(samples))
    picks = torch.randint(references, (samples,), generator=generator)
    return positions, picks.tolist()


def _integrated(
    subject: Subject, bases: Sequence[Tensor], means: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean values [N, C, H, W], and each reference's delta and S(x) - S(x') [references, N]."""
    total = torch.zeros_like(subject.inputs)
    deltas, changes = [], []
    own = subject.own_scores.double()
    for base, mean in zip(bases, means, strict=True):
        part = (subject.inputs - base) * mean
        changes.append(own - _all_scores(subject, base))
        deltas.append(part.flatten(1).double().sum(1) - changes[-1])
        total += part
    return total / len(bases), torch.stack(deltas), torch.stack(changes)


def _refined(subject: Subject, base: Tensor, tolerance: float) -> tuple[Tensor, int]:
    """The mean gradient of every image, each with its own points, and their greatest number."""
    found = [
        mean_gradient(subject.only(image), base[image : image + 1], tolerance)
        for image in range(len(base))
    ]
    return torch.cat([mean for mean, _ in found]), max(points for _, points in found)


def _all_scores(subject: Subject, inputs: Tensor) -> Tensor:
    found = subject.scores(lambda _items, images: inputs[images])
    return torch.cat([scores for _, _, scores in found]).double()


def _along(subject: Subject, base: Tensor, steps: int, rule: str) -> Tensor:
    """The weighted mean gradient over the path."""
    nodes, weights = (
        torch.tensor(column, dtype=subject.inputs.dtype, device=subject.inputs.device)
        for column in zip(*_nodes(steps, rule), strict=True)
    )
    change = subject.inputs - base

    def points(which: Tensor, images: Tensor) -> Tensor:
        return base[images] + nodes[which].view(-1, 1, 1, 1) * change[images]

    total = torch.zeros_like(subject.inputs)
    for which, images, found in subject.gradients(points, steps):
        total.index_add_(0, images, weights[which].view(-1, 1, 1, 1) * found)
    return total


def _nodes(steps: int, rule: str) -> Iterator[tuple[float, float]]:
    """Nodes and weights on [0, 1]; weights sum to one."""
    if steps < 1:
        raise UsageError("steps has to be at least 1")
    if rule == "midpoint":
        yield from (((i + 0.5) / steps, 1 / steps) for i in range(steps))
        return
    nodes, weights = np.polynomial.legendre.leggauss(steps)
    yield from zip(((nodes + 1) / 2).tolist(), (weights / 2).tolist(), strict=True)
