"""Attributions against closed forms and float64 re-derivations; the model stays as it was."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from architectures import vit_small
from torch import Tensor, nn

from gradscope import attribute
from gradscope.attribution.formulas.random_masks import family
from gradscope.attribution.methods import methods
from gradscope.errors import InputError, UsageError

from .oracles import oracle

ALL = sorted(methods())
FORMULAS = ["gradcam", "gradcam++", "xgradcam", "hirescam", "layercam"]


class Linear(nn.Module):
    """Logits w . x."""

    def __init__(self, classes: int = 3, shape: tuple[int, ...] = (2, 4, 5)) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn((classes, *shape), generator=generator).double())

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("nchw,kchw->nk", x, self.weight)


class Squares(Linear):
    """Logits w . x^2."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x**2)


def conv_net() -> nn.Sequential:
    """A head on flattened maps: gradients differ from position to position."""
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Conv2d(4, 6, 3),
        nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(6 * 4 * 4, 3),
    ).double()  # fmt: skip


def images(count: int = 2, size: int = 6) -> Tensor:
    return torch.randn((count, 2, size, size), generator=torch.Generator().manual_seed(2)).double()


# --- closed forms ---------------------------------------------------------------------------------


@oracle("saliency", "smoothgrad", "input-x-gradient", "vargrad")
def test_on_a_linear_model_gradients_are_its_weights() -> None:
    model, x = Linear(), torch.randn(2, 2, 4, 5).double()

    for name in ("saliency", "smoothgrad"):
        values = attribute(model, x, name, target=[0, 2]).values
        torch.testing.assert_close(values, model.weight.detach()[[0, 2]])
    torch.testing.assert_close(
        attribute(model, x, "input-x-gradient", target=1).values, x * model.weight.detach()[1]
    )
    torch.testing.assert_close(attribute(model, x, "vargrad", target=1).values, torch.zeros_like(x))


@oracle("integrated-gradients")
@pytest.mark.parametrize("rule", ["midpoint", "gauss-legendre"])
def test_integrated_gradients_of_squares_are_the_squares(rule: str) -> None:
    model, x = Squares(), torch.randn(2, 2, 4, 5).double()

    found = attribute(model, x, "integrated-gradients", target=1, steps=8, rule=rule)

    torch.testing.assert_close(found.values, model.weight.detach()[1] * x**2)
    assert np.abs(found.diagnostics["completeness_delta"]).max() < 1e-12
    assert found.diagnostics["scores"] == pytest.approx(model(x)[:, 1].tolist())


@oracle("integrated-gradients")
def test_integrated_gradients_start_at_their_reference() -> None:
    model, x, base = Squares(), torch.randn(1, 2, 4, 5).double(), torch.randn(1, 2, 4, 5).double()

    found = attribute(model, x, "integrated-gradients", target=0, reference=base)

    torch.testing.assert_close(found.values, model.weight.detach()[0] * (x**2 - base**2))


def test_a_tolerance_refines_until_it_is_met() -> None:
    model, x = conv_net(), images()

    coarse = attribute(model, x, "integrated-gradients", target=0, steps=2)
    fine = attribute(model, x, "integrated-gradients", target=0, steps=2, tolerance=1e-3)

    assert max(coarse.diagnostics["relative_delta"]) > 1e-3
    assert max(fine.diagnostics["relative_delta"]) <= 1e-3
    assert fine.diagnostics["steps"] > 2


def test_a_tolerance_holds_for_every_random_reference() -> None:
    model, x = conv_net(), images(1)
    given = {"target": 0, "reference": "random", "draws": 3, "mean": (0.5,) * 2, "std": (0.25,) * 2}

    found = attribute(model, x, "integrated-gradients", tolerance=1e-3, **given)

    assert found.diagnostics["relative_delta"][0] <= 1e-3
    assert found.diagnostics["reference_spread"][0] <= 1e-3 * abs(found.diagnostics["scores"][0])


@oracle("smoothgrad", "vargrad")
def test_smoothgrad_is_the_mean_over_its_noise_whatever_the_chunk() -> None:
    model, x = conv_net(), images(3)

    one, many = (
        attribute(model, x, "smoothgrad", target=0, samples=6, chunk=chunk).values
        for chunk in (1, 8)
    )

    torch.testing.assert_close(one, many, rtol=1e-12, atol=1e-14)
    model.eval()
    width = 0.15 * (x.flatten(1).amax(1) - x.flatten(1).amin(1)).view(-1, 1, 1, 1)
    wanted = []
    for sample in range(6):
        noise = torch.randn(x.shape[1:], generator=torch.Generator().manual_seed(sample)).double()
        leaf = (x + width * noise).requires_grad_()
        wanted.append(torch.autograd.grad(model(leaf)[:, 0].sum(), leaf)[0])
    torch.testing.assert_close(one, torch.stack(wanted).mean(0))
    variance = attribute(model, x, "vargrad", target=0, samples=6).values
    torch.testing.assert_close(variance, torch.stack(wanted).var(0, correction=0))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("smoothgrad", {"samples": 5}),
        ("vargrad", {"samples": 5}),
        ("integrated-gradients", {"reference": "random", "mean": (0.5, 0.5), "std": (0.2, 0.2)}),
        ("rise", {"masks": 9}),
    ],
)
def test_an_images_map_is_the_same_alone_and_anywhere_in_a_batch(
    name: str, options: dict[str, Any]
) -> None:
    model, x = conv_net(), images(3)

    together = attribute(model, x, name, target=0, **options).values
    turned = attribute(model, x.flip(0), name, target=0, **options).values.flip(0)
    alone = [attribute(model, x[i : i + 1], name, target=0, **options).values for i in range(3)]

    torch.testing.assert_close(together, turned, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-9, atol=1e-12)


# --- covered inputs -------------------------------------------------------------------------------


@oracle("occlusion")
def test_occlusion_of_a_linear_model_is_what_each_square_contributes() -> None:
    model, x = Linear(shape=(2, 6, 7)), torch.randn(2, 2, 6, 7).double()

    values = attribute(model, x, "occlusion", target=1, window=3, stride=2, fill=0.5).values

    part = (model.weight.detach()[1] * (x - 0.5)).sum(1)
    total, covered = torch.zeros_like(part), torch.zeros(6, 7)
    for top in (0, 2, 3):
        for left in (0, 2, 4):
            here = (slice(None), slice(top, top + 3), slice(left, left + 3))
            total[here] += part[here].sum((1, 2), keepdim=True)
            covered[here[1:]] += 1
    torch.testing.assert_close(values, total / covered)


def test_a_square_is_a_seventh_of_the_image_and_moves_by_half() -> None:
    model, x = Linear(shape=(2, 30, 44)), torch.randn(1, 2, 30, 44).double()

    facts = attribute(model, x, "occlusion", target=1).diagnostics
    assert (facts["window"], facts["forwards"]) == (4, 14 * 21)
    tiny = attribute(model, x, "occlusion", target=1, window=1, stride=1).diagnostics
    assert tiny["forwards"] == 30 * 44


@oracle("rise")
@pytest.mark.parametrize("coverage", [True, False])
def test_rise_weighs_its_masks_by_what_they_leave_whatever_the_chunk(coverage: bool) -> None:
    model, x = conv_net().eval(), images(2)
    asked: dict[str, Any] = {"target": 2, "masks": 20, "grid": 3, "coverage": coverage}

    values = attribute(model, x, "rise", chunk=1, **asked).values

    total, covered = torch.zeros(2, 6, 6).double(), torch.zeros(6, 6).double()
    for number in range(20):
        mask = family(3, 0.5, x).drawn([number]).pixels()[0]
        assert mask.min() >= 0
        assert mask.max() <= 1
        covered += mask
        with torch.no_grad():
            total += model(x * mask).softmax(1)[:, 2, None, None] * mask
    torch.testing.assert_close(values, total / (covered if coverage else 10))
    many = attribute(model, x, "rise", chunk=64, **asked).values
    torch.testing.assert_close(values, many)


@pytest.mark.parametrize("masks", [1, 30, 300])
def test_rise_gives_a_constant_model_a_constant_map(masks: int) -> None:
    """With the paper's divisor it shows where the masks happened to be open."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 40 * 56, 3))
    with torch.no_grad():
        model[1].weight.zero_()
    x = torch.rand((1, 3, 40, 56), generator=torch.Generator().manual_seed(0))

    flat, papers = (
        attribute(model, x, "rise", target=1, masks=masks, coverage=coverage).values
        for coverage in (True, False)
    )

    chance = float(model[1].bias.detach().softmax(0)[1])
    assert float(flat.max() - flat.min()) < 1e-6
    assert float(flat.mean()) == pytest.approx(chance, rel=1e-5)
    assert float(papers.max() - papers.min()) > 0.05


@oracle("rise")
@pytest.mark.parametrize(("seed", "grid", "size"), [(0, 3, (7, 6)), (5, 7, (14, 22))])
def test_rises_masks_are_coarse_grids_upsampled_by_a_cell_more_and_cropped(
    seed: int, grid: int, size: tuple[int, int]
) -> None:
    """Petsiuk et al. 2018, section 3.2, bilinear upsampling by NumPy's interp."""
    generator = torch.Generator().manual_seed(seed)
    cells = (torch.rand((1, 1, grid, grid), generator=generator) < 0.4).numpy()[0, 0].astype(float)
    cell = [int(np.ceil(length / grid)) for length in size]
    for axis in (0, 1):
        places = (np.arange((grid + 1) * cell[axis]) + 0.5) / ((grid + 1) * cell[axis]) * grid - 0.5
        cells = np.apply_along_axis(lambda v, p=places: np.interp(p, range(grid), v), axis, cells)
    top, left = (int(torch.randint(0, length, (), generator=generator)) for length in cell)

    found = family(grid, 0.4, torch.zeros(1, 3, *size)).drawn([seed]).pixels()[0]

    wanted = cells[top : top + size[0], left : left + size[1]]
    np.testing.assert_allclose(found, wanted, atol=1e-6)
    assert found.shape == size


def test_rise_finds_the_one_pixel_that_matters() -> None:
    model = Linear(classes=2, shape=(1, 14, 14))
    with torch.no_grad():
        model.weight.zero_()
        model.weight[0, 0, 3, 10] = 3.0

    found = attribute(model, torch.ones(1, 1, 14, 14).double(), "rise", target=0, masks=400).values[
        0
    ]

    top, left = divmod(int(found.argmax()), 14)
    assert abs(top - 3) <= 1
    assert abs(left - 10) <= 1


# --- maps, re-derived in NumPy --------------------------------------------------------------------


def parts(model: nn.Sequential, x: Tensor, target: int) -> tuple[np.ndarray, np.ndarray]:
    """Activations of the last convolution and the gradient there, by hand: the head is linear."""
    model.eval()
    with torch.no_grad():
        a = model[:4](x).numpy()
    head = model[6].weight.detach()[target].numpy().reshape(a.shape[1:])
    return a, head[None] * (a > 0)


def by_loops(name: str, a: np.ndarray, g: np.ndarray) -> np.ndarray:
    out = np.zeros((len(a), *a.shape[2:]))
    for n in range(len(a)):
        for k in range(a.shape[1]):
            ak, gk = a[n, k], g[n, k]
            if name == "gradcam":
                out[n] += gk.mean() * ak
            elif name == "gradcam++":
                weight = 0.0
                for i, j in np.ndindex(*ak.shape):
                    below = 2 * gk[i, j] ** 2 + ak.sum() * gk[i, j] ** 3
                    weight += gk[i, j] ** 2 / below * max(gk[i, j], 0) if below else 0.0
                out[n] += weight * ak
            elif name == "xgradcam":
                out[n] += (gk * ak).sum() / ak.sum() * ak
            elif name == "hirescam":
                out[n] += gk * ak
            elif name == "layercam":
                out[n] += np.maximum(gk, 0) * ak
    return out


@oracle(*FORMULAS)
@pytest.mark.parametrize("name", FORMULAS)
def test_maps_are_those_of_the_papers_formulas(name: str) -> None:
    model, x = conv_net(), images()

    found = attribute(model, x, name, target=1, layer="3")

    wanted = by_loops(name, *parts(model, x, 1))
    np.testing.assert_allclose(found.values, wanted, rtol=1e-9, atol=1e-12)
    ended = attribute(model, x, name, target=1, layer="3", relu=True)
    np.testing.assert_allclose(ended.values, np.maximum(wanted, 0), rtol=1e-9, atol=1e-12)
    assert found.values.shape == (2, 4, 4)
    assert found.upsampled.shape == (2, 6, 6)
    assert found.layer == "3"


@oracle("eigencam")
def test_eigencam_is_the_first_principal_component() -> None:
    model, x = conv_net(), images()

    found = attribute(model, x, "eigencam", target=1, layer="3").values

    a, _ = parts(model, x, 1)
    for n in range(2):
        points = a[n].reshape(6, -1).T
        points = points - points.mean(0)
        _, vectors = np.linalg.eigh(points.T @ points)
        wanted = (points @ vectors[:, -1]).reshape(4, 4)
        sign = np.sign((wanted * found[n].numpy()).sum())
        np.testing.assert_allclose(found[n], sign * wanted, rtol=1e-8, atol=1e-10)


def test_auto_takes_the_last_layer_that_gives_maps_and_the_greatest_logit() -> None:
    model, x = conv_net(), images()
    model.eval()

    found = attribute(model, x, "gradcam")

    assert found.layer == "4"
    assert list(found.target) == model(x).argmax(1).tolist()


@pytest.mark.parametrize(
    ("method", "least", "wrong"),
    [
        ("smoothgrad", {"samples": 1, "noise": 0}, ({"samples": 0}, {"noise": -0.1})),
        ("integrated-gradients", {"steps": 1, "draws": 1}, ({"steps": 0}, {"draws": 0})),
        ("rise", {"masks": 1, "grid": 1},
         ({"masks": 0}, {"grid": 0}, {"keep": 0}, {"keep": 1}, {"masks": 0, "grid": 0})),
        ("occlusion", {"window": 2, "stride": 2}, ({"window": 2, "stride": 3}, {"stride": -1})),
        ("scorecam", {"channels": 1}, ({"channels": -1},)),
    ],
)  # fmt: skip
def test_options_are_taken_from_their_least_value_on(
    method: str, least: dict[str, Any], wrong: tuple[dict[str, Any], ...]
) -> None:
    model, x = conv_net(), images(1)

    assert torch.isfinite(attribute(model, x, method, target=0, **least).values).all()
    for options in wrong:
        with pytest.raises(UsageError, match=r"ha(s|ve) to be"):
            attribute(model, x, method, target=0, **options)


# --- nothing is left behind -----------------------------------------------------------------------


def snapshot(model: nn.Module) -> list[Any]:
    state = {k: v.clone() for k, v in model.state_dict().items()}
    flags = [
        (p.requires_grad, None if p.grad is None else p.grad.clone()) for p in model.parameters()
    ]
    hooks = [len(m._forward_hooks) for m in model.modules()]
    return [state, flags, [m.training for m in model.modules()], hooks, torch.get_rng_state()]


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


def reads_attention(name: str) -> bool:
    return methods()[name].family == "attention" or name == "attention-lrp"


@pytest.mark.parametrize("name", ALL)
def test_the_model_is_left_as_it_was(name: str) -> None:
    model: nn.Module = conv_net().train()
    x = images()
    if reads_attention(name):
        model, x = vit_small().double().train(), torch.randn(1, 3, 32, 32).double()
    next(model.parameters()).requires_grad_(False)
    model(x).sum().backward()
    before = snapshot(model)

    few = (
        {"masks": 3}
        if name == "rise"
        else {"window": 3, "stride": 3}
        if name == "occlusion"
        else {}
    )
    attribute(model, x, name, target=0, **few)

    assert same(before, snapshot(model))


def test_the_model_is_left_as_it_was_after_an_error_too() -> None:
    model, x = conv_net().train(), images()
    before = snapshot(model)

    with pytest.raises(RuntimeError):
        attribute(model, x.repeat(1, 2, 1, 1), "gradcam", target=0)

    assert same(before, snapshot(model))


@pytest.mark.parametrize(
    "target", [2, np.int64(2), torch.tensor(2), [2, 2], np.array([2, 2]), torch.tensor([2, 2])]
)
def test_a_target_may_be_any_integer(target: Any) -> None:
    assert attribute(conv_net(), images(), "saliency", target=target).target == (2, 2)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_frozen_model_in_training_mode_is_explained_where_no_gradients_are_recorded(
    name: str, mode: Any
) -> None:
    model: nn.Module = conv_net()
    x = images()
    if reads_attention(name):
        model, x = vit_small().double(), torch.randn(1, 3, 32, 32).double()
    few = {"masks": 3} if name == "rise" else {}
    wanted = attribute(model.eval(), x, name, target=0, **few).values
    model.requires_grad_(False).train()

    with mode():
        found = attribute(model, x.clone(), name, target=0, **few).values
        assert not torch.is_grad_enabled()

    assert torch.equal(found, wanted)
    assert model.training


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_inputs_that_are_not_finite_are_an_error_of_the_input(value: float) -> None:
    x = images()
    x[1, 0, 2, 3] = value

    with pytest.raises(InputError, match="1 of 144 elements are not finite") as error:
        attribute(conv_net(), x, "saliency")

    assert error.value.kind == "malformed"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"method": "gradcamm"}, "did you mean gradcam"),
        ({"method": "gradcam", "layer": "features"}, "no layer 'features'"),
        ({"method": "gradcam", "layer": "6"}, "maps have shape"),
        ({"method": "saliency", "steps": 3}, "no option 'steps'"),
        ({"method": "saliency", "target": 7}, "no class 7: class indices are 0 to 2"),
        ({"method": "saliency", "target": -1}, "no class -1"),
        ({"method": "saliency", "target": 1.5}, "no class 1.5"),
        ({"method": "saliency", "target": True}, "no class True"),
        ({"method": "saliency", "target": torch.tensor([0.0, 1.0])}, "class indices are 0 to 2"),
        ({"method": "saliency", "target": [0, -3]}, "no class -3"),
        ({"method": "saliency", "versus": -1, "target": 0}, "no class -1"),
        ({"method": "saliency", "target": [1]}, "1 target for 2 images"),
        ({"method": "integrated-gradients", "rule": "simpson"}, "rule is one of midpoint, gauss"),
        ({"method": "integrated-gradients", "steps": "many"}, "steps is a number"),
        ({"method": "integrated-gradients", "reference": "grey"}, "unknown reference 'grey'"),
        ({"method": "integrated-gradients", "reference": "black"}, "give mean= and std="),
        ({"method": "attention-rollout"}, "no self-attention"),
        ({"method": "gradcam", "chunk": 0}, "chunk has to be at least 1"),
        ({"method": "gradcam", "layer": "fc.weight"}, "no layer 'fc.weight'"),
    ],
)
def test_a_wrong_request_says_what_there_is(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        attribute(conv_net(), images(), **arguments)
