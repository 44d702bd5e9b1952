"""The target's probability while pixels are shown or removed in a map's order.

Insertion and deletion (Petsiuk et al. 2018, arXiv:1806.07421) and ROAD (Rong et al. 2022,
arXiv:2202.00449). An area under a curve means nothing by itself, so each map has a control: itself
at random positions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from gradscope.attribution.diagnostics import Control
from gradscope.attribution.evaluation.imputation import imputed
from gradscope.attribution.evaluation.similarity import Doubles, flattened
from gradscope.attribution.evaluation.summary import student
from gradscope.attribution.formulas.blur import gaussian_blur
from gradscope.attribution.subject import Points, Subject

_STEPS = 5
#: Random orders of equal pixels.
_TIES = 3
#: Random positions of the control: few for a map that is better than all of them, more for a doubt.
_FEWEST, _MOST = 3, 8
#: Shares of the pixels that ROAD removes.
_REMOVED = (0.2, 0.4, 0.6, 0.8)

Curves = np.ndarray[tuple[int, int, int], np.dtype[np.float64]]
Areas = np.ndarray[tuple[int, ...], np.dtype[np.float64]]


def ordered(values: Tensor, generator: torch.Generator) -> Tensor:
    """Indices of the flattened map [H, W], greatest value first; equal values in random order."""
    mixed = torch.randperm(values.numel(), generator=generator)
    by_value = torch.argsort(values.flatten()[mixed], descending=True, stable=True)
    return mixed[by_value]


def areas(curves: Curves) -> Areas:
    """Areas [orders, 2] below curves over 0..1, the fraction of pixels, by the trapezoid rule.

    They do not depend on the number of steps.
    """
    return np.asarray(np.trapezoid(curves, dx=1 / (curves.shape[-1] - 1)))


@dataclass(frozen=True, eq=False)
class Canvas:
    """A picture [C, H, W], and what lies below it before insertion and after deletion."""

    subject: Subject
    image: Tensor
    blurred: Tensor
    nothing: Tensor

    @cached_property
    def ends(self) -> tuple[float, float, float]:
        """The target's probability for the picture, for it blurred, and for the mean colour."""
        layers = torch.stack([self.image, self.blurred, self.nothing])
        found = _probabilities(self.subject, lambda which, _images: layers[which], len(layers))
        whole, blurred, nothing = found.tolist()
        return whole, blurred, nothing

    def curves(self, orders: Sequence[Tensor], steps: int = _STEPS) -> Curves:
        """Insertion and deletion [orders, 2, steps + 1], from no pixel to all.

        Pixels come in the orders; they replace the blurred image, or are replaced by the mean
        colour.
        """
        ranks = torch.stack([_ranks(order) for order in orders])
        ranks = ranks.view(-1, *self.image.shape[1:]).to(self.image.device)
        counts = torch.linspace(0, len(orders[0]), steps + 1).round().long().to(ranks)
        between = steps - 1

        def points(which: Tensor, _images: Tensor) -> Tensor:
            inserting = (which // between % 2 == 0)[:, None, None, None]
            reached = counts[which % between + 1, None, None]
            moved = (ranks[which // (2 * between)] < reached)[:, None]
            return torch.where(moved ^ inserting, self._below(inserting), self.image)

        found = _probabilities(self.subject, points, 2 * between * len(orders))
        curves = np.empty((len(orders), 2, steps + 1))
        curves[:, :, 1:-1] = found.reshape(len(orders), 2, between)
        whole, blurred, nothing = self.ends
        curves[:, :, 0], curves[:, :, -1] = (blurred, whole), (whole, nothing)
        return curves

    def _below(self, inserting: Tensor) -> Tensor:
        return torch.where(inserting, self.blurred, self.nothing)

    def road(self, order: Tensor, seed: int) -> float:
        """How much sooner the probability falls without the strongest pixels than the weakest.

        The mean over shares of pixels of p(weakest removed) - p(strongest removed); what is removed
        is imputed from around it. In expectation 0 for a random order, at most 1.
        """
        ranks = _ranks(order).view(self.image.shape[1:])
        counts = [round(share * len(order)) for share in _REMOVED]
        gone = torch.stack(
            [*(ranks < c for c in counts), *(ranks >= len(order) - c for c in counts)]
        )
        filled = imputed(self.image, gone.to(self.image.device), seed)
        found = _probabilities(self.subject, lambda which, _images: filled[which], len(filled))
        strongest, weakest = found.reshape(2, -1)
        return float((weakest - strongest).mean())


def canvas(subject: Subject) -> Canvas:
    """The canvas of the subject's first image."""
    image = subject.inputs[0]
    side = min(image.shape[1:]) / 224
    blurred = gaussian_blur(image, sigma=max(1.0, 5 * side))
    return Canvas(subject, image, blurred, torch.zeros_like(image))


def _ranks(order: Tensor) -> Tensor:
    ranks = torch.empty_like(order)
    ranks[order] = torch.arange(len(order))
    return ranks


def _probabilities(subject: Subject, points: Points, count: int) -> Doubles:
    found = subject.scores(points, count, subject.probability)
    return flattened(torch.cat([scores for _, _, scores in found]))


def orders_of(values: Tensor, seed: int) -> list[Tensor]:
    """The orders of a map [H, W]: several where many pixels are equal."""
    generator = torch.Generator().manual_seed(seed)
    flat = values.detach().float().cpu()
    # Fewer move a curve by less than one step.
    orders = _TIES if 2 * flat.unique().numel() < flat.numel() else 1
    return [ordered(flat, generator) for _ in range(orders)]


def moved(values: Tensor, seed: int, most: int = _MOST) -> Iterator[Tensor]:
    """The map [H, W] at up to ``most`` others: shifted around the border, and mirrored.

    This keeps the map's texture, which a random order of pixels would not: scattered holes destroy
    a picture faster than any region.
    """
    generator = torch.Generator().manual_seed(seed + 1)
    flat = values.detach().float().cpu()
    for _ in range(most):
        down, across, mirrored = (
            int(torch.randint(0, n, (), generator=generator)) for n in (*flat.shape, 2)
        )
        shifted = flat.roll((down, across), (0, 1))
        if down or across or mirrored:
            yield shifted.flip(1) if mirrored else shifted


@dataclass(frozen=True, slots=True)
class Faithfulness:
    """Insertion and deletion areas of a map, their spread over ties, and those of its control."""

    insertion: float
    deletion: float
    insertion_spread: float
    deletion_spread: float
    insertion_curve: tuple[float, ...]
    deletion_curve: tuple[float, ...]
    control: Control


def faithfulness(drawn: Canvas, values: Tensor, seed: int) -> Faithfulness:
    """A map [H, W] against itself at random positions: three, more where it is not the best."""
    generator = torch.Generator().manual_seed(seed + 3)
    orders = orders_of(values, seed)
    places = (ordered(place, generator) for place in moved(values, seed))
    first = list(islice(places, _FEWEST))
    found = drawn.curves([*orders, *first])
    own, control = found[: len(orders)], found[len(orders) :]
    for place in places:
        if _settled(areas(own).mean(0), areas(control)):
            break
        control = np.concatenate([control, drawn.curves([place])])
    (insertion, deletion), (i_spread, d_spread) = areas(own).mean(0), areas(own).std(0)
    return Faithfulness(
        insertion=float(insertion),
        deletion=float(deletion),
        insertion_spread=float(i_spread),
        deletion_spread=float(d_spread),
        insertion_curve=_mean_curve(own, 0),
        deletion_curve=_mean_curve(own, 1),
        control=_control(control),
    )


def _mean_curve(found: Curves, which: int) -> tuple[float, ...]:
    """Rounded to what a picture shows of it."""
    return tuple(round(p, 6) for p in found[:, which].mean(0).tolist())


def _settled(own: Areas, control: Areas) -> bool:
    """Whether more positions would hardly change what is said of a map.

    It is better than all of them, or worse with 95 % confidence, or nothing moves the probability
    by a thousandth.
    """
    (one,), others = advantage(own[None]), advantage(control)
    reach = student(len(others) - 1) * others.std(ddof=1) * (1 + 1 / len(others)) ** 0.5
    still = np.ptp(np.append(others, one)) < 1e-3
    return bool(still or one > others.max() or others.mean() - one > max(reach, 1e-3))


def advantage(found: Areas) -> Areas:
    """Insertion less deletion [orders], of areas [orders, 2]: great for a map that is right."""
    return np.asarray(found[:, 0] - found[:, 1])


def _control(found: Curves) -> Control:
    below = areas(found)
    (insertion, deletion), (i_spread, d_spread) = below.mean(0), below.std(0, ddof=1)
    return Control(
        insertion_auc=insertion,
        deletion_auc=deletion,
        insertion_spread=i_spread,
        deletion_spread=d_spread,
        difference_spread=float(advantage(below).std(ddof=1)),
        rankings=len(found),
        insertion_curve=_mean_curve(found, 0),
        deletion_curve=_mean_curve(found, 1),
    )
