"""RISE: random masks, weighted by the probability of what they leave. Maps are [N, H, W]."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gradscope.attribution.formulas.gradients import Result
from gradscope.attribution.formulas.random_masks import Family, Masks, family
from gradscope.attribution.subject import Subject
from gradscope.errors import UsageError

#: Masks drawn before the error is looked at, in steps of so many, and at most.
_FIRST = 256
_STEP = 64
_MOST = 32_768
#: Ranges of maps below this share of the probability are those of rounding.
_ROUNDING = 1e-5
#: What is added to the variances of a regression, as a share of their mean.
_RIDGE = 0.1


def rise(
    subject: Subject, *, masks: int, grid: int, keep: float, coverage: bool, error: float
) -> Result:
    """The mean probability of what random smooth masks leave, weighted by each mask at a pixel.

    Divided by what the masks leave of each pixel, sum(p M) / sum(M). The paper divides by what
    they leave on average (``coverage=False``): masks leave less of the border, and no two pixels
    as often, so that a constant model gives a map, too. The standard error is told as a share of
    the map's range. With ``error`` masks are drawn until it is no more than that, or there are
    32,768; ``masks`` is not used. What the probability owes to the other cells of a mask, by linear
    regression, is then replaced by what is expected of it, and fewer masks do.

    Masks are drawn on the CPU, one generator each, so neither chunk nor device changes them.
    """
    if masks < 1 or grid < 1 or not 0 < keep < 1:
        raise UsageError("masks and grid have to be at least 1, and keep between 0 and 1")
    if error < 0 or (error > 0 and not coverage):
        raise UsageError("error has to be at least 0, and none is reached with coverage=false")
    kind = family(grid, keep, subject.inputs)
    if error > 0:
        ones = [subject.only(image) for image in range(len(subject.inputs))]
        seen, form = [_drawn_until(one, kind, error) for one in ones], adjusted
    else:
        seen, form = [_shown(subject, kind, masks)], by_coverage if coverage else papers
    found = [form(shown) for shown in seen]
    errors = [share for estimate in found for share in estimate.errors()]
    facts: dict[str, Any] = {
        "forwards": sum(shown.changes.numel() + len(shown.whole) for shown in seen),
        "standard_error": errors,
    }
    missed = max((share for share in errors if share is not None), default=0.0)
    if 0 < error < missed:
        facts["notes"] = (
            f"rise: after {_MOST:,} masks the map's standard error still is {missed:.2g} of its "
            f"range, not {error:g}",
        )
    return torch.cat([estimate.maps for estimate in found]), facts


@dataclass(frozen=True, eq=False, slots=True)
class Shown:
    """What the model made of masked images."""

    masks: Masks
    #: The images' own probabilities [N], and what each mask adds to them [N, M].
    whole: Tensor
    changes: Tensor


@dataclass(frozen=True, eq=False, slots=True)
class Estimate:
    """Maps and the variance of each of their pixels, [N, H, W]."""

    maps: Tensor
    variance: Tensor

    def errors(self) -> list[float | None]:
        """Root mean square standard errors over the maps' ranges; None where rounding is all."""
        high, low = self.maps.amax((1, 2)), self.maps.amin((1, 2))
        flat = high - low <= _ROUNDING * torch.maximum(high.abs(), low.abs())
        shares = self.variance.mean((1, 2)).sqrt() / (high - low)
        return [None if f else s for f, s in zip(flat.tolist(), shares.tolist(), strict=True)]


def by_coverage(shown: Shown) -> Estimate:
    """sum(p M) / sum(M): a ratio, with the variance of one (Cochran 1977, eq. 6.13).

    Sums are of differences from one probability: of equal ones the map is exactly equal.
    """
    masks, changes = shown.masks, shown.changes
    ones = torch.ones_like(changes[:1])
    covered = masks.summed(ones)
    # What no mask leaves is as good as any other part.
    lost = changes.mean(1)[:, None, None]
    added = torch.where(covered > 0, masks.summed(changes) / covered, lost)
    squares, mixed, alone = map(masks.summed_squares, (changes.square(), changes, ones))
    spread = (squares - 2 * added * mixed + added.square() * alone).clamp(min=0)
    variance = torch.where(covered > 0, spread / covered.square(), 0.0)
    return Estimate(shown.whole[:, None, None] + added, variance)


def papers(shown: Shown) -> Estimate:
    """sum(p M) / (M keep) for M masks."""
    return _mean(shown.masks, shown.whole[:, None] + shown.changes, 1)


def adjusted(shown: Shown) -> Estimate:
    """E[p M] / keep, with linear regression of p on the masks' blocks as a control variate.

    What the regression explains is replaced by its expectation, which is known; what it leaves is
    averaged (Owen, Monte Carlo, section 8.9).
    """
    masks, changes = shown.masks, shown.changes
    blocks = masks.blocks().flatten(1) - masks.family.keep
    centred = blocks - blocks.mean(0)
    products = centred.mT @ centred
    products += _RIDGE * products.diagonal().mean() * torch.eye(len(products)).to(products)
    slopes = torch.linalg.solve(products, centred.mT @ changes.mT).mT
    left = changes - slopes @ blocks.mT
    middle = left.mean(1, keepdim=True)
    rest = _mean(masks, left - middle, 1 + blocks.shape[1])
    known = masks.family.expected(slopes)
    return Estimate((shown.whole[:, None] + middle)[..., None] + known + rest.maps, rest.variance)


def _mean(masks: Masks, values: Tensor, used: int) -> Estimate:
    """E[v M] / keep by the mean over the masks, of which ``used`` are no longer free."""
    count, keep = values.shape[1], masks.family.keep
    mean = masks.summed(values) / (count * keep)
    squares = masks.summed_squares(values.square()) / (count * keep**2)
    return Estimate(mean, (squares - mean.square()).clamp(min=0) / max(1, count - used))


def _shown(subject: Subject, kind: Family, count: int, before: Shown | None = None) -> Shown:
    """The images under masks up to number ``count``; those ``before`` are not asked again."""
    masks = kind.drawn([subject.seed * 1_000_003 + number for number in range(count)])
    if before is None:
        own = subject.scores(subject.own, ask=subject.probability)
        whole = torch.cat([found for _, _, found in own])
        before = Shown(masks, whole, whole.new_zeros((len(whole), 0)))
    first = before.changes.shape[1]

    def points(which: Tensor, images: Tensor) -> Tensor:
        return subject.inputs[images] * masks[first + which].pixels()[:, None]

    more = before.whole.new_zeros((len(before.whole), count - first))
    for which, images, found in subject.scores(points, count - first, subject.probability):
        more[images, which] = found - before.whole[images]
    return Shown(masks, before.whole, torch.cat([before.changes, more], 1))


def _drawn_until(subject: Subject, kind: Family, error: float) -> Shown:
    """One image under as many masks as its map needs."""
    found = _shown(subject, kind, min(_FIRST, _MOST))
    while (count := found.changes.shape[1]) < _MOST:
        (reached,) = adjusted(found).errors()
        if reached is None or reached <= error:
            break
        needed = count * min(4.0, max(1.1, (reached / error) ** 2))
        found = _shown(subject, kind, min(_MOST, _STEP * math.ceil(needed / _STEP)), found)
    return found
