"""The private copy that answers for a model: the same numbers, and when it must not answer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from gradscope import attribute
from gradscope.models.forms import as_model
from gradscope.models.model import Model
from gradscope.models.probe import held
from gradscope.models.quick import AGREES, quick

from ..attribution.forms import FORMS, images, model, saved


def normed(*more: nn.Module) -> nn.Sequential:
    """Convolutions with norms that do something."""
    torch.manual_seed(1)
    found = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), *more,
        nn.Conv2d(8, 6, 3, bias=False), nn.BatchNorm2d(6, affine=False), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4),
    )  # fmt: skip
    for part in found.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.running_mean.normal_()
            part.running_var.uniform_(0.5, 2)
    return found.eval()


@contextmanager
def copying(net: object, x: Tensor) -> Iterator[tuple[Model, Model]]:
    """The model, and one that has seen enough to be answered by its copy, if it has any."""
    whole = as_model(net)
    fast = quick(whole)
    with held(whole.module), torch.no_grad():
        for _ in range(20):
            fast.forward(x, {})
        yield whole, fast


def copied(fast: Model) -> bool:
    return getattr(fast.forward, "copy", None) is not None


def apart(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize("form", ["module", *FORMS])
def test_every_form_is_answered_by_a_copy_with_the_same_numbers(form: str) -> None:
    net, x = normed(), torch.randn(2, 3, 12, 12)
    held_form = net if form == "module" else saved(net, form, x)

    with copying(held_form, x) as (whole, fast):
        assert copied(fast)
        assert 0 < apart(fast.forward(x, {}), whole.forward(x, {})) <= AGREES


@pytest.mark.parametrize("name", ["rectifiers", "channels last"])
def test_skips_in_place_rectifiers_and_channels_last_are_copied_too(name: str) -> None:
    x = images(name)

    with copying(model(name), x) as (whole, fast):
        assert copied(fast)
        assert apart(fast.forward(x, {}), whole.forward(x, {})) <= AGREES


@pytest.mark.parametrize("form", ["module", "traced", "export"])
@pytest.mark.parametrize("layer", ["0", "1", "2", "3", "4"])
def test_a_tapped_layer_gives_what_it_gives_in_the_model(form: str, layer: str) -> None:
    net, x = normed(), torch.randn(2, 3, 12, 12)
    seen: dict[str, Tensor] = {}

    def keep(key: str, output: Tensor) -> None:
        seen[key] = output.clone()

    with copying(net if form == "module" else saved(net, form, x), x) as (whole, fast):
        assert copied(fast)
        for key, one in (("whole", whole), ("fast", fast)):
            one.forward(x, {layer: partial(keep, key)})

    assert apart(seen["fast"], seen["whole"]) <= AGREES


class Branched(nn.Module):
    """The convolution's output is read by its norm and by a skip."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.second = nn.Conv2d(3, 4, 3)
        self.norm.running_var.fill_(3.0)

    def forward(self, x: Tensor) -> Tensor:
        found = self.first(x)
        return self.second(found + self.norm(found)).mean((2, 3))


class WrittenTo(Branched):
    """A rectifier in place lies between the convolution and the norm."""

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.norm(self.first(x).relu_())).mean((2, 3))


class Twice(Branched):
    """One convolution with a norm after its first call only."""

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(self.norm(self.first(x)))).mean((2, 3))


@pytest.mark.parametrize("made", [Branched, WrittenTo, Twice])
def test_a_norm_is_folded_only_where_it_alone_reads_the_convolution(
    made: Callable[[], nn.Module],
) -> None:
    torch.manual_seed(2)
    net, x = made().eval(), torch.randn(2, 3, 9, 9)

    with copying(net, x) as (whole, fast):
        assert apart(fast.forward(x, {}), whole.forward(x, {})) <= AGREES


def test_views_that_channels_last_does_not_allow_get_the_other_copy() -> None:
    class View(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.view(len(x), -1)[:, :, None, None].view_as(x)

    with copying(normed(View()), torch.randn(2, 3, 12, 12)) as (whole, fast):
        x = torch.randn(2, 3, 12, 12)
        assert copied(fast)
        assert apart(fast.forward(x, {}), whole.forward(x, {})) <= AGREES


def test_parameters_that_change_are_answered_by_the_model_until_they_are_back() -> None:
    net, x = normed(), torch.randn(2, 3, 12, 12)

    with copying(net, x) as (whole, fast):
        before = net[0].weight.detach().clone()
        net[0].weight.data.mul_(-1)
        assert torch.equal(fast.forward(x, {}), whole.forward(x, {}))
        net[0].weight.data.copy_(before)
        assert not torch.equal(fast.forward(x, {}), whole.forward(x, {}))


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_half_precision_is_answered_in_float32(kind: torch.dtype) -> None:
    x = torch.randn(2, 3, 12, 12)
    with copying(normed().to(kind), x) as (whole, fast):
        assert copied(fast)
        assert fast.forward(x, {}).dtype == torch.float32
        assert apart(fast.forward(x, {}), whole.forward(x, {})) <= AGREES


def test_a_replaced_forward_function_and_hooks_keep_their_say() -> None:
    net, x = normed(), torch.randn(2, 3, 12, 12)
    net[0].register_forward_hook(lambda _m, _i, out: out * 2)
    with copying(net, x) as (whole, fast):
        assert apart(fast.forward(x, {}), whole.forward(x, {})) <= AGREES

    net = normed()
    inner = net.forward
    net.forward = lambda x: inner(x) + 1  # type: ignore[method-assign]
    with copying(net, x) as (_, fast):
        assert not copied(fast)


def test_operators_that_are_watched_are_those_of_the_model() -> None:
    class Watching(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kw: Any = None):
            seen.append(function._schema.name)
            return function(*args, **(kw or {}))

    seen: list[str] = []
    with copying(normed(), torch.randn(2, 3, 12, 12)) as (_, fast):
        assert copied(fast)
        with Watching():
            fast.forward(torch.randn(2, 3, 12, 12), {})

    assert sum("batch_norm" in name for name in seen) >= 2


def test_the_model_is_left_as_it_was() -> None:
    net, x = normed(), torch.randn(2, 3, 12, 12)
    state = {k: (v.clone(), v.data_ptr(), v.stride()) for k, v in net.state_dict().items()}
    kinds = [type(part) for part in net.modules()]

    attribute(net, x, "smoothgrad", samples=20)

    for name, value in net.state_dict().items():
        before, pointer, stride = state[name]
        assert torch.equal(value, before)
        assert (value.data_ptr(), value.stride()) == (pointer, stride)
    assert [type(part) for part in net.modules()] == kinds
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in net.modules())


@pytest.mark.parametrize(
    ("method", "options"),
    [("integrated-gradients", {"steps": 32}), ("smoothgrad", {}), ("rise", {"masks": 40}),
     ("occlusion", {}), ("scorecam", {}), ("ablationcam", {}), ("guided-backprop", {})],
)  # fmt: skip
def test_exact_asks_the_model_itself_and_gives_the_same_map(
    method: str, options: dict[str, Any]
) -> None:
    net, x = model("rectifiers").double(), images("rectifiers", 4).double()
    calls: list[int] = []
    net.register_forward_hook(lambda *_: calls.append(1))

    found = [attribute(net, x, method, exact=exact, **options) for exact in (False, True)]

    # In float64 what is left is the difference of the formulas, not of the roundings.
    assert apart(found[0].values, found[1].values) <= 1e-9


def test_a_model_that_is_asked_again_keeps_its_copy() -> None:
    held_model, x = as_model(normed()), torch.randn(1, 3, 12, 12)
    found = [attribute(held_model, x, "smoothgrad", samples=20, target=1) for _ in range(2)]
    copy = held_model.lasting["quick"].copy

    assert copy is not None
    attribute(held_model, x, "gradcam", layer="5")
    assert held_model.lasting["quick"].copy is copy
    assert torch.equal(found[0].values, found[1].values)


def _one_number(net: nn.Sequential) -> None:
    with torch.no_grad():
        net[3].weight[5, 0, 1, 1] += 2


def _two_filters(net: nn.Sequential) -> None:
    net[3].weight.data[[1, 2]] = net[3].weight.data[[2, 1]]


def _filter(net: nn.Sequential) -> None:
    net[3].weight.data[5] *= -3


def _by_numpy(net: nn.Sequential) -> None:
    net[3].weight.detach().numpy()[:] *= -1


def _other_memory(net: nn.Sequential) -> None:
    net[3].weight.data = -net[3].weight.data


def _step(net: nn.Sequential) -> None:
    with torch.no_grad():
        net[3].weight.mul_(-1)


def _mean(net: nn.Sequential) -> None:
    net[1].running_mean.data[4] = 3


def _parameter(net: nn.Sequential) -> None:
    net[3].weight = nn.Parameter(-net[3].weight.detach())


def _module(net: nn.Sequential) -> None:
    net[2] = nn.Tanh()


def _setting(net: nn.Sequential) -> None:
    setattr(net[0], "dilation", (2, 2))  # noqa: B010


def _hook(net: nn.Sequential) -> None:
    net[0].register_forward_hook(lambda _m, _i, out: out.sin())


def _function(net: nn.Sequential) -> None:
    net[2].forward = torch.sin


@pytest.mark.parametrize(
    "change",
    [_one_number, _two_filters, _filter, _by_numpy, _other_memory, _step, _mean, _parameter,
     _module, _setting, _hook, _function],
)  # fmt: skip
def test_a_model_that_was_changed_is_not_answered_by_its_old_copy(
    change: Callable[[nn.Sequential], None],
) -> None:
    net, x = normed(), torch.randn(1, 3, 12, 12)
    held_model = as_model(net)
    attribute(held_model, x, "smoothgrad", samples=20, target=1)
    assert held_model.lasting["quick"].copy is not None
    before = attribute(held_model, x, "saliency", target=1).values

    change(net)

    found, exact = (
        attribute(held_model, x, "saliency", target=1, exact=e).values for e in (False, True)
    )
    assert apart(found, exact) <= AGREES
    assert apart(found, before) > 10 * AGREES
