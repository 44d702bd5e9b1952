"""What a map says that parts matter, against what the score loses without them.

Faithfulness correlation (Bhatt et al. 2020, arXiv:2005.00631) and infidelity (Yeh et al. 2019,
arXiv:1901.09392), from the same removals, which all maps of a target share.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gradscope.attribution.evaluation.similarity import Doubles, flattened, pearson
from gradscope.attribution.subject import Subject

_REMOVALS = 24
#: Parts are cells of a grid; a fifth of them is removed at a time.
_GRID, _SHARE = 14, 0.2


@dataclass(frozen=True, eq=False, slots=True)
class Removals:
    """Random parts of a picture, and what the score loses when they become the mean colour."""

    #: [M, H, W], 1 where pixels are removed.
    masks: Tensor
    #: [M]
    lost: Doubles

    def attributed(self, values: Tensor) -> Doubles:
        """What a map [H, W] of contributions gives to each part [M]."""
        shares = self.masks.double().cpu().flatten(1).numpy()
        found: Doubles = shares @ flattened(torch.nan_to_num(values))
        return found


def removals(subject: Subject) -> Removals:
    """The removals of the subject's first image."""
    image = subject.inputs[0]
    generator = torch.Generator().manual_seed(subject.seed + 4)
    height, width = image.shape[1:]
    masks = torch.stack([_mask(height, width, generator) for _ in range(_REMOVALS)]).to(image)
    found = subject.scores(lambda which, _images: image * (1 - masks[which, None]), _REMOVALS)
    scores = torch.cat([scores for _, _, scores in found])
    return Removals(masks, flattened(subject.own_scores[0].double() - scores.double()))


def _mask(height: int, width: int, generator: torch.Generator) -> Tensor:
    rows, columns = (min(_GRID, length) for length in (height, width))
    cells = torch.zeros(rows * columns)
    cells[torch.randperm(len(cells), generator=generator)[: round(_SHARE * len(cells))]] = 1
    down, across = (torch.arange(n) * cut // n for n, cut in ((height, rows), (width, columns)))
    return cells.view(rows, columns)[down][:, across]


def faithfulness_correlation(attributed: Doubles, lost: Doubles) -> float:
    """Pearson's correlation of what parts are said to matter with what the score loses."""
    return pearson(attributed, lost)


def infidelity(attributed: Doubles, lost: Doubles) -> float | None:
    """E[(b a - l)^2] / E[l^2], a scaled by the best b: 0 is perfect, 1 as good as an empty map.

    None where no removal changes the score.
    """
    below = float(lost @ lost)
    if below == 0:
        return None
    size = float(attributed @ attributed)
    best = float(attributed @ lost) / size if size > 0 else 0.0
    return float(np.square(best * attributed - lost).sum()) / below
