"""Against captum, float64 and NumPy; and unlike those that are known to be wrong."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from architectures import channels_last, mobilenet_v2, resnet18, vit_registers, vit_small
from torch import Tensor, nn
from torch.nn.functional import interpolate

from gradscope import attribute
from gradscope.attribution.formulas import cams

from .forms import Rectifiers, images, model
from .oracles import oracle

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import captum.attr as captum

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:captum")


def resnet(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return resnet18(num_classes=5).to(dtype).eval()


def close(found: Tensor, wanted: Tensor, tolerance: float) -> None:
    scale = float(wanted.detach().abs().max())
    assert scale > 0
    torch.testing.assert_close(found, wanted.detach(), rtol=0, atol=tolerance * scale)


def photo(size: int = 64, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn((2, 3, size, size), generator=torch.Generator().manual_seed(1), dtype=dtype)


# --- captum ---------------------------------------------------------------------------------------


@oracle("saliency")
@pytest.mark.parametrize("name", ["resnet", "vit", "registers", "channels last"])
def test_saliency_is_captums_to_the_bit(name: str) -> None:
    net, x = (resnet(), photo()) if name == "resnet" else (model(name), images(name))

    # nn.MultiheadAttention multiplies in another order where its parameters need no gradient.
    net.requires_grad_(False)

    wanted = captum.Saliency(net).attribute(x.clone().requires_grad_(), target=[1, 3], abs=False)

    assert torch.equal(attribute(net, x, "saliency", target=[1, 3]).values, wanted)


@oracle("integrated-gradients")
@pytest.mark.parametrize(
    "rule", [("midpoint", "riemann_middle"), ("gauss-legendre", "gausslegendre")]
)
@pytest.mark.parametrize("name", ["resnet", "vit"])
def test_integrated_gradients_are_captums(name: str, rule: tuple[str, str]) -> None:
    net, x = (resnet(), photo()) if name == "resnet" else (model(name), images(name))
    base = torch.full_like(x, 0.3)

    found = attribute(
        net, x, "integrated-gradients", target=[1, 3], reference=base, steps=12, rule=rule[0]
    )
    wanted, delta = captum.IntegratedGradients(net).attribute(
        x, base, target=[1, 3], n_steps=12, method=rule[1], return_convergence_delta=True
    )

    close(found.values, wanted.float(), 2e-6)
    scale = float(wanted.abs().sum())
    assert found.diagnostics["completeness_delta"] == pytest.approx(
        delta.tolist(), abs=1e-5 * scale
    )


@oracle("gradcam")
def test_grad_cam_is_captums() -> None:
    net, x = resnet(), photo()

    wanted = captum.LayerGradCam(net, net.layer4).attribute(x, target=[1, 3])

    close(attribute(net, x, "gradcam", target=[1, 3], layer="layer4").values, wanted[:, 0], 1e-6)


@oracle("guided-backprop", "deconvnet")
@pytest.mark.parametrize(
    ("method", "theirs"), [("guided-backprop", "GuidedBackprop"), ("deconvnet", "Deconvolution")]
)
def test_guided_methods_are_captums_where_rectifiers_are_modules(method: str, theirs: str) -> None:
    net, x = resnet(), photo()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wanted = getattr(captum, theirs)(resnet()).attribute(x.clone(), target=[1, 3])

    close(attribute(net, x, method, target=[1, 3]).values, wanted, 1e-6)


@oracle("guided-gradcam")
def test_guided_grad_cam_is_captums_with_a_bilinear_map() -> None:
    net, x = resnet(), photo()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        captums = resnet()
        wanted = captum.GuidedGradCam(captums, captums.layer3).attribute(
            x.clone(), target=[1, 3], interpolate_mode="bilinear"
        )

    close(attribute(net, x, "guided-gradcam", target=[1, 3], layer="layer3").values, wanted, 1e-6)


@oracle("occlusion")
def test_occlusion_is_captums() -> None:
    net, x = model("rectifiers"), images("rectifiers")

    found = attribute(net, x, "occlusion", target=[1, 3], window=4, stride=2, fill=0.5)
    wanted = captum.Occlusion(net).attribute(
        x, (3, 4, 4), strides=(3, 2, 2), baselines=0.5, target=torch.tensor([1, 3])
    )

    close(found.values, wanted[:, 0], 1e-5)


# --- re-derived ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("made", "prefix", "grid", "layer"),
    [
        (vit_small, 1, (4, 4), "encoder.layers.encoder_layer_2.ln_1"),
        (vit_registers, 5, (4, 6), "blocks.2.norm1"),
        (lambda: vit_registers(pool="mean"), 5, (4, 6), "norm"),
    ],
)
def test_grad_cam_of_a_transformer_weighs_its_patch_tokens(
    made: Any, prefix: int, grid: tuple[int, int], layer: str
) -> None:
    torch.manual_seed(2)
    net = made().double().eval()
    x = torch.randn(2, 3, 8 * grid[0], 8 * grid[1]).double()
    kept: list[Tensor] = []
    handle = net.get_submodule(layer).register_forward_hook(lambda _m, _i, out: kept.append(out))
    logits = net(x)
    handle.remove()
    (gradient,) = torch.autograd.grad(logits[:, 3].sum(), kept[0])
    tokens, gradient = kept[0][:, prefix:], gradient[:, prefix:]
    wanted = (tokens * gradient.mean(1, keepdim=True)).sum(2).view(2, *grid)

    found = attribute(net, x, "gradcam", target=3)

    assert found.layer == layer
    close(found.values, wanted, 1e-12)


def test_grad_cam_of_channels_last_maps_is_that_of_their_permutation() -> None:
    torch.manual_seed(2)
    net, x = channels_last().double().eval(), torch.randn(2, 3, 32, 32).double()

    found = attribute(net, x, "gradcam", target=3)

    maps = net.norm(net.layers(net.embed(x).permute(0, 2, 3, 1)))
    weight = net.head.weight[3] / (8 * 8)
    assert found.layer == "norm"
    close(found.values, (maps * weight).sum(3), 1e-12)


@oracle("ablationcam")
def test_ablation_cam_zeroes_one_channel_at_a_time() -> None:
    net, x = Rectifiers().double().eval(), images("rectifiers").double()
    whole = net(x)[:, 1]
    kept: list[Tensor] = []
    net.conv.register_forward_hook(lambda _m, _i, out: kept.append(out))
    net(x)
    maps, weights = kept[0], []
    for channel in range(6):
        handle = net.conv.register_forward_hook(
            lambda _m, _i, out, channel=channel: (
                out * (torch.arange(6) != channel).double().view(1, -1, 1, 1)
            )
        )
        weights.append((whole - net(x)[:, 1]) / whole.abs())
        handle.remove()
    wanted = (torch.stack(weights, 1)[..., None, None] * maps).sum(1)

    found = attribute(net, x, "ablationcam", target=1, layer="conv")

    assert found.diagnostics["prefix_once"]
    close(found.values, wanted, 1e-10)


def mobilenet(trained: bool) -> nn.Module:
    """MobileNetV2 with random weights; as trained, each norm has seen what it normalises."""
    torch.manual_seed(0)
    net = mobilenet_v2(10)
    if trained:
        for part in net.modules():
            if isinstance(part, nn.BatchNorm2d):
                part.momentum = None
        with torch.no_grad():
            net(torch.randn(8, 3, 32, 32))
    return net.eval()


def ablated(net: nn.Module, at: int, x: Tensor, target: int) -> Tensor:
    """Equation 3 in float64 for the first parts of MobileNetV2, by what comes after them."""
    parts = [*net.double().features[:18], *net.features[18]]
    after = nn.Sequential(*parts[at:])
    maps = nn.Sequential(*parts[:at])(x.double())

    def score(maps: Tensor) -> Tensor:
        # What follows may write to its input.
        return net.classifier(after(maps.clone()).mean((2, 3)))[:, target]

    less = maps * (1 - torch.eye(maps.shape[1], dtype=maps.dtype))[..., None, None]
    weights = (score(maps) - score(less)) / score(maps).abs()
    net.float()
    return (weights[:, None, None] * maps[0]).sum(0)


# pytorch-grad-cam 1.5.7 agrees where a layer's least value is exactly zero. At one with negative
# values, such as the linear bottlenecks here, it sets a channel to the least value less 1e7 instead
# of the paper's zero, and its maps are hundreds of times off.
@pytest.mark.parametrize(("layer", "parts"), [("features.17", 18), ("features.18", 21)])
def test_ablation_cam_of_a_mobilenet_is_the_papers_at_linear_layers_and_at_relu6(
    layer: str, parts: int
) -> None:
    net, x = mobilenet(trained=True), torch.randn(1, 3, 32, 32)

    found = attribute(net, x, "ablationcam", target=1, layer=layer)

    assert "notes" not in found.diagnostics
    with torch.no_grad():
        close(found.values[0].double(), ablated(net, parts, x, 1), 1e-4)


# Without training its activations die away: a channel moves the logit, which is the head's bias, by
# 1e-7 of itself. Two implementations then differ by 1.5 of the map, and both are rounding.
def test_an_ablation_below_the_rounding_is_called_noise() -> None:
    found = attribute(mobilenet(trained=False), torch.randn(1, 3, 32, 32), "ablationcam", target=1)

    (note,) = found.diagnostics["notes"]
    assert "rounding" in note


def test_ablation_cam_repeats_the_image_where_a_model_remembers_its_batch() -> None:
    class Remembers(Rectifiers):
        def forward(self, x: Tensor) -> Tensor:
            count = len(x)
            maps = torch.relu(self.last(self.stem(x)))
            return self.head(maps.view(count, -1))

    torch.manual_seed(0)
    net, x = Remembers().double().eval(), images("rectifiers").double()

    found = attribute(net, x, "ablationcam", target=1, layer="last")

    assert not found.diagnostics["prefix_once"]
    maps = net.last(net.stem(x))
    head = net.head.weight[1].view(8, 7, 7)
    lost = (maps.relu() * head).sum((2, 3))
    wanted = (lost / net(x)[:, 1, None].abs())[..., None, None] * maps
    close(found.values, wanted.sum(1), 1e-10)


@oracle("scorecam")
def test_score_cam_asks_for_the_image_under_each_channel() -> None:
    net, x = model("rectifiers").double(), images("rectifiers").double()
    maps = net.last(torch.relu(_before_last(net, x)))
    wanted = []
    for image, channels in zip(x, maps, strict=True):
        scores = []
        for channel in channels:
            mask = interpolate(channel[None, None], size=(16, 16), mode="bilinear")[0, 0]
            mask = (mask - mask.min()) / (mask.max() - mask.min())
            scores.append(net((image * mask)[None])[0, 2])
        weights = torch.stack(scores).softmax(0)
        wanted.append((weights[:, None, None] * channels).sum(0))

    found = attribute(net, x, "scorecam", target=2, layer="last")

    close(found.values, torch.stack(wanted), 1e-10)


def _before_last(net: nn.Module, x: Tensor) -> Tensor:
    x = net.act(net.stem(x))
    return x + net.conv(net.act(net.norm(x)))


class _Guided(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.clamp(min=0)

    @staticmethod
    def backward(ctx: Any, arriving: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return arriving.clamp(min=0) * (x > 0)


def guided_by_hand(net: nn.Module, x: Tensor, target: int) -> Tensor:
    leaf, act = x.clone().requires_grad_(), _Guided.apply
    out = act(net.stem(leaf))
    out = act(out + net.conv(act(net.norm(out))))
    out = act(net.last(out))
    return torch.autograd.grad(net.head(out.flatten(1))[:, target].sum(), leaf)[0]


@oracle("guided-backprop")
def test_guided_backprop_sees_functional_reused_and_in_place_rectifiers() -> None:
    net, x = model("rectifiers"), images("rectifiers")

    found = attribute(net, x, "guided-backprop", target=1)

    close(found.values, guided_by_hand(net, x, 1), 1e-6)
    assert found.diagnostics["rectifiers"] == 4


# --- what others get wrong ------------------------------------------------------------------------


def test_unlike_captum_a_functional_rectifier_is_not_passed_over() -> None:
    net, x = model("rectifiers"), images("rectifiers")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = captum.GuidedBackprop(model("rectifiers")).attribute(x.clone(), target=1)

    right = guided_by_hand(net, x, 1)

    assert (theirs - right).norm() > 0.05 * right.norm()


def test_unlike_captums_trapezoid_the_rules_weights_sum_to_one() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 2)).double()
    x = torch.randn(1, 3, 2, 2).double()
    change = float((net(x) - net(torch.zeros_like(x))).detach()[0, 1])

    theirs = captum.IntegratedGradients(net).attribute(
        x, target=1, n_steps=50, method="riemann_trapezoid"
    )
    ours = attribute(net, x, "integrated-gradients", target=1, steps=50)

    assert float(theirs.sum()) == pytest.approx(change * 49 / 50, rel=1e-6)
    assert float(ours.values.sum()) == pytest.approx(change, rel=1e-12)


@pytest.mark.parametrize("size", [1.0, 1e-6, 1e-12])
def test_grad_cam_plus_plus_has_no_epsilon(size: float) -> None:
    """One of 1e-6 changes a map beyond recognition once gradients are as small."""
    rng = np.random.default_rng(0)
    a, g = rng.standard_normal((2, 1, 3, 4, 4))
    g = g * size
    below = 2 * g**2 + a.sum((2, 3), keepdims=True) * g**3
    wanted = ((g**2 / below * g.clip(0)).sum((2, 3), keepdims=True) * a).sum(1)

    found = cams.gradcam_plus_plus_parts(*map(torch.from_numpy, (a, g))).sum(1)

    np.testing.assert_allclose(found, wanted, rtol=1e-9, atol=0)
    with_epsilon = ((g**2 / (below + 1e-6) * g.clip(0)).sum((2, 3), keepdims=True) * a).sum(1)
    if size < 1:
        assert np.abs(with_epsilon - wanted).max() > 0.1 * np.abs(wanted).max()


def test_grad_cam_plus_plus_is_neither_grad_cam_nor_its_wrong_denominators() -> None:
    rng = np.random.default_rng(1)
    a, g = rng.standard_normal((2, 1, 3, 4, 4))
    right = cams.gradcam_plus_plus_parts(*map(torch.from_numpy, (a, g))).sum(1).numpy()
    inside = 2 * g**2 + (a * g**3).sum((2, 3), keepdims=True)
    mean = 2 * g**2 + a.mean((2, 3), keepdims=True) * g**3

    for below in (inside, mean, np.ones_like(g)):
        wrong = ((g**2 / below * g.clip(0)).sum((2, 3), keepdims=True) * a).sum(1)
        assert np.abs(wrong - right).max() > 1e-2
    plain = cams.gradcam_parts(*map(torch.from_numpy, (a, g))).sum(1).numpy()
    assert np.abs(plain - right).max() > 1e-2


def test_the_last_blocks_output_of_a_class_token_model_would_be_an_empty_map() -> None:
    net, x = model("vit"), images("vit")

    empty = attribute(net, x, "gradcam", target=1, layer="encoder.layers.encoder_layer_2")
    auto = attribute(net, x, "gradcam", target=1)

    assert empty.values.abs().max() == 0
    assert auto.values.abs().max() > 0


def test_a_reused_module_is_read_at_its_last_call() -> None:
    net, x = model("rectifiers"), images("rectifiers")
    inner = net.norm(net.act(net.stem(x)))

    found = attribute(net, x, "eigencam", target=1, layer="act")

    points = torch.relu(inner).flatten(2).transpose(1, 2).detach()
    points = points - points.mean(1, keepdim=True)
    first = torch.linalg.svd(points, full_matrices=False)[2][:, :1]
    wanted = (points @ first.transpose(1, 2)).view(2, 16, 16)
    close(found.values.abs(), wanted.abs(), 1e-4)


def test_a_contrast_is_the_difference_of_two_maps() -> None:
    net, x = model("rectifiers"), images("rectifiers")

    a, b = (attribute(net, x, "hirescam", target=t, layer="last").values for t in (1, 2))
    found = attribute(net, x, "hirescam", target=1, versus=2, layer="last")

    close(found.values, a - b, 1e-5)
    scores = net(x).detach()
    assert found.diagnostics["scores"] == pytest.approx((scores[:, 1] - scores[:, 2]).tolist())


@pytest.mark.parametrize("chunk", [1, 3, 100])
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("integrated-gradients", {"steps": 7}),
        ("smoothgrad", {"samples": 5}),
        ("scorecam", {"layer": "last"}),
        ("ablationcam", {"layer": "last"}),
        ("occlusion", {"window": 5, "stride": 3}),
        ("rise", {"masks": 9}),
    ],
)
def test_chunks_change_nothing(method: str, options: dict[str, Any], chunk: int) -> None:
    net, x = model("rectifiers").double(), images("rectifiers").double()

    whole = attribute(net, x, method, target=1, **options)
    found = attribute(net, x, method, target=1, chunk=chunk, **options)

    close(found.values, whole.values, 1e-12)


def test_a_chunk_that_does_not_fit_is_tried_at_half_its_size(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    net, x = model("rectifiers"), images("rectifiers")
    wanted = attribute(net, x, "integrated-gradients", target=1, steps=8)
    forward = net.forward

    def small(images: Tensor) -> Tensor:
        if len(images) > 3:
            raise torch.OutOfMemoryError("no room")
        return forward(images)

    monkeypatch.setattr(net, "forward", small)
    found = attribute(net, x, "integrated-gradients", target=1, steps=8, chunk=16)

    close(found.values, wanted.values, 1e-5)
    assert any("out of memory" in note for note in found.diagnostics["notes"])


def test_references_are_defined_in_the_picture_and_normalised() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 2)).double()
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
    pixels = torch.rand((1, 3, 8, 8), generator=torch.Generator().manual_seed(0)).double()
    column = [torch.tensor(v).double().view(3, 1, 1) for v in (mean, std)]
    x = (pixels - column[0]) / column[1]
    weight = net[1].weight.detach()[1].view(3, 8, 8)

    for name, reference in (("black", 0.0), ("white", 1.0), ("mean", column[0])):
        found = attribute(
            net, x, "integrated-gradients", target=1, reference=name, mean=mean, std=std
        ).values
        torch.testing.assert_close(found[0], weight * (pixels[0] - reference) / column[1])
    blurred = attribute(net, x, "integrated-gradients", target=1, reference="blurred").values
    assert blurred.abs().max() > 1e-3
    random = attribute(
        net, x, "integrated-gradients", target=1, reference="random", draws=3, mean=mean, std=std
    )
    assert len(set(random.diagnostics["reference_spread"])) == 1
    again = attribute(
        net, x, "integrated-gradients", target=1, reference="random", draws=3, mean=mean, std=std
    )
    assert torch.equal(random.values, again.values)
