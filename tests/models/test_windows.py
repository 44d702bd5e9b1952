"""Batches that differ within windows: the same numbers as the batches themselves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._pytree import tree_map_only

from gradscope.models.windows import Windowed

#: The upper left corners of windows of 3 x 4: three corners of the image, and inside.
CORNERS = [(0, 0), (21, 0), (21, 15), (9, 7), (10, 8)]


def image() -> Tensor:
    return torch.randn(1, 3, 24, 19, generator=torch.Generator().manual_seed(1)).double()


def parts(size: tuple[int, int] = (3, 4)) -> Tensor:
    made = torch.randn(len(CORNERS), 3, *size, generator=torch.Generator().manual_seed(2))
    return made.double()


def windowed(base: Tensor | None = None) -> Windowed:
    return Windowed((image() if base is None else base).clone(), parts(), CORNERS)


def whole() -> Tensor:
    found = image().repeat(len(CORNERS), 1, 1, 1)
    for one, part, (top, left) in zip(found, parts(), CORNERS, strict=True):
        one[:, top : top + 3, left : left + 4] = part
    return found


class Net(nn.Module):
    """Layers in double precision, with norms that do something."""

    def __init__(self, use: Callable[..., Any], **layers: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.use, self.layers = use, nn.ModuleDict(layers)
        for part in self.modules():
            if isinstance(part, nn.BatchNorm2d) and part.running_var is not None:
                part.running_var.uniform_(0.5, 2)
        self.double().eval().requires_grad_(False)

    def forward(self, x: Tensor) -> Any:
        return self.use(x, *self.layers.values())


def check(net: Callable[[Tensor], Any]) -> None:
    with torch.no_grad():
        found = tree_map_only(
            Windowed, lambda t: t + torch.zeros(t.shape).double(), net(windowed())
        )
        torch.testing.assert_close(found, net(whole()), rtol=1e-10, atol=1e-11)


def stem(x: Tensor, first: Any, norm: Any, second: Any, third: Any) -> Any:
    """As residual networks begin."""
    x = functional.max_pool2d(norm(first(x)).relu_(), 3, 2, 1)
    y = second(x)
    y += x
    y = functional.relu(y, inplace=True)
    return third(y) + functional.avg_pool2d(y, 2), y


def dense_block(x: Tensor, first: Any, norm: Any, second: Any, third: Any) -> Any:
    """Maps behind each other, norms before convolutions."""
    x = first(x)
    x = torch.cat([x, second(norm(x).relu())], 1)
    return third(functional.avg_pool2d(x, 3, 2, 1))


def test_the_beginning_of_a_residual_network() -> None:
    check(Net(stem, a=nn.Conv2d(3, 8, 5, 2, 2), b=nn.BatchNorm2d(8),
              c=nn.Conv2d(8, 8, 3, padding=1), d=nn.Conv2d(8, 8, 2, 2)))  # fmt: skip


def test_maps_behind_each_other_and_norms_before_convolutions() -> None:
    check(Net(dense_block, a=nn.Conv2d(3, 8, 3), b=nn.BatchNorm2d(8),
              c=nn.Conv2d(8, 4, 3, padding=1), d=nn.Conv2d(12, 4, 3)))  # fmt: skip


@pytest.mark.parametrize(
    "layer",
    [nn.Conv2d(3, 6, 3, groups=3), nn.Conv2d(3, 3, 3, stride=2, dilation=2, padding=3),
     nn.Conv2d(3, 3, (1, 5), (2, 3), (0, 4), bias=False), nn.Conv2d(3, 2, 2, stride=4),
     nn.Conv2d(3, 2, 1, stride=3, padding=2), nn.Conv2d(3, 2, 3, padding="same"),
     nn.Conv2d(3, 2, 3, padding=2, padding_mode="reflect"), nn.ConvTranspose2d(3, 2, 3, 2),
     nn.Conv2d(3, 2, (24, 19)),
     nn.MaxPool2d(3, 2, 1, ceil_mode=True), nn.MaxPool2d(2, padding=1, dilation=2),
     nn.MaxPool2d((5, 2), (3, 1), (2, 0)), nn.AvgPool2d(3, 2, 1), nn.AvgPool2d(2, ceil_mode=True),
     nn.AvgPool2d(3, 2, 1, count_include_pad=False), nn.AvgPool2d(2, divisor_override=3),
     nn.AdaptiveAvgPool2d(4), nn.AdaptiveMaxPool2d(3), nn.BatchNorm2d(3), nn.InstanceNorm2d(3),
     nn.GroupNorm(1, 3), nn.Upsample(scale_factor=2), nn.ZeroPad2d(2),
     nn.ReLU6(), nn.SiLU(inplace=True), nn.PReLU(3), nn.Softmax2d(), nn.Flatten(),
     nn.LocalResponseNorm(2), nn.Dropout(0.5), nn.Identity()],
    ids=str,
)  # fmt: skip
def test_every_layer(layer: nn.Module) -> None:
    check(Net(lambda x, layer: layer(x), a=layer))
    check(Net(lambda x, before, layer: layer(before(x)), b=nn.Conv2d(3, 3, 3, padding=1), a=layer))


@pytest.mark.parametrize(
    "use",
    [lambda x: (x - x.new_tensor([0.1, 0.2, 0.3]).view(3, 1, 1)) / 0.5,
     lambda x: (x * 2 + 1).relu_().mul_(x),
     lambda x: x + x, lambda x: x - x.mean(), lambda x: x * x.mean((2, 3), keepdim=True),
     lambda x: x + torch.ones(24, 19).double(), lambda x: 1 - x,
     lambda x: functional.max_pool2d((x * 1) * x.mean((2, 3), keepdim=True), 3),
     lambda x: functional.batch_norm(x, None, None, training=True),
     lambda x: x.add_(x), lambda x: x + x.flip(2), lambda x: torch.cat([x, x.relu()], 1),
     lambda x: torch.cat([x, x], 2), lambda x: x.permute(0, 2, 3, 1) @ torch.ones(3, 2).double(),
     lambda x: functional.avg_pool2d(x, 3, 1) + x[:, :, 1:-1, 1:-1],
     lambda x: (x.clamp(-0.5, 0.5), x.argmax(1), x.sum())],
)  # fmt: skip
def test_arithmetic(use: Callable[[Tensor], Any]) -> None:
    check(use)


def written_after_a_view(x: Tensor) -> Any:
    x = x.relu()
    view = x[:, 0]
    x.mul_(3)
    view.add_(1)
    return x, view


def written_through_a_view(x: Tensor) -> Any:
    x = x.relu()
    x[:, :, 2:5] = 7
    return functional.max_pool2d(x, 2), x


def written_in_another_window(x: Tensor) -> Any:
    y = functional.avg_pool2d(x, 3, 1, 1)
    x = x * 1
    x += y
    y.mul_(2)
    return x, y


@pytest.mark.parametrize(
    "use", [written_after_a_view, written_through_a_view, written_in_another_window]
)
def test_writing(use: Callable[[Tensor], Any]) -> None:
    check(use)


def test_only_windows_are_computed() -> None:
    layer = nn.Conv2d(3, 4, 3, padding=1).double().requires_grad_(False)
    found = layer(windowed())
    assert isinstance(found, Windowed)
    assert found.parts.shape == (5, 4, 5, 6)
    assert found.corners == [(0, 0), (19, 0), (19, 13), (8, 6), (9, 7)]
    assert isinstance(found + functional.relu(found), Windowed)
    # What differs nearly everywhere is a tensor as any.
    assert type(nn.Conv2d(3, 4, 21, padding=10).double()(windowed())) is Tensor


def test_the_image_is_not_written_to() -> None:
    base = image()
    x = Windowed(base, parts(), CORNERS).clone()
    x.relu_()
    x += x * 2
    x[:, 0] = 3
    assert torch.equal(base, image())


def test_where_maxima_were_is_not_told() -> None:
    _, places = functional.max_pool2d(windowed(), 2, return_indices=True)
    with pytest.raises(RuntimeError):
        places + torch.ones_like(image(), dtype=torch.long)


def test_channels_last_stay_last() -> None:
    layer = nn.Conv2d(3, 4, 3).double().requires_grad_(False)
    last = windowed(image().contiguous(memory_format=torch.channels_last))
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert layer(last).is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(layer(last) * 1.0 + torch.zeros(1).double(), layer(whole()))
