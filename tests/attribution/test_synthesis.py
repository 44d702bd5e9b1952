"""Pictures that a score likes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from make import digits_model
from safetensors.torch import load_file
from torch import Tensor, nn

from gradscope.attribution.synthesis.ascent import Objective, Synthesis, synthesise
from gradscope.attribution.synthesis.diversity import Diverse, cosine
from gradscope.attribution.synthesis.priors import PRIORS, Size
from gradscope.attribution.synthesis.views import seen, stages
from gradscope.errors import UsageError

DIGITS = Path(__file__).parents[2] / "fixtures" / "digits.safetensors"


def digits() -> nn.Module:
    net = digits_model()
    net.load_state_dict(load_file(DIGITS))
    return net.eval().requires_grad_(False)


def plain(score: Callable[[Tensor], Tensor]) -> Objective:
    return lambda _, pixels: (score(pixels), 0.0)


def made(score: Callable[[Tensor], Tensor], size: Size, **options: Any) -> Synthesis:
    """One picture, for a model of its size."""
    return synthesise(plain(score), size, stages(size[1:], size[1:], ()), **options)[0]


@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("size", [(1, 8, 8), (3, 31, 20), (1, 1, 1)])
def test_any_size_stays_between_black_and_white(size: Size, prior: str) -> None:
    found = made(lambda x: x.square().sum((1, 2, 3)), size, steps=8, prior=PRIORS[prior])

    assert found.image.shape == size
    assert found.image.min() >= 0
    assert found.image.max() <= 1
    assert len(found.scores) == 8
    assert found.opacity.shape == size[1:]
    assert float(found.opacity.max()) == 1


@pytest.mark.parametrize("prior", PRIORS)
def test_the_score_rises_by_far_over_what_the_start_has(prior: str) -> None:
    # What likes a bright spot in the middle, and darkness around it.
    rows = torch.linspace(-1, 1, 32)
    liked = (-8 * (rows[:, None] ** 2 + rows**2)).exp() - 0.2

    found = made(lambda x: (x * liked).sum((1, 2, 3)), (3, 32, 32), steps=64, prior=PRIORS[prior])

    last, first = sum(found.scores[-8:]) / 8, sum(found.scores[:2]) / 2
    assert last > first + 20
    middle, corner = found.image[:, 12:20, 12:20].mean(), found.image[:, :6, :6].mean()
    assert middle > corner + 0.3


@pytest.mark.parametrize("prior", PRIORS)
def test_the_seed_decides_the_image_to_the_bit_and_nothing_else_is_drawn(prior: str) -> None:
    net = digits()
    state = torch.get_rng_state()

    images = [
        made(lambda x: net(x)[:, 3], (1, 8, 8), steps=10, seed=seed, prior=PRIORS[prior]).image
        for seed in (1, 1, 2)
    ]

    assert torch.equal(images[0], images[1])
    assert not torch.equal(images[0], images[2])
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("digit", range(10))
def test_the_image_is_recognised_under_views_that_were_not_used(digit: int) -> None:
    net = digits()

    found = made(lambda x: net(x)[:, digit], (1, 8, 8), steps=128)

    assert max(found.scores) > found.scores[0] + 3
    turned = torch.tensor([[[0.99, -0.05, 0.02], [0.05, 0.99, -0.02]]])
    assert int(net(seen(found.image[None], turned, (8, 8))).argmax()) == digit


class Dead(nn.Module):
    """Its rectifier is shut for the grey images that synthesis starts from."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x.mean((1, 2, 3)) - 0.52)


def test_a_dead_start_is_let_through_its_rectifiers() -> None:
    found = made(Dead(), (1, 8, 8), steps=100)

    assert found.scores[0] == 0
    assert max(found.scores) > 0


def test_a_blind_score_and_one_that_is_not_finite_are_refused() -> None:
    with pytest.raises(UsageError, match="does not depend"):
        made(lambda x: x.detach().sum((1, 2, 3)), (1, 8, 8), steps=100)
    with pytest.raises(UsageError, match="became nan"):
        made(lambda x: x.sum((1, 2, 3)) * torch.nan, (1, 8, 8), steps=3)


def test_each_stage_shows_the_model_its_own_size_for_its_share_of_the_steps() -> None:
    sides: list[tuple[int, ...]] = []

    def score(x: Tensor) -> Tensor:
        sides.append(tuple(x.shape[2:]))
        return x.mean((1, 2, 3))

    plan = stages((64, 40), (32, 20), ((16, 10), (24, 15)))
    synthesise(plain(score), (3, 64, 40), plan, steps=20)

    assert sides == [(16, 10)] * 11 + [(24, 15)] * 6 + [(32, 20)] * 3


def test_several_starts_are_those_of_their_seeds_alone() -> None:
    net = digits()
    options: dict[str, Any] = {"size": (1, 8, 8), "stages": stages((8, 8), (8, 8), ()), "steps": 12}
    objective = plain(lambda x: net(x)[:, 3])

    together = synthesise(objective, starts=3, seed=4, **options)

    for number, found in enumerate(together):
        (alone,) = synthesise(objective, seed=4 + number, **options)
        assert torch.equal(found.image, alone.image)
        assert found.scores == alone.scores


def test_diversity_lowers_the_cosine_between_starts_and_leaves_the_class() -> None:
    net = digits()

    def answers(pixels: Tensor) -> tuple[Tensor, Tensor]:
        return net(pixels)[:, 3], net.features[:2](pixels)

    def alike(weight: float) -> tuple[float, list[int]]:
        found = synthesise(
            Diverse(answers, weight, 3), (1, 8, 8), stages((8, 8), (8, 8), ()), steps=96, starts=3
        )
        images = [each.image[None] for each in found]
        between = cosine([answers(image)[1] for image in images])
        assert between is not None
        return between, [int(net(image).argmax()) for image in images]

    usual, classes = alike(0.0)
    diverse, others = alike(10.0)

    assert 1 - diverse > 2 * (1 - usual)
    assert classes == others == [3, 3, 3]


def test_what_mattered_is_opaque_and_the_rest_is_not() -> None:
    # Only the upper left of every view counts.
    found = made(lambda x: x[:, :, :8, :8].mean((1, 2, 3)), (3, 32, 32), steps=48)

    assert float(found.opacity[4:6, 4:6].min()) > 0.8
    assert float(found.opacity[26:, 26:].max()) < 0.3
