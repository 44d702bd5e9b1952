"""The operators by which a model of any form computed its output, each with what went into it.

Relevance, and differences from a reference, are passed backwards by rules of their own rather than
by derivatives. What they need is recorded where all forms of a model meet: below autograd, operator
by operator, so that functions, modules, TorchScript and exported programs look alike. An operator
that writes in place is recorded as the one that returns its result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from gradscope.errors import NotApplicableError
from gradscope.models.model import Model
from gradscope.models.scores import Head
from gradscope.models.storages import storage_of, tensors_in

#: Where a tensor lies. Tells values apart, where Python objects do not: a view may be another one.
Place = tuple[int, int, tuple[int, ...], tuple[int, ...], torch.dtype]
#: What is passed from a step's results (None where nothing arrived) to the tensors it took.
Through = Callable[["Step", list[Tensor | None]], Sequence[Tensor]]


@dataclass(frozen=True, eq=False)
class Step:
    """One operator: what it was called with, and which values it took and gave."""

    function: Any
    #: Arguments and keywords, flattened; tensors as they were before anything wrote to them.
    leaves: list[Any]
    spec: TreeSpec
    #: The value at each of the leaves that depends on the image.
    inputs: Mapping[int, int]
    outputs: tuple[int, ...]

    @property
    def name(self) -> str:
        """The operator's name, without its overload."""
        return name_of(self.function)

    @property
    def arguments(self) -> list[Any]:
        """The positional arguments."""
        return list(tree_unflatten(self.leaves, self.spec)[0])

    @property
    def taken(self) -> list[Tensor]:
        """The tensors that depend on the image."""
        return [self.leaves[at] for at in self.inputs]

    @cached_property
    def results(self) -> list[Tensor]:
        """What it returned, computed again."""
        with torch.no_grad():
            return self.apply(self.taken)

    def apply(self, taken: Sequence[Tensor]) -> list[Tensor]:
        """What it returns for other tensors in the place of those taken."""
        leaves = list(self.leaves)
        for at, tensor in zip(self.inputs, taken, strict=True):
            leaves[at] = tensor
        arguments, keywords = tree_unflatten(leaves, self.spec)
        return list(_floats(self.function(*arguments, **keywords)))

    def pull(self, cotangents: Sequence[Tensor | None]) -> list[Tensor]:
        """Cotangents of the results, pulled back to the tensors taken by the derivative."""
        with torch.enable_grad():
            taken = [t.detach().requires_grad_() for t in self.taken]
            pairs = zip(self.apply(taken), cotangents, strict=True)
            results, given = zip(*((r, c) for r, c in pairs if c is not None), strict=True)
        return list(
            torch.autograd.grad(results, taken, given, allow_unused=True, materialize_grads=True)
        )


@dataclass(frozen=True, eq=False, slots=True)
class Tape:
    """A forward pass: its steps in order, and the values that the image and the logits have."""

    steps: tuple[Step, ...]
    image: int
    answer: int
    #: [N, K]; only the first row is that of the image.
    logits: Tensor
    head: Head

    def back(self, start: Mapping[int, Tensor], through: Through) -> Tensor:
        """What ``through`` passes backwards from step to step to the image [N, C, H, W].

        ``start`` is what there is at the beginning, by value. What several steps pass to one value
        is added. Raises NotApplicableError if nothing arrives.
        """
        arrived = dict(start)
        for step in reversed(self.steps):
            given = [arrived.pop(value, None) for value in step.outputs]
            if any(part is not None for part in given):
                for value, part in zip(step.inputs.values(), through(step, given), strict=True):
                    arrived[value] = arrived[value] + part if value in arrived else part
        if self.image not in arrived:
            raise NotApplicableError("the score does not depend on the image")
        return arrived[self.image]


def record(model: Model, image: Tensor) -> Tape:
    """The tape of a held model's pass over an image [1, C, H, W].

    Raises NotApplicableError where a tensor is written in place in part, since the rest of it is
    then another value under the same name.
    """
    batch = model.batch or 1
    # A leaf that requires a gradient keeps nn.MultiheadAttention off its fused fast path.
    leaf = image.expand(batch, *image.shape[1:]).detach().clone().requires_grad_()
    recorder = _Recorder()
    image_value = recorder.number(leaf)
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), recorder:
        scores = model.scores(model.forward(leaf, {}))
    logits = scores.values
    answer = recorder.numbers.get(_place(logits))
    if answer is None:
        raise NotApplicableError("the score does not depend on the image")
    # What is computed of the logits only tells what kind they are.
    last = next((i for i, s in enumerate(recorder.steps, 1) if answer in s.outputs), 0)
    steps = tuple(recorder.steps[:last])
    for step in steps:
        step.leaves[:] = [t.detach() if isinstance(t, Tensor) else t for t in step.leaves]
    return Tape(steps, image_value, answer, logits.detach(), scores.head)


class _Recorder(TorchDispatchMode):
    """Gives a number to every floating point tensor that depends on the image."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[Step] = []
        self.numbers: dict[Place, int] = {}
        #: Kept, so that nothing else comes to lie in their place.
        self.kept: list[Tensor] = []
        #: Storages in which values lie.
        self.known: set[int] = set()
        #: What steps keep, by storage: an operator may write there later.
        self.holders: dict[int, list[tuple[list[Any], int]]] = {}

    def number(self, tensor: Tensor) -> int:
        """The number of a new value."""
        self.kept.append(tensor)
        self.numbers[_place(tensor)] = len(self.kept)
        self.known.add(storage_of(tensor))
        return len(self.kept)

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        leaves, spec = tree_flatten((args, kwargs))
        inputs = {} if _fills(function) else dict(self._values(leaves, function))
        if not inputs:
            return function(*args, **kwargs)
        writes = function._schema.is_mutable
        recorded = _returning(function, leaves) if writes else function
        self._hold(leaves)
        if writes:
            self._spare(leaves[0])
        output = function(*args, **kwargs)
        found = list(_floats(output))
        # What lies where an input lies is that input: a view of all of it.
        same = not writes and [self.numbers.get(_place(t)) for t in found] == [*inputs.values()]
        if found and not same:
            numbers = tuple(self.number(tensor) for tensor in found)
            self.steps.append(Step(recorded, leaves, spec, inputs, numbers))
        return output

    def _values(self, leaves: Sequence[Any], function: Any) -> Iterator[tuple[int, int]]:
        for at, leaf in enumerate(leaves):
            if not isinstance(leaf, Tensor) or not leaf.is_floating_point() or not leaf.numel():
                continue
            value = self.numbers.get(_place(leaf))
            if value is not None:
                yield at, value
            elif storage_of(leaf) in self.known:
                raise NotApplicableError(
                    f"{name_of(function)} reads a tensor of which a part was written in place, so "
                    "that its parts cannot be told apart; use integrated-gradients"
                )

    def _hold(self, leaves: list[Any]) -> None:
        for at, leaf in enumerate(leaves):
            if isinstance(leaf, Tensor):
                self.holders.setdefault(storage_of(leaf), []).append((leaves, at))

    def _spare(self, written: Tensor) -> None:
        """Copy what steps keep of a tensor that is about to be written, and forget its views."""
        storage = storage_of(written)
        for leaves, at in self.holders.pop(storage, ()):
            leaves[at] = leaves[at].detach().clone()
        for place in [p for p in self.numbers if p[0] == storage]:
            del self.numbers[place]


def _fills(function: Any) -> bool:
    """Whether only the shape of its argument matters, as in ``zeros_like`` and ``new_zeros``."""
    name = name_of(function)
    return name.startswith("new_") or name.endswith("_like")


def _returning(function: Any, leaves: Sequence[Any]) -> Any:
    """The operator that returns what ``function`` writes to its first argument."""
    name = name_of(function)
    packet = getattr(torch.ops.aten, name.removesuffix("_"), None)
    if packet is None or not name.endswith("_") or not isinstance(leaves[0], Tensor):
        raise NotApplicableError(f"{name} writes in place, which cannot be followed")
    overloads = (getattr(packet, overload) for overload in packet.overloads())
    return next(o for o in overloads if _takes(o) == _takes(function))


def _takes(function: Any) -> list[str]:
    return [str(argument.type) for argument in function._schema.arguments]


def _floats(output: Any) -> Iterator[Tensor]:
    """The floating point tensors of an operator's output."""
    return (t for t in tensors_in(output) if t.is_floating_point() and t.numel())


def name_of(function: Any) -> str:
    """An operator's name, without namespace and overload."""
    return str(function.overloadpacket.__name__)


def _place(tensor: Tensor) -> Place:
    shape, strides = tuple(tensor.shape), tuple(tensor.stride())
    return storage_of(tensor), int(tensor.storage_offset()), shape, strides, tensor.dtype
