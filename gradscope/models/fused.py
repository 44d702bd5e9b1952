"""Passes without a graph, in which convolutions do what follows them, too.

A convolution waits until its output is read. If a rectifier or a sum reads it, oneDNN computes them
as one, with weights that are laid out for it once. This happens below autograd: modules,
TorchScript and exported programs are treated alike, and control flow stays the model's.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from gradscope.models.model import Forward, Tap

#: By the identity of weights: they themselves, their version, and how oneDNN wants them.
_Laid = dict[int, tuple["weakref.ref[Tensor]", int, Tensor | None]]
#: A name of oneDNN's and its numbers.
_Step = tuple[str, Sequence[float]]

_aten: Any = torch.ops.aten
_onednn: Any = torch.ops.mkldnn
#: What oneDNN can do to an output: its name there, and the numbers that are not given.
_STEPS: Mapping[str, _Step] = {
    "relu": ("relu", ()),
    "hardtanh": ("hardtanh", (-1.0, 1.0)),
    "leaky_relu": ("leaky_relu", (0.01,)),
    "hardswish": ("hardswish", ()),
    "silu": ("swish", ()),
}
#: The same by operator, and whether that writes to its input.
_AFTER: Mapping[Any, tuple[_Step, bool]] = {
    getattr(_aten, name + "_" * written).default: (step, bool(written))
    for name, step in _STEPS.items()
    for written in (0, 1)
}
_ADD = {_aten.add.Tensor: False, _aten.add_.Tensor: True}
_CONVOLUTION = _aten.convolution.default


def fused(forward: Forward) -> Forward | None:
    """The pass of a model whose inputs need no gradient, fused; None where oneDNN is missing."""
    if not torch.backends.mkldnn.is_available():
        return None
    laid: _Laid = {}

    def passed(inputs: Tensor, taps: Mapping[str, Tap]) -> Any:
        with _Fusing(laid) as mode:
            answer = forward(inputs, {name: _reading(tap) for name, tap in taps.items()})
            mode.settle()
        return tree_map_only(_Waiting, _read, answer)

    return passed


def _reading(tap: Tap) -> Tap:
    return lambda output: tap(_read(output))


@dataclass(eq=False, slots=True, weakref_slot=True)
class _Work:
    """A convolution of images with the channels last, and what is done to its output."""

    #: Images, weight, bias, padding, stride, dilation and groups.
    convolution: tuple[Any, ...]
    laid: _Laid
    added: Tensor | None = None
    after: _Step | None = None
    #: The same without the last step, while that can still be read, and the step.
    before: tuple[weakref.ref[_Work], Callable[[Tensor], Tensor]] | None = None
    value: Tensor | None = None

    def done(self) -> Tensor:
        """The output, computed once."""
        if self.value is None:
            before, step = self.before or (None, None)
            earlier = before and before()
            self.value = step(earlier.done()) if step and earlier else self._computed()
            # What was read can go.
            self.convolution, self.added = (), None
        return self.value

    def _computed(self) -> Tensor:
        inputs, weight, *rest = self.convolution
        given = _laid_out(self.laid, weight, inputs.shape, *rest[1:]), *rest
        name, numbers = self.after or (None, ())
        found: Tensor
        if self.added is None:
            found = _onednn._convolution_pointwise(inputs, *given, name or "none", numbers, "")
        else:
            found = _onednn._convolution_pointwise.binary(
                inputs, self.added, *given, "add", 1.0, name, numbers, ""
            )
        return found


def _laid_out(laid: _Laid, weight: Tensor, shape: Sequence[int], *geometry: Any) -> Tensor:
    """A weight as oneDNN wants it, from the second time on: some models make theirs anew."""
    key, version = id(weight), weight._version
    known = laid.get(key)
    if known is not None and known[1] == version and known[2] is not None:
        return known[2]
    if known is None:
        laid[key] = weakref.ref(weight, lambda _: laid.pop(key, None)), version, None
        return weight
    arrange: Any = torch._C._nn.mkldnn_reorder_conv2d_weight
    arranged: Tensor = arrange(weight.to_mkldnn(), *geometry, list(shape))
    laid[key] = known[0], version, arranged
    return arranged


class _Waiting(Tensor):
    """Stands for the output of work that waits."""

    work: _Work

    @staticmethod
    def __new__(cls, work: _Work, shape: Sequence[int]) -> _Waiting:
        _, channels, height, width = shape
        found: _Waiting = torch.Tensor._make_wrapper_subclass(
            cls, shape, strides=(channels * height * width, 1, channels * width, channels)
        )
        found.work = work
        return found

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return _plainly(function, types, args, kwargs or {})


def _plainly(function: Any, types: Any, args: Any, keywords: Any) -> Any:
    if types:
        args, keywords = tree_map_only(_Waiting, _read, (args, keywords))
    return function(*args, **keywords)


def _read(tensor: Any) -> Any:
    """The numbers of a tensor that may wait."""
    if type(tensor) is not _Waiting:
        return tensor
    found = tensor.work.done()
    if found.stride() != tensor.stride():
        # Where a dimension has one element, any stride will do; views go by those that were told.
        found = torch.empty_strided(found.shape, tensor.stride(), dtype=found.dtype).copy_(found)
        tensor.work.value = found
    return found


class _Fusing(TorchDispatchMode):
    """Lets convolutions wait."""

    def __init__(self, laid: _Laid) -> None:
        super().__init__()
        self.laid = laid
        self.waiting: list[weakref.ref[_Work]] = []

    def settle(self) -> None:
        """Compute whatever waits and can still be read."""
        for reference in self.waiting:
            work = reference()
            if work is not None:
                work.done()
        self.waiting.clear()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        found = None
        if function is _CONVOLUTION:
            found = self._convolution(*args)
        elif function in _AFTER and type(args[0]) is _Waiting:
            (name, numbers), written = _AFTER[function]
            after = name, [float(number) for number in args[1:] or numbers]
            found = self._next(function, args, written, (args[0].work.added, after))
        elif types and function in _ADD and not kwargs:
            found = self._add(function, args)
        if found is not None:
            return found
        if self.waiting and function._schema.is_mutable:
            # What waits has to see its inputs as they are now.
            self.settle()
        return _plainly(function, types, args, kwargs or {})

    def _convolution(
        self, inputs: Tensor, weight: Tensor, bias: Tensor | None, stride: list[int],
        padding: list[int], dilation: list[int], transposed: bool, _more: Any, groups: int,
    ) -> Tensor | None:  # fmt: skip
        inputs = _read(inputs)
        if transposed or not _suits(inputs, weight) or (bias is not None and bias.requires_grad):
            return None
        count, _, height, width = inputs.shape
        channels, _, tall, wide = weight.shape
        down = (height + 2 * padding[0] - dilation[0] * (tall - 1) - 1) // stride[0] + 1
        across = (width + 2 * padding[1] - dilation[1] * (wide - 1) - 1) // stride[1] + 1
        if down < 1 or across < 1:
            return None
        work = _Work((inputs, weight, bias, padding, stride, dilation, groups), self.laid)
        return _Waiting(self._waits(work), (count, channels, down, across))

    def _add(self, function: Any, args: tuple[Any, ...]) -> Tensor | None:
        output, other = args
        if not isinstance(other, Tensor) or output.shape != other.shape:
            return None
        if not _ADD[function] and type(output) is not _Waiting:
            output, other = other, output
        other = _read(other)
        if other.dtype != output.dtype or other.requires_grad:
            return None
        # Nothing is added twice; a tensor that was added to itself is read by now.
        if type(output) is not _Waiting or output.work.added is not None:
            return None
        return self._next(function, (output, other), _ADD[function], (other, None))

    def _next(
        self, function: Any, args: tuple[Any, ...], written: bool,
        more: tuple[Tensor | None, _Step | None],
    ) -> Tensor | None:  # fmt: skip
        """The convolution with one more step; None where it cannot take that."""
        output: _Waiting = args[0]
        rest, work = args[1:], output.work
        if work.value is not None or work.after:
            return None
        added, after = more
        # Of sums oneDNN knows no other step.
        if added is not None and after is not None and after[0] != "relu":
            return None
        if written:
            output.work = self._waits(_Work(work.convolution, self.laid, *more))
            return output
        before = weakref.ref(work), lambda value: function(value, *rest)
        return _Waiting(
            self._waits(_Work(work.convolution, self.laid, *more, before)), output.shape
        )

    def _waits(self, work: _Work) -> _Work:
        self.waiting.append(weakref.ref(work))
        return work


def _suits(inputs: Tensor, weight: Tensor) -> bool:
    """Images in the order and type that are fused, and that need no graph."""
    return (
        type(inputs) is Tensor
        and inputs.dim() == 4
        and inputs.dtype == weight.dtype == torch.float32
        and inputs.numel() > 0
        and not inputs.requires_grad
        and not weight.requires_grad
        and inputs.is_contiguous(memory_format=torch.channels_last)
    )
