"""Faithfulness correlation and infidelity: a model that is its map, captum, SciPy."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from gradscope.attribution.evaluation.removal import faithfulness_correlation, infidelity, removals
from gradscope.attribution.subject import Subject
from gradscope.models.forms import as_model


def linear() -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(30 * 40, 2)).double().requires_grad_(False)
    return net, torch.rand(1, 1, 30, 40).double()


def test_a_linear_models_contributions_are_faithful_to_the_last_digit() -> None:
    net, x = linear()
    parts = removals(Subject(as_model(net), x, torch.tensor([1])))
    contributions = net[1].weight[1].view(30, 40) * x[0, 0]

    given = parts.attributed(contributions)

    np.testing.assert_allclose(given, parts.lost, atol=1e-6)
    assert faithfulness_correlation(given, parts.lost) == pytest.approx(1)
    assert infidelity(given, parts.lost) == pytest.approx(0, abs=1e-9)
    assert infidelity(3 * given, parts.lost) == pytest.approx(0, abs=1e-9)
    assert infidelity(0 * given, parts.lost) == pytest.approx(1)


def test_a_fifth_of_a_grid_of_cells_is_removed_each_time() -> None:
    net, x = linear()

    masks = removals(Subject(as_model(net), x, torch.tensor([1]))).masks

    assert set(masks.unique().tolist()) == {0, 1}
    assert masks.mean((1, 2)).tolist() == pytest.approx([0.2] * len(masks), abs=0.03)
    assert len({tuple(mask.flatten().tolist()) for mask in masks}) == len(masks)


def test_infidelity_is_captums_over_the_square_of_the_losses() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from captum.metrics import infidelity as captums
    net, x = linear()
    parts = removals(Subject(as_model(net), x, torch.tensor([1])))
    values = torch.randn((30, 40), generator=torch.Generator().manual_seed(1)).double()
    masks = parts.masks[:, None]

    theirs = captums(
        net, lambda _x: (masks, x * (1 - masks)), x, values[None, None], target=1,
        n_perturb_samples=len(masks), normalize=True,
    )  # fmt: skip

    wanted = float(theirs) / np.square(parts.lost).mean()
    assert infidelity(parts.attributed(values), parts.lost) == pytest.approx(wanted, rel=1e-6)


def test_faithfulness_correlation_is_pearsons() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 24))

    assert faithfulness_correlation(a, b) == pytest.approx(stats.pearsonr(a, b).statistic)
    assert faithfulness_correlation(np.ones(24), b) == 0
    assert infidelity(a, np.zeros(24)) is None
