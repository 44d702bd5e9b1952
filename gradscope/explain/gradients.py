"""Methods that differentiate the output by the input. All give signed values [N, C, H, W]."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gradscope.errors import UsageError
from gradscope.explain.registry import method

#: Inputs [M, C, H, W] and the indices of their images -> scores [M], differentiable.
Score = Callable[[Tensor, Tensor], Tensor]
Result = tuple[Tensor, dict[str, Any]]


def gradient(score: Score, inputs: Tensor, images: Tensor) -> Tensor:
    """The gradient of each image's score by that image."""
    leaf = inputs.detach().clone().requires_grad_()
    with torch.enable_grad():
        total = score(leaf, images).sum()
    (found,) = torch.autograd.grad(total, leaf)
    return found.detach()


def _all(inputs: Tensor) -> Tensor:
    return torch.arange(len(inputs), device=inputs.device)


@method("saliency", "input", "Simonyan et al. 2014, arXiv:1312.6034")
def saliency(score: Score, inputs: Tensor) -> Result:
    """The gradient itself, with its sign; the paper's map is its greatest magnitude by channel."""
    return gradient(score, inputs, _all(inputs)), {}


@method("input-x-gradient", "input", "Shrikumar et al. 2016, arXiv:1605.01713")
def input_x_gradient(score: Score, inputs: Tensor) -> Result:
    """The gradient times the input."""
    return inputs * gradient(score, inputs, _all(inputs)), {}


@method("smoothgrad", "input", "Smilkov et al. 2017, arXiv:1706.03825")
def smoothgrad(
    score: Score,
    inputs: Tensor,
    *,
    samples: int = 25,
    noise: float = 0.15,
    seed: int = 0,
    chunk: int = 16,
) -> Result:
    """Mean gradient over Gaussian noise of ``noise`` times each image's range.

    Noise is drawn on the CPU, one generator a sample, so neither chunk nor device changes it.
    """
    mean, _ = _noisy(score, inputs, samples, noise, seed, chunk)
    return mean, {}


@method("vargrad", "input", "Adebayo et al. 2018, arXiv:1810.03292")
def vargrad(
    score: Score,
    inputs: Tensor,
    *,
    samples: int = 25,
    noise: float = 0.15,
    seed: int = 0,
    chunk: int = 16,
) -> Result:
    """Variance of the gradient (population) over SmoothGrad's noise, by Welford's sums."""
    _, variance = _noisy(score, inputs, samples, noise, seed, chunk)
    return variance, {}


def _noisy(
    score: Score, inputs: Tensor, samples: int, noise: float, seed: int, chunk: int
) -> tuple[Tensor, Tensor]:
    if samples < 1 or noise < 0:
        raise UsageError("samples count from 1 and noise from 0")
    flat = inputs.flatten(1)
    width = noise * (flat.amax(1) - flat.amin(1)).view(-1, *[1] * (inputs.dim() - 1))
    mean, scatter = torch.zeros_like(inputs), torch.zeros_like(inputs)
    for sample in range(samples):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + sample)
        drawn = torch.randn(inputs.shape, generator=generator).to(inputs)
        found = _chunked(score, inputs + width * drawn, _all(inputs), chunk)
        before = found - mean
        mean = mean + before / (sample + 1)
        scatter = scatter + before * (found - mean)
    return mean, scatter / samples


def _chunked(score: Score, inputs: Tensor, images: Tensor, chunk: int) -> Tensor:
    parts = zip(torch.split(inputs, chunk), torch.split(images, chunk), strict=True)
    return torch.cat([gradient(score, x, i) for x, i in parts])


@method("integrated-gradients", "input", "Sundararajan et al. 2017, arXiv:1703.01365")
def integrated_gradients(
    score: Score,
    inputs: Tensor,
    *,
    steps: int = 32,
    reference: Tensor | None = None,
    rule: str = "midpoint",
    tolerance: float | None = None,
    chunk: int = 16,
) -> Result:
    """Path integral of the gradient from a reference input (zeros: the mean image) to the input.

    ``rule`` is midpoint or gauss-legendre. The difference between the sum and S(x) - S(x') is
    reported for each image, absolute and relative; with ``tolerance`` steps are doubled, up to
    4,096, until every relative one is below it.
    """
    base = torch.zeros_like(inputs) if reference is None else reference.to(inputs).expand_as(inputs)
    with torch.no_grad():
        change = score(inputs, _all(inputs)) - score(base, _all(inputs))
    while True:
        values = (inputs - base) * _along(score, inputs, base, steps, rule, chunk)
        delta = values.flatten(1).sum(1) - change
        relative = (delta / change).abs()
        if tolerance is None or steps >= 4096 or bool((relative <= tolerance).all()):
            break
        steps *= 2
    return values, {
        "steps": steps,
        "completeness_delta": delta.tolist(),
        # Where the output does not change at all, no share of it is missing.
        "relative_delta": [
            r if c else None for r, c in zip(relative.tolist(), change.tolist(), strict=True)
        ],
    }


def _along(score: Score, inputs: Tensor, base: Tensor, steps: int, rule: str, chunk: int) -> Tensor:
    """The weighted mean gradient over the path, float32 or wider."""
    total = torch.zeros_like(inputs)
    images = _all(inputs)
    for alpha, weight in _nodes(steps, rule):
        point = base + alpha * (inputs - base)
        total = total + weight * _chunked(score, point, images, chunk)
    return total


def _nodes(steps: int, rule: str) -> Iterator[tuple[float, float]]:
    """Nodes and weights on [0, 1]; weights sum to one."""
    if steps < 1:
        raise UsageError("steps count from 1")
    if rule == "midpoint":
        yield from (((i + 0.5) / steps, 1 / steps) for i in range(steps))
    elif rule == "gauss-legendre":
        nodes, weights = np.polynomial.legendre.leggauss(steps)
        yield from zip(((nodes + 1) / 2).tolist(), (weights / 2).tolist(), strict=True)
    else:
        raise UsageError(f"no rule is called {rule!r}; there are midpoint and gauss-legendre")
