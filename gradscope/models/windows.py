"""Batches whose images differ from one image within a window only.

Convolutions and pools see but a neighbourhood, so that behind them, too, only a window differs,
which grows from layer to layer. It alone is computed for each image, and the rest once for all
(Nakandala et al. 2019, SIGMOD, doi:10.1145/3299869.3319874, without their approximations). Once
it is most of the map, or an operator comes that sees everything, the batch is a batch as any.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils._pytree import tree_map_only

#: Rows and columns of the upper left corner of a window.
Corner = tuple[int, int]
#: Windows that are more of a map than this are not worth their handling.
_MOST = 0.7


class Windowed(Tensor):
    """[M, C, H, W] that is ``base`` [1, C, H, W] but for ``parts`` [M, C, h, w] at ``corners``."""

    base: Tensor
    parts: Tensor
    corners: list[Corner]
    #: The numbers themselves, from when they were first needed.
    numbers: Tensor | None

    @staticmethod
    def __new__(  # noqa: D102  see the class
        cls, base: Tensor, parts: Tensor, corners: Sequence[Corner]
    ) -> Windowed:
        shape = (len(parts), *base.shape[1:])
        like = torch.empty(shape, device="meta", memory_format=_order(base))
        found: Windowed = torch.Tensor._make_wrapper_subclass(
            cls, shape, strides=like.stride(), dtype=base.dtype, device=base.device
        )
        found.base, found.parts, found.corners, found.numbers = base, parts, list(corners), None
        return found

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, _types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        keywords = kwargs or {}
        local = _LOCAL.get(function)
        found = None if local is None else local(function, *args, **keywords)
        if found is not None:
            return found
        args, keywords = tree_map_only(Windowed, _whole, (args, keywords))
        return function(*args, **keywords)


def _order(base: Tensor) -> torch.memory_format:
    last = base.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format


def _whole(x: Windowed) -> Tensor:
    """All numbers; from now on they are what is read and written."""
    if x.numbers is None:
        x.numbers = torch.empty(
            x.shape, dtype=x.dtype, device=x.device, memory_format=_order(x.base)
        )
        x.numbers.copy_(x.base.expand(x.shape))
        height, width = x.parts.shape[2:]
        for image, part, (top, left) in zip(x.numbers, x.parts, x.corners, strict=True):
            image[:, top : top + height, left : left + width] = part
    return x.numbers


def _windowed(*tensors: Any) -> bool:
    return all(type(t) is Windowed and t.numbers is None for t in tensors)


def _pulled(
    x: Windowed, corners: Sequence[Corner], size: Corner, around: Corner = (0, 0), fill: float = 0.0
) -> Tensor:
    """Windows [M, C, *size] at ``corners`` of the maps with ``around`` more of ``fill``."""
    if list(corners) == x.corners and tuple(size) == x.parts.shape[2:] and not any(around):
        return x.parts
    (down, across), (height, width) = around, size
    beyond = [max(0, max(c[axis] for c in corners) + size[axis] - x.shape[2 + axis] - around[axis])
              for axis in (0, 1)]  # fmt: skip
    base = pad(x.base, (across, beyond[1], down, beyond[0]), value=fill)[0]
    found = torch.empty(
        (len(x.parts), x.shape[1], height, width), dtype=x.dtype, device=x.device,
        memory_format=_order(x.base),
    )  # fmt: skip
    for image, part, (top, left), (y, x0) in zip(found, x.parts, corners, x.corners, strict=True):
        image.copy_(base[:, top : top + height, left : left + width])
        rows, mine = _overlap(y + down - top, part.shape[1], height)
        columns, my = _overlap(x0 + across - left, part.shape[2], width)
        image[:, rows, columns] = part[:, mine, my]
    return found


def _overlap(start: int, length: int, room: int) -> tuple[slice, slice]:
    """Where something that starts at ``start`` lies in a room, and which part of it does."""
    first, last = min(max(start, 0), room), min(max(start + length, 0), room)
    return slice(first, last), slice(first - start, last - start)


def _spread(
    spans: Sequence[Sequence[tuple[int, int]]], sides: Sequence[int]
) -> tuple[list[Corner], Corner] | None:
    """Windows of one size that hold each [first, last] of rows and of columns; None if too large.

    A window that would end beyond a side is shifted.
    """
    size = tuple(
        max(max(0, min(last, side - 1) - max(first, 0) + 1) for first, last in span)
        for span, side in zip(spans, sides, strict=True)
    )
    height, width = (max(1, length) for length in size)
    if height * width > _MOST * sides[0] * sides[1]:
        return None
    starts = (
        [min(max(first, 0), side - length) for first, _ in span]
        for span, side, length in zip(spans, sides, (height, width), strict=True)
    )
    return list(zip(*starts, strict=True)), (height, width)


def _through(
    x: Windowed, base: Tensor, kernel: Sequence[int], stride: Sequence[int],
    padding: Sequence[int], dilation: Sequence[int], fill: float,
    apply: Callable[[Tensor], Tensor],
) -> Windowed | None:  # fmt: skip
    """What slides over maps: ``base`` is its output of the base, ``apply`` it without padding."""
    reach = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
    spans = [
        [
            (-((reach[axis] - corner[axis] - padding[axis]) // stride[axis]),
             (corner[axis] + x.parts.shape[2 + axis] - 1 + padding[axis]) // stride[axis])
            for corner in x.corners
        ]
        for axis in (0, 1)
    ]  # fmt: skip
    found = _spread(spans, base.shape[2:])
    if found is None:
        return None
    corners, size = found
    needed = [(n - 1) * s + r + 1 for n, s, r in zip(size, stride, reach, strict=True)]
    places = [(top * stride[0], left * stride[1]) for top, left in corners]
    given = _pulled(x, places, (needed[0], needed[1]), (padding[0], padding[1]), fill)
    return Windowed(base, apply(given), corners)


def _convolution(
    function: Any, x: Any, weight: Tensor, bias: Tensor | None, stride: list[int],
    padding: list[int], dilation: list[int], transposed: bool, more: list[int], groups: int,
) -> Windowed | None:  # fmt: skip
    if not _windowed(x) or transposed:
        return None

    def slide(given: Tensor, around: list[int]) -> Tensor:
        found: Tensor = function(given, weight, bias, stride, around, dilation, False, more, groups)
        return found

    return _through(
        x, slide(x.base, padding), weight.shape[2:], stride, padding, dilation, 0.0,
        lambda given: slide(given, [0, 0]),
    )  # fmt: skip


def _pair(given: Sequence[int]) -> list[int]:
    return [given[0], given[-1]]


def _max_pool(
    function: Any, x: Any, kernel: list[int], stride: Sequence[int] = (),
    padding: Sequence[int] = (0,), dilation: Sequence[int] = (1,), ceil: bool = False,
) -> tuple[Windowed, Tensor] | None:  # fmt: skip
    if not _windowed(x):
        return None
    kernel, stride, padding, dilation = map(_pair, (kernel, stride or kernel, padding, dilation))
    base = function(x.base, kernel, stride, padding, dilation, ceil)[0]
    found = _through(
        x, base, kernel, stride, padding, dilation, -torch.inf,
        lambda given: function(given, kernel, stride, [0, 0], dilation)[0],
    )  # fmt: skip
    if found is None:
        return None
    # Where the maxima were is not known; reading it raises an error.
    return found, torch.empty(found.shape, dtype=torch.long, device="meta")


def _average_pool(
    function: Any, x: Any, kernel: list[int], stride: Sequence[int] = (),
    padding: Sequence[int] = (0,), ceil: bool = False, counted: bool = True,
    divisor: int | None = None,
) -> Windowed | None:  # fmt: skip
    kernel, stride, padding = map(_pair, (kernel, stride or kernel, padding))
    if not _windowed(x) or ceil or (any(padding) and not counted):
        return None
    base = function(x.base, kernel, stride, padding, False, True, divisor)
    return _through(
        x, base, kernel, stride, padding, [1, 1], 0.0,
        lambda given: function(given, kernel, stride, [0, 0], False, True, divisor),
    )  # fmt: skip


def _norm(function: Any, x: Any, *given: Any) -> tuple[Any, ...] | None:
    """A batch norm; one in training sees everything."""
    if not _windowed(x) or given[4] is True:
        return None
    base, *more = function(x.base, *given)
    return Windowed(base, function(x.parts, *given)[0], x.corners), *more


def _pointwise(function: Any, x: Any, *given: Any, **keywords: Any) -> Any:
    """Position by position, alike at all positions."""
    others = [value for value in given if isinstance(value, Tensor)]
    if not _windowed(x) or not all(map(_everywhere, others)):
        return None
    base, parts = function(x.base, *given, **keywords), function(x.parts, *given, **keywords)
    return x if function._schema.is_mutable else Windowed(base, parts, x.corners)


def _everywhere(other: Tensor) -> bool:
    """Whether a tensor has one number, or one for each channel."""
    sides = [1] * (4 - other.dim()) + list(other.shape)
    return type(other) is not Windowed and len(sides) == 4 and sides[0] == sides[2] == sides[3] == 1


def _together(function: Any, x: Any, y: Any, *given: Any, **keywords: Any) -> Any:
    """Two maps, position by position."""
    if not _windowed(x, y):
        return _pointwise(function, x, y, *given, **keywords) if _windowed(x) else None
    if x.shape != y.shape:
        return None
    found = _union([x, y])
    if found is None:
        return None
    first, second = (_pulled(t, *found) for t in (x, y))
    parts = function(first, second, *given, **keywords)
    base = function(x.base, y.base, *given, **keywords)
    if not function._schema.is_mutable:
        return Windowed(base, parts, found[0])
    x.parts, x.corners = parts, found[0]
    return x


def _union(maps: Sequence[Windowed]) -> tuple[list[Corner], Corner] | None:
    spans = [
        [
            (min(c[axis] for c in at),
             max(c[axis] + m.parts.shape[2 + axis] for c, m in zip(at, maps, strict=True)) - 1)
            for at in zip(*(m.corners for m in maps), strict=True)
        ]
        for axis in (0, 1)
    ]  # fmt: skip
    return _spread(spans, maps[0].shape[2:])


def _joined(function: Any, maps: list[Any], dimension: int = 0) -> Windowed | None:
    """Maps behind each other."""
    if dimension not in (1, -3) or not _windowed(*maps):
        return None
    found = _union(maps) if len({m.shape[2:] for m in maps}) == 1 else None
    if found is None:
        return None
    parts = function([_pulled(m, *found) for m in maps], 1)
    return Windowed(function([m.base for m in maps], 1), parts, found[0])


_aten: Any = torch.ops.aten
_LOCAL: Mapping[Any, Callable[..., Any]] = {
    _aten.convolution.default: _convolution,
    _aten.max_pool2d_with_indices.default: _max_pool,
    _aten.avg_pool2d.default: _average_pool,
    _aten.native_batch_norm.default: _norm,
    _aten._native_batch_norm_legit_no_training.default: _norm,
    _aten.cat.default: _joined,
    _aten.clone.default: _pointwise,
    **{
        getattr(_aten, name + end).default: _pointwise
        for name in ("relu", "hardtanh", "leaky_relu", "hardswish", "silu", "gelu", "elu",
                     "sigmoid", "tanh", "hardsigmoid", "clamp")
        for end in ("", "_")
        if hasattr(_aten, name + end)
    },
    **{
        getattr(_aten, name + end).Tensor: _together
        for name in ("add", "sub", "mul", "div")
        for end in ("", "_")
    },
}  # fmt: skip
