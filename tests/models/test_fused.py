"""Convolutions that take along what follows them: the same numbers, whoever reads or writes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from gradscope.models import fused as module
from gradscope.models.fused import fused


class Net(nn.Module):
    """Two convolutions and a function of them."""

    def __init__(self, use: Callable[[Tensor, nn.Module, nn.Module], Any], **more: Any) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.use = use
        self.first = nn.Conv2d(16, 16, 3, padding=1, **more)
        self.second = nn.Conv2d(16, 16, 1, bias=False)

    def forward(self, x: Tensor) -> Any:
        return self.use(x, self.first, self.second)


def x_of(shape: tuple[int, ...] = (3, 16, 7, 6)) -> Tensor:
    made = torch.randn(shape, generator=torch.Generator().manual_seed(5))
    return made.contiguous(memory_format=torch.channels_last)


def passes(net: nn.Module) -> tuple[Callable[[Tensor], Any], Callable[[Tensor], Any]]:
    """A model as it is, and fused."""
    for parameter in net.parameters():
        parameter.requires_grad_(False)
    found = fused(lambda x, _: net(x))
    assert found is not None
    return net, lambda x: found(x, {})


def check(net: nn.Module, x: Tensor) -> None:
    """Twice: weights are laid out the second time. What is given is left as it was."""
    whole, sooner = passes(net)
    with torch.no_grad():
        wanted = whole(x.clone(memory_format=torch.preserve_format))
        for _ in range(3):
            given = x.clone(memory_format=torch.preserve_format)
            torch.testing.assert_close(sooner(given), wanted, rtol=1e-5, atol=1e-6)


def relu_read_raw(x: Tensor, first: Any, second: Any) -> Any:
    raw = first(x)
    return raw.relu(), second(raw), raw


def written_then_read(x: Tensor, first: Any, second: Any) -> Any:
    raw = first(x)
    return second(raw.relu_()), raw


def read_then_written(x: Tensor, first: Any, second: Any) -> Any:
    raw = first(x)
    other = second(raw)
    raw.relu_()
    return other + raw


def input_written(x: Tensor, first: Any, _second: Any) -> Any:
    found = first(x)
    x.mul_(-2)
    return found, x


def added_written(x: Tensor, first: Any, second: Any) -> Any:
    skip = x * 1
    found = first(x) + skip
    skip.zero_()
    return found.relu(), second(skip)


def view_written(x: Tensor, first: Any, _second: Any) -> Any:
    raw = first(x)
    raw[:, 0] = 1
    part = raw.flatten(2)
    raw.relu_()
    return part, raw


def summed_twice(x: Tensor, first: Any, second: Any) -> Any:
    return functional.relu(first(x) + x + second(x)) + 1


def itself(x: Tensor, first: Any, _second: Any) -> Any:
    raw = first(x)
    raw += raw
    return raw.relu() + raw


def into_another(x: Tensor, first: Any, second: Any) -> Any:
    held = second(x)
    held += first(x)
    y = x * 2
    y += first(x)
    return held.relu_(), y


def in_another_order(x: Tensor, first: Any, _second: Any) -> Any:
    return (first(x) + x.contiguous()).relu(), first(x) + x.transpose(2, 3).contiguous().transpose(
        2, 3
    )


def broadcast(x: Tensor, first: Any, second: Any) -> Any:
    return first(x) + x.mean((2, 3), keepdim=True), second(x) + 2, torch.add(first(x), x, alpha=3)


def rectified_twice(x: Tensor, first: Any, second: Any) -> Any:
    return functional.silu(first(x).relu()), functional.relu6(functional.silu(second(x))) + x


def told(x: Tensor, first: Any, _second: Any) -> Any:
    """A model that decides by what it sees."""
    raw = first(x)
    return raw.relu() if float(raw.sum()) > 1e9 else raw.mul(2).relu_()


def activated(function: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    return lambda x, first, second: function(second(function(first(x))) + x)


USES = [
    relu_read_raw, written_then_read, read_then_written, input_written, added_written, view_written,
    summed_twice, itself, into_another, in_another_order, broadcast,
    rectified_twice, told,
]  # fmt: skip
ACTIVATIONS = [
    functional.relu, functional.relu6, functional.silu, functional.hardswish, functional.gelu,
    lambda x: functional.leaky_relu(x, 0.2), functional.leaky_relu, functional.hardtanh,
    lambda x: functional.hardtanh(x, -0.5, 2.0), torch.sigmoid,
    lambda x: functional.relu(x, inplace=True), lambda x: functional.silu(x, inplace=True),
    lambda x: functional.relu6(x, inplace=True),
]  # fmt: skip


@pytest.mark.parametrize("use", USES)
def test_who_reads_and_who_writes_makes_no_difference(use: Callable[..., Any]) -> None:
    check(Net(use), x_of())


@pytest.mark.parametrize("function", ACTIVATIONS)
def test_rectifiers_of_all_kinds(function: Callable[[Tensor], Tensor]) -> None:
    check(Net(activated(function)), x_of())


@pytest.mark.parametrize(
    "more",
    [{"groups": 4}, {"groups": 2}, {"dilation": 2, "stride": 2}, {"padding_mode": "circular"}],
)
def test_convolutions_of_all_kinds(more: dict[str, Any]) -> None:
    check(Net(lambda x, first, second: (second(first(x).relu())).relu(), **more), x_of())


@pytest.mark.parametrize("shape", [(1, 16, 1, 1), (1, 16, 7, 1), (2, 16, 1, 5), (16, 7, 6)])
def test_sizes_of_one(shape: tuple[int, ...]) -> None:
    x = x_of(shape) if len(shape) == 4 else torch.randn(shape)
    check(Net(lambda x, first, second: second(first(x).relu()).flatten(1)), x)


def test_what_has_another_form_is_left_to_torch() -> None:
    check(Net(activated(functional.relu)).double(), x_of().double())
    check(nn.Sequential(nn.Conv1d(2, 3, 2), nn.ReLU()), torch.randn(2, 2, 5))
    check(nn.Sequential(nn.ConvTranspose2d(16, 3, 2), nn.ReLU(), nn.Conv2d(3, 2, 2)), x_of())
    check(Net(activated(functional.relu)), x_of().contiguous())


def test_a_rectifier_and_a_sum_are_done_with_the_convolution(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    done: list[str] = []
    real = module._onednn

    class Counting:
        class _convolution_pointwise:  # noqa: N801  named as in torch
            def __new__(cls, *args: Any) -> Any:
                done.append(str(args[-3]))
                return real._convolution_pointwise(*args)

            @staticmethod
            def binary(*args: Any) -> Any:
                done.append(f"{args[-5]} {args[-3]}")
                return real._convolution_pointwise.binary(*args)

    monkeypatch.setattr(module, "_onednn", Counting)
    check(Net(activated(functional.relu)), x_of())

    assert done == ["relu", "add relu"] * 3


def test_weights_that_are_made_anew_in_each_pass_are_not_kept() -> None:
    class Standardised(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return functional.conv2d(x, self.weight - self.weight.mean(), self.bias)

    net = Standardised(16, 16, 3)
    net.requires_grad_(False)
    laid: dict[int, Any] = {}
    with torch.no_grad():
        for _ in range(5):
            with module._Fusing(laid) as mode:
                net(x_of())
                mode.settle()
    assert not laid


def test_weights_that_change_are_laid_out_again() -> None:
    net = Net(activated(functional.relu))
    whole, sooner = passes(net)
    with torch.no_grad():
        for _ in range(3):
            net.first.weight.mul_(-1.5)
            for _ in range(3):
                torch.testing.assert_close(sooner(x_of()), whole(x_of()), rtol=1e-5, atol=1e-6)


def test_taps_see_numbers_and_may_replace_them() -> None:
    net = Net(lambda x, first, second: second(first(x)).relu())
    net.requires_grad_(False)
    kinds: list[type] = []

    def forward(x: Tensor, taps: Any) -> Any:
        handle = net.first.register_forward_hook(lambda _m, _i, out: taps["first"](out))
        try:
            return net(x)
        finally:
            handle.remove()

    def tap(output: Tensor) -> Tensor:
        kinds.append(type(output))
        return output * 2

    sooner = fused(forward)
    assert sooner is not None
    with torch.no_grad():
        found = sooner(x_of(), {"first": tap})
        wanted = net.second(2 * net.first(x_of())).relu()
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    assert kinds == [Tensor]


def test_what_follows_a_tap_can_be_differentiated() -> None:
    net = Net(lambda x, first, second: second(first(x).relu()).relu().sum())
    net.requires_grad_(False)
    kept: list[Tensor] = []

    def forward(x: Tensor, taps: Any) -> Any:
        handle = net.first.register_forward_hook(lambda _m, _i, out: taps["first"](out))
        try:
            return net(x)
        finally:
            handle.remove()

    def tap(output: Tensor) -> Tensor:
        kept.append(output.detach().requires_grad_())
        return kept[-1].clone()

    sooner = fused(forward)
    assert sooner is not None
    found = torch.autograd.grad(sooner(x_of(), {"first": tap}), kept.pop())[0]
    wanted = torch.autograd.grad(forward(x_of(), {"first": tap}), kept.pop())[0]
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
