"""Models that cannot be differentiated: told before work, with the methods that do work."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import gradscope
from gradscope.attribution.methods import methods
from gradscope.errors import NotApplicableError, UsageError

from .forms import model

FREE = [m.name for m in methods().values() if m.differentiates is None]
FEW: dict[str, dict[str, Any]] = {"rise": {"masks": 3}, "occlusion": {"window": 4, "stride": 4}}


class Unrecorded(nn.Module):
    """Some of it runs under ``torch.no_grad()``."""

    def __init__(self, head_too: bool) -> None:
        super().__init__()
        self.net, self.head_too = conv_net(), head_too

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            maps = self.net[:3](x)
        with torch.set_grad_enabled(not self.head_too):
            return self.net[3:](maps)


class Rounded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = conv_net()

    def forward(self, x: Tensor) -> Tensor:
        return self.net((x * 8).to(torch.int32).float())


class AroundALinear(nn.Module):
    """The gradient finds a way around what has none: a part of it would be shown for the whole."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear = nn.Conv2d(3, 8, 3), nn.Linear(8, 8)
        self.head = nn.Parameter(torch.randn(8, 4))

    def forward(self, x: Tensor) -> Tensor:
        maps = self.conv(x).relu().permute(0, 2, 3, 1)
        return (maps + self.linear(maps)).mean((1, 2)) @ self.head


def conv_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 4),
    )  # fmt: skip


@pytest.fixture
def _quiet() -> Iterator[None]:
    """Quantisation in eager mode is deprecated, and what people have saved."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def dynamic(net: nn.Module) -> nn.Module:
    return torch.ao.quantization.quantize_dynamic(net.eval(), {nn.Linear}, dtype=torch.qint8)


def static(net: nn.Module) -> nn.Module:
    from torch.ao.quantization import DeQuantStub, QuantStub, convert, get_default_qconfig, prepare

    engine = next(
        e for e in ("x86", "qnnpack", "fbgemm") if e in torch.backends.quantized.supported_engines
    )
    torch.backends.quantized.engine = engine
    whole = nn.Sequential(QuantStub(), net, DeQuantStub()).eval()
    whole.qconfig = get_default_qconfig(engine)
    prepared = prepare(whole)
    prepared(image())
    return convert(prepared)


def through_a_file(script: torch.jit.ScriptModule) -> torch.jit.ScriptModule:
    file = io.BytesIO()
    torch.jit.save(script, file)
    file.seek(0)
    return torch.jit.load(file)


def image() -> Tensor:
    return torch.randn((1, 3, 12, 12), generator=torch.Generator().manual_seed(1))


CASES = {
    "no_grad": lambda: Unrecorded(True).eval(),
    "dynamic": lambda: dynamic(conv_net()),
    "dynamic traced": lambda: through_a_file(torch.jit.trace(dynamic(conv_net()), image())),
    "dynamic scripted": lambda: through_a_file(torch.jit.script(dynamic(conv_net()))),
    "dynamic inside": lambda: dynamic(AroundALinear()),
    "static": lambda: static(conv_net()),
    "static traced": lambda: through_a_file(torch.jit.trace(static(conv_net()), image())),
}


@pytest.mark.usefixtures("_quiet")
@pytest.mark.parametrize("case", CASES)
def test_a_model_without_a_gradient_is_told_with_what_works(case: str) -> None:
    net, x = CASES[case](), image()
    # The gradient at what follows the last quantised operator is whole.
    layer = "conv" if case == "dynamic inside" else "auto"

    for name in ("saliency", "integrated-gradients", "guided-backprop", "gradcam", "layercam"):
        with pytest.raises(NotApplicableError) as error:
            gradscope.attribute(net, x, name, layer=layer)
        why = "under torch.no_grad()" if case == "no_grad" else "it is quantised (quantized::"
        assert why in str(error.value)
        assert str(error.value).endswith(", ".join(FREE))


@pytest.mark.usefixtures("_quiet")
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", FREE)
def test_what_is_named_as_working_works(case: str, name: str) -> None:
    found = gradscope.attribute(CASES[case](), image(), name, **FEW.get(name, {}))

    assert torch.isfinite(found.values).all()
    assert float(found.values.abs().max()) > 0


def test_methods_that_cover_or_decompose_need_no_gradient() -> None:
    assert {"eigencam", "scorecam", "ablationcam", "occlusion", "rise"} <= set(FREE)
    assert not {"saliency", "gradcam", "guided-gradcam", "attention"} & set(FREE)


def test_a_frozen_trunk_leaves_the_layers_behind_it() -> None:
    net, x = Unrecorded(False).eval(), image()

    found = gradscope.attribute(net, x, "gradcam", layer="net.3", target=1)

    wanted = gradscope.attribute(net.net, x, "gradcam", layer="3", target=1)
    torch.testing.assert_close(found.values, wanted.values)
    with pytest.raises(NotApplicableError, match=r"under torch.no_grad\(\)"):
        gradscope.attribute(net, x, "saliency")


def test_a_step_through_integers_leaves_the_layers_behind_it() -> None:
    net = Rounded().eval()

    with pytest.raises(NotApplicableError, match="detached from the image"):
        gradscope.attribute(net, image(), "saliency")
    found = gradscope.attribute(net, image(), "gradcam", target=1)
    wanted = gradscope.attribute(net.net, (image() * 8).int().float(), "gradcam", target=1)
    assert torch.equal(found.values, wanted.values)


def test_an_operator_without_a_derivative_is_told() -> None:
    class Written(nn.Module):
        """Writes over what the derivative needs."""

        def __init__(self) -> None:
            super().__init__()
            self.net = conv_net()

        def forward(self, x: Tensor) -> Tensor:
            y = self.net(x)
            root = y.exp()
            total = root.sum(1, keepdim=True)
            root.mul_(0)
            return y + total

    with pytest.raises(NotApplicableError, match="cannot be differentiated"):
        gradscope.attribute(Written().eval(), image(), "saliency")


def test_one_method_that_cannot_read_the_model_does_not_cost_the_others(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        Image.new("RGB", (20, 20), (200, 30, 90)).save(tmp_path / name)

    report = gradscope.explain(
        model("rectifiers"), tmp_path, ["attention-rollout", "gradcam", "saliency"],
        preprocess="size=16x16", evaluated=True,
    )  # fmt: skip

    assert [e.method for e in report.result.explanations] == ["gradcam", "saliency"] * 2
    assert [(e.kind, e.message.split(":")[0]) for e in report.errors] == [
        ("unsupported", "attention-rollout")
    ]
    assert report.gate.exit_code == 3
    assert (report.coverage.analyzed, report.coverage.total) == (2, 2)
    assert set(report.result.explanations[0].diagnostics.agreement) == {"saliency"}


def test_a_model_without_maps_keeps_the_methods_that_read_no_layer(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8), (200, 30, 90)).save(tmp_path / "a.png")
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, 16), nn.ReLU(), nn.Linear(16, 4)).eval()

    report = gradscope.explain(net, tmp_path, ["gradcam", "saliency"], preprocess="size=8x8")

    assert [e.method for e in report.result.explanations] == ["saliency"]
    assert "no layer returns maps" in report.errors[0].message
    with pytest.raises(NotApplicableError, match="no layer returns maps"):
        gradscope.explain(net, tmp_path, "gradcam", preprocess="size=8x8")


def test_a_wrong_option_is_no_matter_of_the_model(tmp_path: Path) -> None:
    Image.new("RGB", (20, 20)).save(tmp_path / "a.png")

    with pytest.raises(UsageError, match="the stride has to be"):
        gradscope.explain(
            model("rectifiers"), tmp_path, ["gradcam", "occlusion"], stride=99,
            preprocess="size=16x16",
        )  # fmt: skip
