"""The picture that maximises a score (Olah et al. 2017, distill.pub/2017/feature-visualization).

Gradient ascent by Adam on a picture's waves, seen by the model under a random view at each step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from gradscope.attribution.formulas.guided import Rectifiers
from gradscope.attribution.subject import Tick
from gradscope.attribution.synthesis.priors import PRIORS, Prior, Size, pixels
from gradscope.attribution.synthesis.views import Stage, seen, view
from gradscope.errors import UsageError

#: First steps, in which gradients may pass rectifiers that are off.
_HELPED = 16
#: Pixels that mattered more than this share of them are opaque, as the authors of MACO draw it.
_OPAQUE = 80

#: A start's number and its pixels [1, C, h, w] in 0..1 -> its score, and what lowers it.
Objective = Callable[[int, Tensor], tuple[Tensor, Tensor | float]]


@dataclass(frozen=True, eq=False, slots=True)
class Synthesis:
    """A picture [C, H, W] in 0..1, and the score of each step's view."""

    image: Tensor
    scores: tuple[float, ...]
    #: How much each pixel mattered on the way [H, W], in 0..1.
    opacity: Tensor


@dataclass(eq=False, slots=True)
class _Start:
    """A picture on its way."""

    parameters: Tensor
    optimiser: torch.optim.Optimizer
    generator: torch.Generator
    importance: Tensor
    scores: list[float] = field(default_factory=list)
    blind: int = 0


def synthesise(
    objective: Objective,
    size: Size,
    stages: Sequence[Stage],
    *,
    prior: Prior = PRIORS["fourier"],
    steps: int = 256,
    seed: int = 0,
    starts: int = 1,
    device: torch.device | str = "cpu",
    progress: Tick = lambda _done, _total: None,
) -> tuple[Synthesis, ...]:
    """Maximise the objective of pictures, each from its own start: seeds ``seed``, ``seed + 1``, …

    The learning rate falls to zero in the second half, which takes the grain out of the pictures.
    Raises UsageError where a score is not finite, and where its gradient stays zero.
    """
    every = [_start(prior, size, seed + k, device) for k in range(starts)]
    for step in range(steps):
        stage = next(s for s in stages if step < s.until * steps or s is stages[-1])
        rate = prior.rate * min(1.0, 2 * (1 - step / steps))
        for number, start in enumerate(every):
            _ascend(start, number, objective, prior, size, stage, rate)
            progress(step * starts + number + 1, steps * starts)
    return tuple(_finished(start, prior, size) for start in every)


def _start(prior: Prior, size: Size, seed: int, device: torch.device | str) -> _Start:
    generator = torch.Generator().manual_seed(seed)
    parameters = prior.start(size, generator).to(device).requires_grad_()
    fused = parameters.device.type in ("cpu", "cuda")
    optimiser = torch.optim.Adam([parameters], lr=prior.rate, fused=fused)
    return _Start(parameters, optimiser, generator, torch.zeros(size[1:], device=device))


def _ascend(
    start: _Start, number: int, objective: Objective, prior: Prior, size: Size, stage: Stage,
    rate: float,
) -> None:  # fmt: skip
    """A step of Adam by the gradient under a view."""
    with torch.enable_grad():
        made = pixels(prior, start.parameters, size, stage.made)
    image = made.detach().requires_grad_()
    chosen = view(stage, start.generator)
    noise = prior.noise * torch.randn((1, size[0], *stage.seen), generator=start.generator)
    with torch.enable_grad():
        shown = seen(image[None], chosen, stage.seen) + noise.to(image)
        score, penalty = objective(number, shown)
        goal = (score - penalty).sum()
    helped = len(start.scores) < _HELPED
    start.scores.append(_finite(float(score.detach().sum())))
    gradient = _gradient(goal, image, helped)
    strength = gradient.abs().mean(0)
    start.blind = 0 if bool(strength.any()) else start.blind + 1
    if start.blind >= _HELPED:
        raise UsageError("the score does not depend on the image: its gradient is zero")
    start.importance += _sized(strength / strength.mean().clamp(min=1e-30), size)
    (found,) = torch.autograd.grad(made, start.parameters, -gradient)
    start.parameters.grad = found
    start.optimiser.param_groups[0]["lr"] = rate
    start.optimiser.step()


def _gradient(goal: Tensor, image: Tensor, helped: bool) -> Tensor:
    if not goal.requires_grad:
        return torch.zeros_like(image)
    (found,) = torch.autograd.grad(goal, image, retain_graph=helped, allow_unused=True)
    if helped and (found is None or not bool((found != 0).any())):
        # Every rectifier on the path is off: bypass them, as lucid does for the first steps.
        with Rectifiers(lambda arriving: arriving, gated=False):
            (found,) = torch.autograd.grad(goal, image, allow_unused=True)
    return torch.zeros_like(image) if found is None else found.detach()


def _finite(value: float) -> float:
    if not math.isfinite(value):
        raise UsageError(f"the score became {value}; check the weights for NaN")
    return value


def _sized(values: Tensor, size: Size) -> Tensor:
    return interpolate(values[None, None], size[1:], mode="bilinear", align_corners=False)[0, 0]


def _finished(start: _Start, prior: Prior, size: Size) -> Synthesis:
    with torch.no_grad():
        image = pixels(prior, start.parameters, size, size[1:])
    importance = start.importance.cpu()
    opaque = float(np.percentile(importance.numpy(), _OPAQUE)) or float(importance.max()) or 1.0
    return Synthesis(image.cpu(), tuple(start.scores), (importance / opaque).clamp(max=1))
