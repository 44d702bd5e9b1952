"""DeepLIFT and GradientSHAP against captum, closed forms and the difference of the scores."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from architectures import channels_last, resnet18, vit_registers, vit_small
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from gradscope import attribute
from gradscope.attribution.formulas.gradients import _placed
from gradscope.errors import UsageError

from .forms import FORMS, Rectifiers, images, model, saved
from .oracles import oracle

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import captum.attr as captum


def close(found: Tensor, wanted: Tensor, tolerance: float = 1e-9) -> None:
    scale = float(wanted.detach().abs().max())
    assert scale > 0
    torch.testing.assert_close(found, wanted.detach(), rtol=0, atol=tolerance * scale)


def modules() -> nn.Module:
    """What captum has rules for: rectifiers as modules of their own, none next to a maximum."""
    torch.manual_seed(4)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 1),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 8, 3), nn.ELU(), nn.Conv2d(8, 8, 3), nn.Sigmoid(), nn.AvgPool2d(2),
        nn.Flatten(), nn.Linear(32, 10), nn.Tanh(), nn.Linear(10, 7), nn.LeakyReLU(0.2),
        nn.Linear(7, 5),
    ).double().eval()  # fmt: skip


@oracle("deeplift")
def test_multipliers_are_captums_where_it_has_rules() -> None:
    net, x = modules(), images("rectifiers").double()
    base = torch.randn(x.shape, generator=torch.Generator().manual_seed(9)).double()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wanted, delta = captum.DeepLift(modules()).attribute(
            x.clone(), base, target=[1, 3], return_convergence_delta=True
        )

    found = attribute(net, x, "deeplift", target=[1, 3], reference=base)

    close(found.values, wanted)
    assert delta.abs().max() < 1e-9
    assert max(found.diagnostics["relative_delta"]) < 1e-9


def test_unlike_captums_a_maximum_next_to_a_rectifier_adds_up() -> None:
    """captum's own delta is as large there."""
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(384, 5)
    ).double()  # fmt: skip
    x, base = torch.randn((2, 1, 3, 16, 16), generator=torch.Generator().manual_seed(1)).double()
    wanted = exact(net, x, base, 3)

    found = attribute(net, x, "deeplift", target=3, reference=base).values
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = captum.DeepLift(net).attribute(x.clone(), base, target=3)

    assert float(found.sum()) == pytest.approx(wanted, rel=1e-9)
    assert float(theirs.detach().sum()) != pytest.approx(wanted, rel=1e-2)


def exact(net: nn.Module, x: Tensor, base: Tensor, target: int) -> float:
    with torch.no_grad():
        return float((net(x) - net(base))[0, target])


MADE: dict[str, Callable[[], nn.Module]] = {
    "residual": lambda: resnet18(5),
    "functional": Rectifiers,
    "transformer": vit_small,
    "registers": vit_registers,
    "channels last": channels_last,
}


@pytest.mark.parametrize("name", MADE)
def test_the_values_add_up_to_the_difference_of_the_scores(name: str) -> None:
    torch.manual_seed(3)
    net = MADE[name]().double().eval()
    shape = (16, 16) if name == "functional" else (32, 48 if name == "registers" else 32)
    x, base = torch.randn((2, 1, 3, *shape), generator=torch.Generator().manual_seed(1)).double()

    found = attribute(net, x, "deeplift", target=3, reference=base)

    wanted = exact(net, x, base, 3)
    assert float(found.values.sum()) == pytest.approx(wanted, rel=1e-9)
    assert found.diagnostics["relative_delta"][0] < 1e-9
    # The gradient's own products do not.
    plain = attribute(net, x, "saliency", target=3).values * (x - base)
    assert float(plain.sum()) != pytest.approx(wanted, rel=1e-2)


class Elementwise(nn.Module):
    """A function of three numbers, one to a channel."""

    def __init__(self, compute: Callable[..., Tensor]) -> None:
        super().__init__()
        self.compute = compute

    def forward(self, x: Tensor) -> Tensor:
        out = self.compute(*x[:, :, 0, 0].unbind(1))
        return torch.stack([out, -out], 1)


def shapley(compute: Callable[..., Tensor], x: Tensor, y: Tensor) -> list[float]:
    """The exact Shapley values of two numbers; those of a function of one are its slope's."""

    def at(*of: Tensor) -> float:
        return float(compute(of[0][0], of[1][1], x[2]))

    first = (at(x, x) - at(y, x) + at(x, y) - at(y, y)) / 2
    second = (at(x, x) - at(x, y) + at(y, x) - at(y, y)) / 2
    return [first, second]


@pytest.mark.parametrize(
    "compute",
    [
        lambda a, b, _: a * b,
        lambda a, b, _: a / b,
        lambda a, b, _: F.gelu(a) * torch.sigmoid(b),
        lambda a, b, _: a.exp() / (b * b),
    ],
)
def test_a_products_factors_get_their_shapley_values(compute: Callable[..., Tensor]) -> None:
    x, y = torch.tensor([[1.5, 2.0, 0.5], [0.4, 0.7, 0.5]]).double()
    net = Elementwise(compute).eval()

    found = attribute(
        net, x.view(1, 3, 1, 1), "deeplift", target=0, reference=y.view(1, 3, 1, 1)
    ).values.flatten()

    assert found[:2].tolist() == pytest.approx(shapley(compute, x, y), rel=1e-12)
    assert found[2] == 0


def by_parts(kind: str) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """An operator, and the same in exponentials, sums, squares, roots and products."""
    if kind == "softmax":
        return lambda x: x.softmax(-1), lambda x: x.exp() / x.exp().sum(-1, keepdim=True)
    if kind == "length":
        return (
            lambda x: torch.linalg.vector_norm(x, dim=-1),
            lambda x: (x * x).sum(-1).sqrt(),
        )

    def norm(x: Tensor) -> Tensor:
        x = x - x.mean(-1, keepdim=True)
        return x * ((x * x).mean(-1, keepdim=True) + 1e-5).rsqrt()

    if kind == "layer norm":
        return lambda x: F.layer_norm(x, x.shape[-1:]), norm
    return (
        lambda x: F.group_norm(x.permute(0, 2, 1), 1).permute(0, 2, 1),
        lambda x: norm(x.flatten(1)).view_as(x),
    )


@pytest.mark.parametrize("kind", ["softmax", "layer norm", "group norm", "length"])
def test_softmax_and_norms_are_taken_apart(kind: str) -> None:
    torch.manual_seed(6)
    head = nn.Linear(12 if kind == "length" else 48, 4).double()
    x, base = torch.randn((2, 1, 3, 4, 4)).double()

    class Head(nn.Module):
        def __init__(self, compute: Callable[[Tensor], Tensor]) -> None:
            super().__init__()
            self.compute, self.head = compute, head

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.compute(x.flatten(2) if "norm" in kind else x).flatten(1))

    whole, parts = (
        attribute(Head(f).eval(), x, "deeplift", target=2, reference=base).values
        for f in by_parts(kind)
    )

    close(whole, parts)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_multipliers_of_the_module(form: str) -> None:
    net, x = model("rectifiers").double(), images("rectifiers").double()
    wanted = attribute(net, x, "deeplift", target=[1, 2], reference=x.flip(3)).values

    other = saved(net, form, x[: 1 + ("dynamic" in form)])
    found = attribute(other, x, "deeplift", target=[1, 2], reference=x.flip(3)).values

    close(found, wanted)


def test_a_model_that_takes_another_way_for_the_reference_is_refused() -> None:
    class Branches(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x * 2 if x.sum() > 0 else x.relu()).flatten(1)

    class Chooses(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.where(x > 0, x, x * 0.1).flatten(1)

    x = torch.ones(1, 3, 4, 4)
    with pytest.raises(UsageError, match="something else for the reference"):
        attribute(Branches(), x, "deeplift", target=0, reference=-x)
    with pytest.raises(UsageError, match="where chooses by the image"):
        attribute(Chooses(), x, "deeplift", target=0, reference=-x)


# --- GradientSHAP ---------------------------------------------------------------------------------


@oracle("gradient-shap")
def test_gradient_shap_is_captums_at_the_same_points(monkeypatch: pytest.MonkeyPatch) -> None:
    net, x = model("rectifiers").double(), images("rectifiers").double()
    bases = torch.randn((3, *x.shape[1:]), generator=torch.Generator().manual_seed(9)).double()
    positions, picks = _placed(7, 6, 3)
    # captum's samples of an image lie next to each other.
    monkeypatch.setattr(np.random, "uniform", lambda *_a, **_k: np.tile(positions.numpy(), 2))
    monkeypatch.setattr(np.random, "choice", lambda *_a, **_k: np.tile(picks, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wanted = captum.GradientShap(net).attribute(x, bases, n_samples=6, target=[1, 3])

    found = attribute(
        net, x, "gradient-shap", target=[1, 3], samples=6, seed=7, reference=list(bases)
    )

    assert len(set(picks)) > 1
    close(found.values, wanted, 1e-6)


def linear(*_: Any) -> nn.Module:
    torch.manual_seed(2)
    return nn.Sequential(nn.Flatten(), nn.Linear(48, 3)).double()


def test_of_a_linear_model_every_sample_is_exact() -> None:
    net, x = linear(), torch.randn(2, 3, 4, 4).double()

    found = attribute(net, x, "gradient-shap", target=1, samples=3, reference=0.5 * x)

    close(found.values, 0.5 * x * net[1].weight[1].view(3, 4, 4))
    assert max(found.diagnostics["relative_delta"]) < 1e-9


def test_more_samples_add_up_better_and_noise_does_not_change_the_mean() -> None:
    net, x = model("rectifiers").double(), images("rectifiers").double()

    def missed(samples: int) -> float:
        found = attribute(net, x, "gradient-shap", target=1, samples=samples)
        return max(found.diagnostics["relative_delta"])

    assert missed(200) < 0.2 * missed(5)
    lines = linear()
    x = torch.randn(1, 3, 4, 4).double()
    noisy = attribute(lines, x, "gradient-shap", target=1, samples=400, noise=0.1).values
    plain = attribute(lines, x, "gradient-shap", target=1, samples=1).values
    assert not torch.equal(noisy, plain)
    close(noisy, plain, 0.1)


def test_random_references_differ_from_sample_to_sample() -> None:
    net, x = linear(), torch.zeros(1, 3, 4, 4).double()
    pixels: dict[str, Any] = {"mean": (0.0,) * 3, "std": (1.0,) * 3}

    few, many = (
        attribute(net, x, "gradient-shap", target=1, samples=n, reference="random", **pixels).values
        for n in (1, 500)
    )

    weight = net[1].weight[1].view(1, 3, 4, 4)
    close(many, -0.5 * weight, 0.1)
    assert (few + 0.5 * weight).abs().max() > 0.1 * weight.abs().max()
