"""Pictures of one goal that differ."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from gradscope.attribution.synthesis.diversity import Diverse, cosine, gram


def maps(seed: int) -> Tensor:
    return torch.randn((1, 4, 3, 5), generator=torch.Generator().manual_seed(seed))


def wanted(one: Tensor, other: Tensor) -> float:
    """The cosine between Gram matrices, summed over positions by hand in float64."""
    a, b = (
        np.einsum("ihw,jhw->ij", m, m) for m in (one[0].double().numpy(), other[0].double().numpy())
    )
    return float((a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum()))


def test_the_cosine_is_that_of_the_gram_matrices() -> None:
    assert cosine([maps(0), maps(1)]) == pytest.approx(wanted(maps(0), maps(1)), rel=1e-5)
    three = [wanted(maps(i), maps(j)) for i, j in ((0, 1), (0, 2), (1, 2))]
    assert cosine([maps(0), maps(1), maps(2)]) == pytest.approx(sum(three) / 3, rel=1e-5)
    assert cosine([maps(0), maps(0) * 3]) == pytest.approx(1, rel=1e-6)
    assert cosine([maps(0)]) is None


def test_maps_of_nothing_are_like_nothing() -> None:
    assert cosine([torch.zeros(1, 4, 2, 2), maps(0)]) == 0
    assert bool(torch.isfinite(gram(torch.zeros(1, 4, 2, 2))).all())


def test_a_start_loses_the_share_of_its_score_that_it_is_alike() -> None:
    made = {0.0: maps(0), 1.0: maps(1), 2.0: maps(2)}
    diverse = Diverse(lambda pixels: (pixels.sum()[None] - 7, made[float(pixels.sum())]), 0.5, 3)

    alone = diverse(0, torch.zeros(1))
    second = diverse(1, torch.ones(1))
    third = diverse(2, torch.ones(1) * 2)

    assert float(alone[1]) == 0
    assert float(second[0]) == -6
    assert float(second[1]) == pytest.approx(0.5 * 6 * wanted(maps(0), maps(1)), rel=1e-5)
    both = (wanted(maps(0), maps(2)) + wanted(maps(1), maps(2))) / 2
    assert float(third[1]) == pytest.approx(0.5 * 5 * both, rel=1e-5)


def test_only_a_starts_own_maps_are_changed_by_its_penalty() -> None:
    one, other = maps(0).requires_grad_(), maps(1).requires_grad_()
    diverse = Diverse(lambda pixels: (pixels.sum()[None] + 1, one if pixels.sum() else other), 1, 2)
    diverse(0, torch.zeros(1))

    _, penalty = diverse(1, torch.ones(1))

    found = torch.autograd.grad(torch.as_tensor(penalty), (one, other), allow_unused=True)
    assert found[0] is not None
    assert float(found[0].abs().sum()) > 0
    assert found[1] is None
