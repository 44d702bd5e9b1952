"""Pictures of one goal that differ (Olah et al. 2017): a penalty on how alike their styles are."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations

from torch import Tensor


def gram(maps: Tensor) -> Tensor:
    """The Gram matrix [C, C] of the channels of maps [1, C, h, w], of length 1."""
    rows = maps[0].flatten(1).float()
    found = rows @ rows.T
    length = found.norm()
    return found / length if bool(length > 0) else found


class Diverse:
    """A score of several starts, less ``weight`` of it times the mean cosine of Gram matrices.

    The others' matrices are those of their last views, so that starts are improved one at a time.
    """

    def __init__(
        self, answers: Callable[[Tensor], tuple[Tensor, Tensor]], weight: float, starts: int
    ) -> None:
        self.answers, self.weight = answers, weight
        self.grams: list[Tensor | None] = [None] * starts

    def __call__(self, start: int, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """The score of a start's view, and what its likeness to the others takes from it."""
        score, maps = self.answers(pixels)
        own = gram(maps)
        self.grams[start] = own.detach()
        others = [g for k, g in enumerate(self.grams) if g is not None and k != start]
        alike = sum(((own * g).sum() for g in others), own.new_zeros(())) / max(1, len(others))
        return score, self.weight * score.detach().abs().sum() * alike


def cosine(pictures: list[Tensor]) -> float | None:
    """The mean cosine between the Gram matrices of several maps; None of a single one."""
    grams = [gram(maps) for maps in pictures]
    pairs = [float((a * b).sum()) for a, b in combinations(grams, 2)]
    return sum(pairs) / len(pairs) if pairs else None
