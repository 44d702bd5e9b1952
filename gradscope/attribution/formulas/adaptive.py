"""The mean gradient over a straight path, with points where the path bends.

Each pass gives the score and its gradient, so the error of every part of the path is known: the
trapezoid of the derivatives at its ends, less the difference of the scores there. The parts with
the greatest errors are halved; no pass is made twice, and none is thrown away.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from gradscope.attribution.subject import Subject

#: Parts of the path to begin with.
_PARTS = 8
#: Share of the whole error that the parts which are halved at once have.
_SHARE = 0.75
#: No part is halved below it: a score that jumps has an error at any width.
_LEAST = 2.0**-20
_MOST_POINTS = 4096
#: All gradients are kept until their weights are known.
_MOST_BYTES = 1 << 30


@dataclass(frozen=True, eq=False, slots=True)
class Point:
    """What one pass found at a place of the path."""

    #: [C, H, W]
    gradient: Tensor
    score: float
    #: The score's derivative along the path.
    slope: float


def mean_gradient(subject: Subject, base: Tensor, tolerance: float) -> tuple[Tensor, int]:
    """The mean gradient [1, C, H, W] of one image from its reference, and the number of points.

    Points are added until the trapezoid rule's error over the whole path is within ``tolerance`` of
    the change of the score, or until there are 4,096 or a GB of them.
    """
    found = _points(subject, base, torch.linspace(0, 1, _PARTS + 1).tolist())
    most = min(_MOST_POINTS, _MOST_BYTES // max(1, base.nbytes))
    while len(found) < most:
        errors = _errors(found)
        if abs(sum(errors.values())) <= tolerance * abs(found[1.0].score - found[0.0].score):
            break
        places = _bending(errors)[: most - len(found)]
        if not places:
            break
        found |= _points(subject, base, places)
    mean = torch.zeros_like(base)
    for start, end in pairwise(sorted(found)):
        mean += (end - start) / 2 * (found[start].gradient + found[end].gradient)
    return mean, len(found)


def _points(subject: Subject, base: Tensor, places: list[float]) -> dict[float, Point]:
    change = subject.inputs - base
    at = torch.tensor(places, dtype=base.dtype, device=base.device)
    found: dict[float, Point] = {}
    for which, _, gradients, scores in subject.scored_gradients(
        lambda which, _images: base + at[which].view(-1, 1, 1, 1) * change, len(places)
    ):
        slopes = (gradients * change).flatten(1).double().sum(1)
        rows = zip(which.tolist(), gradients, scores.tolist(), slopes.tolist(), strict=True)
        found |= {places[i]: Point(gradient, *facts) for i, gradient, *facts in rows}
    return found


def _errors(found: dict[float, Point]) -> dict[tuple[float, float], float]:
    """The trapezoid rule's error over each part of the path, from one point to the next."""
    return {
        (a, b): (b - a) / 2 * (found[a].slope + found[b].slope) - (found[b].score - found[a].score)
        for a, b in pairwise(sorted(found))
    }


def _bending(errors: dict[tuple[float, float], float]) -> list[float]:
    """The middles of the parts that have most of the error, the greatest first."""
    whole, reached, middles = sum(map(abs, errors.values())), 0.0, []
    for (start, end), error in sorted(errors.items(), key=lambda part: -abs(part[1])):
        if reached >= _SHARE * whole:
            break
        reached += abs(error)
        if end - start > _LEAST:
            middles.append((start + end) / 2)
    return middles
