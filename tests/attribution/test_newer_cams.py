"""Finer-, Shapley- and KPCA-CAM and smoothing: the formulas of pytorch-grad-cam 1.5.7."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from sklearn.decomposition import KernelPCA
from torch import Tensor, nn

from gradscope import attribute
from gradscope.errors import UsageError

from .forms import FORMS, images, model, saved
from .oracles import oracle


class Curved(nn.Module):
    """A head with a second derivative behind the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Conv2d(3, 6, 3, padding=1)
        self.inside, self.head = nn.Linear(6 * 16, 12), nn.Linear(12, 5)

    def after(self, maps: Tensor) -> Tensor:
        return self.head(torch.tanh(self.inside(maps.flatten(1))))

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.last(x))


def net() -> Curved:
    torch.manual_seed(0)
    return Curved().double().eval()


X = torch.randn((2, 3, 4, 4), generator=torch.Generator().manual_seed(1)).double()
TARGETS = [1, 3]


def tapped(made: Curved) -> tuple[Tensor, Tensor]:
    maps = made.last(X).detach().requires_grad_()
    return maps, made.after(maps)


def close(found: Any, wanted: Any, tolerance: float = 1e-10) -> None:
    found, wanted = np.asarray(found), np.asarray(torch.as_tensor(wanted).detach())
    assert np.abs(wanted).max() > 0
    np.testing.assert_allclose(found, wanted, rtol=0, atol=tolerance * np.abs(wanted).max())


# --- Finer-CAM ------------------------------------------------------------------------------------


def finer_score(logits: Tensor, target: int, others: list[int], alpha: float) -> Tensor:
    """``FinerWeightedTarget`` of one image."""
    shares = logits.softmax(-1)
    parts = torch.stack([shares[d] * (logits[target] - alpha * logits[d]) for d in others])
    return parts.sum() / (shares[others].sum() + 1e-9)


@oracle("finercam")
@pytest.mark.parametrize(("alpha", "count"), [(1.0, 3), (0.6, 2), (1.0, 99)])
def test_finer_cam_explains_the_target_less_its_nearest_classes(alpha: float, count: int) -> None:
    made = net()
    maps, logits = tapped(made)
    scores = []
    for row, target in zip(logits, TARGETS, strict=True):
        ranked = (row - row[target]).abs().detach().numpy().argsort()
        scores.append(finer_score(row, target, ranked[1 : 1 + count].tolist(), alpha))
    (gradient,) = torch.autograd.grad(sum(scores), maps)
    wanted = (gradient.mean((2, 3), keepdim=True) * maps).sum(1)

    found = attribute(made, X, "finercam", target=TARGETS, layer="last", alpha=alpha, classes=count)

    close(found.values, wanted)


def test_finer_cam_against_one_class_is_the_difference_of_two_grad_cams() -> None:
    a, b = (attribute(net(), X, "gradcam", target=t, layer="last").values for t in (1, 2))

    found = attribute(net(), X, "finercam", target=1, versus=2, layer="last")

    close(found.values, a - b, 1e-7)
    with pytest.raises(UsageError, match="classes has to be at least 1"):
        attribute(net(), X, "finercam", target=1, layer="last", classes=0)


# --- Shapley-CAM ----------------------------------------------------------------------------------


@oracle("shapleycam")
@pytest.mark.parametrize("utility", ["logit", "rest"])
def test_shapley_cam_takes_off_half_the_hessian_times_the_activations(utility: str) -> None:
    made = net()
    wanted = []
    for image, target in zip(made.last(X).detach(), TARGETS, strict=True):

        def score(maps: Tensor, target: int = target) -> Tensor:
            logits = made.after(maps[None])
            loss = nn.functional.cross_entropy(logits, torch.tensor([target]))
            return logits[0, target] - (loss if utility == "rest" else 0)

        gradient = torch.autograd.functional.jacobian(score, image)
        hessian = torch.autograd.functional.hessian(score, image).reshape(96, 96)
        curved = (hessian @ image.flatten()).view_as(image)
        weights = (gradient - 0.5 * curved).mean((1, 2), keepdim=True)
        assert curved.abs().max() > 0.01 * gradient.abs().max()
        wanted.append((weights * image).sum(0))

    found = attribute(made, X, "shapleycam", target=TARGETS, layer="last", utility=utility)

    close(found.values, torch.stack(wanted))


def test_without_curvature_shapley_cam_of_logits_is_grad_cam() -> None:
    made = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.Flatten(), nn.Linear(96, 5)).double()

    wanted = attribute(made, X, "gradcam", target=TARGETS, layer="0").values
    found = attribute(made, X, "shapleycam", target=TARGETS, layer="0", utility="logit").values

    close(found, wanted)


@pytest.mark.parametrize("form", [f for f in FORMS if f != "frozen"])
@pytest.mark.parametrize("method", ["shapleycam", "finercam", "kpcacam"])
def test_every_form_of_a_transformer_gives_the_maps_of_the_module(method: str, form: str) -> None:
    vit, x = model("vit").double(), images("vit").double()
    wanted = attribute(vit, x, method, target=[1, 2])

    found = attribute(saved(vit, form, x[: 1 + ("dynamic" in form)]), x, method, target=[1, 2])

    assert found.layer == wanted.layer
    close(found.values, wanted.values, 1e-6)


# --- KPCA-CAM -------------------------------------------------------------------------------------


@oracle("kpcacam")
@pytest.mark.parametrize("kernel", ["sigmoid", "rbf", "poly"])
@pytest.mark.parametrize("gamma", [0.0, 0.02])
def test_kpca_cam_is_scikit_learns_first_component_up_to_its_sign(
    kernel: str, gamma: float
) -> None:
    made = net()
    maps = made.last(X).detach()

    found = attribute(made, X, "kpcacam", target=1, layer="last", kernel=kernel, gamma=gamma)

    for mine, image in zip(found.values, maps, strict=True):
        points = image.flatten(1).T.numpy()
        points = points - points.mean(0)
        theirs = KernelPCA(1, kernel=kernel, gamma=gamma or None).fit_transform(points)[:, 0]
        agrees = np.sign(theirs @ points.sum(1))
        close(mine.flatten(), theirs * agrees, 1e-6)


# --- smoothing ------------------------------------------------------------------------------------

SMOOTHED = ("gradcam", "gradcam++", "xgradcam", "hirescam", "layercam", "finercam", "shapleycam")


def component(parts: Tensor) -> Tensor:
    """``get_2d_projection`` of one image, its sign that of the parts' sum."""
    points = parts.flatten(1).T.numpy()
    points = points - points.mean(0)
    first = points @ np.linalg.svd(points, full_matrices=True)[2][0]
    return torch.from_numpy(first * np.sign(first @ points.sum(1))).view(parts.shape[1:])


def test_eigen_smoothing_is_the_first_component_of_the_weighted_channels() -> None:
    made = net()
    maps, logits = tapped(made)
    (gradient,) = torch.autograd.grad(logits[[0, 1], TARGETS].sum(), maps)
    parts = (gradient.mean((2, 3), keepdim=True) * maps).detach()

    found = attribute(made, X, "gradcam", target=TARGETS, layer="last", eigen_smooth=True)

    close(found.values, torch.stack([component(p) for p in parts]), 1e-8)


@pytest.mark.parametrize("method", SMOOTHED)
def test_augmented_smoothing_is_the_mean_of_six_maps_turned_back(method: str) -> None:
    made = net()

    def plain(x: Tensor) -> Tensor:
        return attribute(made, x, method, target=TARGETS, layer="last").values

    wanted = sum(
        plain(X * factor) + plain(X.flip(3) * factor).flip(2) for factor in (0.9, 1.0, 1.1)
    )
    found = attribute(made, X, method, target=TARGETS, layer="last", aug_smooth=True)

    close(found.values, wanted / 6)
    assert (found.values - plain(X)).abs().max() > 1e-3 * plain(X).abs().max()


def test_options_of_smoothing_are_true_or_false() -> None:
    with pytest.raises(UsageError, match="aug_smooth is true or false"):
        attribute(net(), X, "gradcam", target=1, layer="last", aug_smooth="no")
