"""Layer-wise relevance propagation against zennit, float64 re-derivations and conservation."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import pytest
import torch
from architectures import resnet18, vit_small
from torch import Tensor, nn

from gradscope import attribute
from gradscope.errors import NotApplicableError, UsageError

from .forms import FORMS, Rectifiers, images, model, saved
from .oracles import oracle

PIXELS: dict[str, Any] = {"mean": (0.375, 0.5, 0.625), "std": (0.25, 0.25, 0.5)}
COMPOSITES = ("epsilon-plus", "epsilon-plus-flat", "epsilon-gamma-box", "epsilon-alpha2-beta1",
              "epsilon-alpha2-beta1-flat", "epsilon-gamma", "epsilon", "gamma")  # fmt: skip


def trained(net: nn.Module) -> nn.Module:
    """Batch norms that shift and scale."""
    generator = torch.Generator().manual_seed(5)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            for values, low, high in (
                (module.running_mean, -0.2, 0.2),
                (module.running_var, 0.5, 2.0),
                (module.weight.data, 0.5, 1.5),
                (module.bias.data, -0.2, 0.2),
            ):
                values.copy_(low + (high - low) * torch.rand(values.shape, generator=generator))
    return net.double().eval()


def close(found: Tensor, wanted: Tensor, tolerance: float = 1e-9) -> None:
    scale = float(wanted.abs().max())
    assert scale > 0
    torch.testing.assert_close(found, wanted.detach(), rtol=0, atol=tolerance * scale)


# --- zennit ---------------------------------------------------------------------------------------


@pytest.fixture
def zennit(monkeypatch: pytest.MonkeyPatch) -> None:
    """zennit; it imports torchvision for canonisers that are not used here."""
    if find_spec("zennit") is None:
        pytest.skip("zennit is not installed (extra: oracles)")
    if find_spec("torchvision") is None:
        blocks = ModuleType("torchvision.models.resnet")
        blocks.__dict__.update(Bottleneck=nn.Module, BasicBlock=nn.Module)
        monkeypatch.setitem(sys.modules, blocks.__name__, blocks)


def by_zennit(
    net: nn.Module, x: Tensor, target: int, composite: str, zero: list[str] | None = None
) -> Tensor:
    """zennit's attribution of one image, started from the logit as ours is."""
    from zennit import canonizers, composites, layer, rules, types

    class Residual(canonizers.AttributeCanonizer):  # type: ignore[misc]
        """Skips as sums that have a rule."""

        def __init__(self) -> None:
            super().__init__(self.attributes)

        @staticmethod
        def attributes(_name: str, module: nn.Module) -> dict[str, Any] | None:
            if type(module).__name__ != "BasicBlock":
                return None
            return {"forward": forward.__get__(module), "summed": layer.Sum()}

    def forward(self: Any, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        skip = x if self.downsample is None else self.downsample(x)
        return self.relu(self.summed(torch.stack([out, skip], -1)))

    class Merged(canonizers.SequentialMergeBatchNorm):  # type: ignore[misc]
        """zennit's leaves the norm's epsilon, so that what it merged still scales by 1 - 5e-6."""

        @staticmethod
        def merge_batch_norm(modules: Any, batch_norm: Any) -> None:
            canonizers.SequentialMergeBatchNorm.merge_batch_norm(modules, batch_norm)
            batch_norm.eps = 0.0

    canonisers = [canonizers.CompositeCanonizer([Merged(), Residual()])]
    mean, std = (torch.tensor(PIXELS[k], dtype=x.dtype).view(1, 3, 1, 1) for k in ("mean", "std"))
    box = {"low": (0 - mean) / std, "high": (1 - mean) / std}
    base = composites.layer_map_base()
    dense = (nn.Linear, rules.Epsilon())
    made = {
        "epsilon-plus": lambda: composites.EpsilonPlus(canonizers=canonisers, zero_params=zero),
        "epsilon-plus-flat": lambda: composites.EpsilonPlusFlat(canonizers=canonisers),
        "epsilon-gamma-box": lambda: composites.EpsilonGammaBox(**box, canonizers=canonisers),
        "epsilon-alpha2-beta1": lambda: composites.EpsilonAlpha2Beta1(canonizers=canonisers),
        "epsilon-alpha2-beta1-flat": lambda: composites.EpsilonAlpha2Beta1Flat(
            canonizers=canonisers
        ),
        "epsilon-gamma": lambda: composites.LayerMapComposite(
            [*base, (types.Convolution, rules.Gamma(0.25)), dense], canonizers=canonisers
        ),
        "epsilon": lambda: composites.LayerMapComposite(
            [*base, (types.Convolution, rules.Epsilon()), dense], canonizers=canonisers
        ),
        "gamma": lambda: composites.LayerMapComposite(
            [*base, (types.Linear, rules.Gamma(0.25))], canonizers=canonisers
        ),
    }
    leaf = x.clone().requires_grad_()
    with made[composite]().context(net) as changed:
        logits = changed(leaf)
        start = torch.zeros_like(logits)
        start[:, target] = logits[:, target].detach()
        return torch.autograd.grad(logits, leaf, start)[0]


@oracle("lrp")
@pytest.mark.usefixtures("zennit")
@pytest.mark.parametrize("composite", COMPOSITES)
def test_a_residual_networks_relevance_is_zennits(composite: str) -> None:
    torch.manual_seed(0)
    x = torch.randn((2, 3, 32, 32), generator=torch.Generator().manual_seed(1)).double()

    wanted = by_zennit(trained(resnet18(5)), x, 3, composite)
    torch.manual_seed(0)
    found = attribute(
        trained(resnet18(5)), x, "lrp", target=3, composite=composite, **PIXELS
    ).values

    close(found, wanted)


@pytest.mark.usefixtures("zennit")
def test_without_a_share_for_biases_it_is_zennits_with_zero_biases() -> None:
    torch.manual_seed(0)
    net, x = trained(resnet18(5)), images("vit").double()
    found = attribute(net, x, "lrp", target=3, biases=False)
    constants = found.diagnostics["relevance_of_constants"]

    close(found.values, by_zennit(net, x, 3, "epsilon-plus", ["bias"]))
    assert constants == pytest.approx([0, 0], abs=1e-12)


# --- re-derived -----------------------------------------------------------------------------------


def positive_part(x: Tensor, weight: Tensor, bias: Tensor, relevance: Tensor, **how: Any) -> Tensor:
    """The z+ rule of one convolution, as written in the paper: one product per pair of signs."""

    def conv(x: Tensor, w: Tensor) -> Tensor:
        return nn.functional.conv2d(x, w, **how)

    up, down = weight.clamp(min=0), weight.clamp(max=0)
    z = conv(x.clamp(min=0), up) + conv(x.clamp(max=0), down)
    z = z + bias.clamp(min=0).view(1, -1, 1, 1)
    each = relevance / (z + 1e-6)
    up, down = (nn.functional.conv_transpose2d(each, w, **how) for w in (up, down))
    return x.clamp(min=0) * up + x.clamp(max=0) * down


def test_relevance_of_a_pre_activation_skip_is_that_of_the_formulas_by_hand() -> None:
    """Functional, reused and in-place rectifiers, and a norm that folds into no layer."""
    net, x = trained(Rectifiers()), images("rectifiers", 1).double()
    with torch.no_grad():
        stem = net.stem(x)
        a = stem.relu()
        b = net.norm(a).relu()
        c = net.conv(b)
        d = (a + c).relu()
        last = net.last(d).relu().flatten(1)
        score = net.head(last)[:, 2]
        r = last * net.head.weight[2] * score / (score + torch.where(score < 0, -1e-6, 1e-6))
        r = r.view(1, 8, 7, 7)
        each = r / (_positive(net.last, d, stride=2) + 1e-6)
        r = d * nn.functional.conv_transpose2d(
            each, net.last.weight.clamp(min=0), stride=2, output_padding=1
        )
        total = a + c
        r = r / (total + torch.where(total < 0, -1e-6, 1e-6))
        skip, branch = a * r, c * r
        branch = positive_part(b, net.conv.weight, net.conv.bias, branch, padding=1)
        wanted = positive_part(x, net.stem.weight, net.stem.bias, skip + branch, padding=1)

    found = attribute(net, x, "lrp", target=2)

    close(found.values, wanted)


def _positive(conv: nn.Conv2d, x: Tensor, stride: int) -> Tensor:
    """What is positive in the results for an input without negative values."""
    return nn.functional.conv2d(x, conv.weight.clamp(min=0), conv.bias.clamp(min=0), stride=stride)


@pytest.mark.parametrize("composite", COMPOSITES)
def test_relevance_and_that_of_constants_add_up_to_the_score(composite: str) -> None:
    torch.manual_seed(0)
    net, x = trained(resnet18(5)), images("vit").double()

    found = attribute(net, x, "lrp", target=3, composite=composite, **PIXELS)

    scores = torch.tensor(found.diagnostics["scores"])
    constants = torch.tensor(found.diagnostics["relevance_of_constants"])
    total = found.values.sum((1, 2, 3)) + constants * scores
    torch.testing.assert_close(total, scores.double(), rtol=2e-4, atol=0)
    assert max(found.diagnostics["relative_delta"]) < 2e-4


def test_what_a_large_epsilon_swallows_is_told() -> None:
    net, x = trained(Rectifiers()), images("rectifiers").double()

    small = attribute(net, x, "lrp", target=1, composite="epsilon")
    large = attribute(net, x, "lrp", target=1, composite="epsilon", epsilon=0.5)

    assert max(small.diagnostics["relative_delta"]) < 1e-3
    assert min(large.diagnostics["relative_delta"]) > 0.05


def test_without_biases_nothing_goes_to_constants_and_all_arrives() -> None:
    torch.manual_seed(1)
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3, bias=False), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(6 * 49, 4, bias=False),
    ).double()  # fmt: skip
    x = images("rectifiers").double()

    found = attribute(net, x, "lrp", target=[0, 3], composite="epsilon", epsilon=0.0)

    scores = torch.tensor(found.diagnostics["scores"]).double()
    torch.testing.assert_close(found.values.sum((1, 2, 3)), scores, rtol=1e-4, atol=0)
    assert found.diagnostics["relevance_of_constants"] == pytest.approx([0, 0], abs=1e-12)


def test_a_contrast_starts_from_both_logits() -> None:
    net, x = trained(Rectifiers()), images("rectifiers").double()

    a, b = (attribute(net, x, "lrp", target=t).values for t in (1, 2))

    close(attribute(net, x, "lrp", target=1, versus=2).values, a - b)


def test_a_model_that_ends_in_a_softmax_is_explained_before_it() -> None:
    net, x = trained(Rectifiers()), images("rectifiers").double()
    wanted = attribute(net, x, "lrp", target=1)

    for last in (nn.Softmax(1), nn.LogSoftmax(1)):
        found = attribute(nn.Sequential(net, last), x, "lrp", target=1)
        close(found.values, wanted.values)
        assert max(found.diagnostics["relative_delta"]) < 1e-3


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("composite", ["epsilon-plus", "epsilon-gamma-box"])
def test_every_form_gives_the_relevance_of_the_module(form: str, composite: str) -> None:
    net, x = model("rectifiers"), images("rectifiers", 2)
    wanted = attribute(net, x, "lrp", target=[1, 2], composite=composite, **PIXELS).values

    other = saved(net, form, x[: 1 + ("dynamic" in form)])
    found = attribute(other, x, "lrp", target=[1, 2], composite=composite, **PIXELS).values

    close(found, wanted, 1e-5)


# --- what it cannot do is refused -----------------------------------------------------------------


class Sorting(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1).cumsum(1)[:, :4]


class WrittenInPart(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = x * 2
        y[:, 0] = y[:, 1] * 3
        return y.flatten(1)[:, :4]


@pytest.mark.parametrize(
    ("net", "said"),
    [
        (Sorting(), "no rule for the operator cumsum"),
        (WrittenInPart(), "a part was written in place"),
        (vit_small(), "use attention-lrp or relevance"),
    ],
)
def test_what_has_no_rule_is_named(net: nn.Module, said: str) -> None:
    with pytest.raises(NotApplicableError, match=said):
        attribute(net.eval(), images("vit"), "lrp", target=1)


def test_a_box_of_pixels_needs_the_pixels() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Rectifiers()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x * 2 - 1)

    x = images("rectifiers")
    with pytest.raises(UsageError, match="composite=epsilon-gamma"):
        attribute(Scaled().eval(), x, "lrp", composite="epsilon-gamma-box", **PIXELS)
    with pytest.raises(UsageError, match="mean= and std="):
        attribute(Rectifiers().eval(), x, "lrp", composite="epsilon-gamma-box")
    assert attribute(Scaled().eval(), x, "lrp", composite="epsilon-gamma").values.abs().max() > 0
