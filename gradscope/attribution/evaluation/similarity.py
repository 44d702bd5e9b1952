"""How alike maps are, and how concentrated one is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

Doubles = np.ndarray[tuple[int], np.dtype[np.float64]]


@dataclass(frozen=True, eq=False)
class Ranked:
    """A map's values, ranked once however many others they are compared with."""

    values: Tensor

    @cached_property
    def ranks(self) -> Doubles:
        """The values' ranks as one vector, ties sharing their mean rank."""
        return _ranks(flattened(self.values))

    @cached_property
    def magnitudes(self) -> Ranked:
        """The same without signs."""
        return Ranked(self.values.abs()) if bool((self.values < 0).any()) else self

    def correlation(self, other: Ranked) -> float:
        """Spearman's rank correlation; 0 where a map is constant."""
        return pearson(self.ranks, other.ranks)


def spearman(a: Tensor, b: Tensor) -> float:
    """Rank correlation, ties sharing their mean rank; 0 where a map is constant."""
    return Ranked(a).correlation(Ranked(b))


def pearson(x: Doubles, y: Doubles) -> float:
    """Correlation of two vectors; 0 where one is constant."""
    x, y = x - x.mean(), y - y.mean()
    below = float(np.sqrt((x @ x) * (y @ y)))
    return float(np.clip((x @ y) / below, -1, 1)) if below > 0 else 0.0


def flattened(values: Tensor) -> Doubles:
    """A tensor's values as one vector of doubles."""
    found: Doubles = values.detach().double().flatten().cpu().numpy()
    return found


def _ranks(flat: Doubles) -> Doubles:
    _, inverse, counts = np.unique(flat, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    found: Doubles = ((2 * last - counts - 1) / 2)[inverse]
    return found


def agreement(maps: Mapping[str, Tensor]) -> dict[str, dict[str, float]]:
    """Rank correlations between one image's maps, of their positive parts."""
    shown = {name: values.clamp(min=0) for name, values in maps.items()}
    return {
        name: {other: spearman(a, b) for other, b in shown.items() if other != name}
        for name, a in shown.items()
    }


def concentration(values: Tensor) -> float | None:
    """The share of |map| in the strongest tenth of the pixels; None where the map is all zeros."""
    size = values.detach().double().abs().flatten()
    total = float(size.sum())
    if not np.isfinite(total) or total == 0:
        return None
    return float(size.topk(max(1, round(size.numel() / 10))).values.sum()) / total


def sparseness(values: Tensor) -> float | None:
    """The Gini index of |map| (Chalasani et al. 2020, arXiv:1810.06583): 0 flat, near 1 a point.

    None where the map is all zeros or not finite.
    """
    size = np.sort(np.abs(flattened(values)))
    total, count = float(size.sum()), len(size)
    if not np.isfinite(total) or total == 0:
        return None
    return float((2 * np.arange(1, count + 1) - count - 1) @ size / (count * total))


def complexity(values: Tensor, bins: int = 100) -> float:
    """The entropy in nats of the map's histogram (Hedström et al. 2024, arXiv:2401.06465)."""
    counts = np.histogram(np.nan_to_num(flattened(torch.nan_to_num(values))), bins)[0]
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())
