"""The layers of a model as one image sees them, and the one that ``auto`` takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gradscope.errors import UsageError
from gradscope.models.layout import Layout, layout_of
from gradscope.models.model import Model, Tap
from gradscope.models.probe import logits_of


@dataclass(frozen=True, slots=True)
class Layer:
    """A layer as one image saw it."""

    name: str
    shape: tuple[int, ...]
    #: None where its output does not lie over the image.
    layout: Layout | None
    calls: int
    #: The operator that computed the output.
    operator: str
    #: Share of the positions where the score's gradient is not zero.
    receives: float | None
    #: Equal for outputs that are one tensor or views of it.
    tensor: tuple[int, int] = (0, 0)


@dataclass(frozen=True, slots=True)
class AutoLayer:
    """The layer that ``auto`` takes, and why."""

    layer: Layer
    reason: str


@dataclass(slots=True)
class _Seen:
    output: Tensor
    shape: tuple[int, ...]
    tensor: tuple[int, int]
    operator: str
    calls: int = 1


class _Operators(TorchDispatchMode):
    """Remembers the last operator that computed something."""

    def __init__(self) -> None:
        super().__init__()
        self.last = ""

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = function._schema.name.removeprefix("aten::")
        if name not in _VIEWS:
            self.last = name
        return function(*args, **(kwargs or {}))


_VIEWS = frozenset(
    ("view", "_unsafe_view", "reshape", "flatten", "squeeze", "unsqueeze", "expand", "select",
     "slice", "alias", "detach", "t", "transpose", "permute", "split", "chunk", "unbind",
     "_reshape_alias", "split_with_sizes", "as_strided", "clone", "contiguous")
)  # fmt: skip
_POOLING = ("pool", "mean", "upsample", "_softmax")
#: Operators that return a transformer's residual stream, or (by part of a name) normalise it.
_STREAM = ("add", "add_", "addcmul", "mul", "mul_", "cat")
_NORM = "norm"


def survey(model: Model, inputs: Tensor, target: int | None = None) -> list[Layer]:
    """Every layer that returns a tensor, in the order of its last call, for the first image.

    One forward and one backward pass. The model must be held. Raises UsageError for a model that
    returns no scores.
    """
    leaf = inputs[:1].expand(model.batch or 1, *inputs.shape[1:]).detach().clone().requires_grad_()
    operators, seen = _Operators(), dict[str, _Seen]()

    def observer(name: str) -> Tap:
        def observe(output: Tensor) -> None:
            before = seen.pop(name, None)
            tensor = (output.untyped_storage()._cdata, output._version)
            calls = 1 if before is None else before.calls + 1
            seen[name] = _Seen(output, tuple(output.shape), tensor, operators.last, calls)

        return observe

    with torch.enable_grad(), operators:
        answer = model.forward(leaf, {name: observer(name) for name in model.layers})
    logits, _ = logits_of(answer)
    score = logits.max(1).values.sum() if target is None else logits[:, target].sum()
    known = [s.output for s in seen.values() if s.output.requires_grad]
    found = iter(torch.autograd.grad(score, known, allow_unused=True) if known else ())
    gradients = [next(found) if s.output.requires_grad else None for s in seen.values()]
    pairs = zip(seen.items(), gradients, strict=True)
    return [_layer(name, s, gradient, tuple(leaf.shape)) for (name, s), gradient in pairs]


def _layer(name: str, seen: _Seen, gradient: Tensor | None, images: tuple[int, ...]) -> Layer:
    layout = layout_of(seen.shape, images)
    receives = None
    if layout is not None:
        received = None if gradient is None else layout.maps(gradient).abs().amax(1)
        receives = 0.0 if received is None else float((received > 0).double().mean())
    return Layer(name, seen.shape, layout, seen.calls, seen.operator, receives, seen.tensor)


def choose(layers: Sequence[Layer]) -> AutoLayer:
    """The last layer with more than one position that the score's gradient reaches.

    Pooling layers do not count; among token outputs only the residual stream and its normalised
    forms do. Raises UsageError when no layer has positions.
    """
    placed = [layer for layer in layers if _has_places(layer)]
    if not placed:
        raise UsageError(
            "no layer returns maps or patch tokens; name one with --layer, or use a method that "
            "reads none (saliency, integrated-gradients, occlusion, rise)"
        )
    reached = [layer for layer in placed if layer.receives]
    last = (reached or placed)[-1]
    return AutoLayer(_owner(last, layers), _reason(last, placed, bool(reached)))


def _has_places(layer: Layer) -> bool:
    if layer.layout is None or layer.layout.grid[0] * layer.layout.grid[1] < 2:
        return False
    if any(word in layer.operator for word in _POOLING):
        return False
    stream = layer.operator in _STREAM or _NORM in layer.operator
    return stream or "tokens" not in layer.layout.kind


def _owner(last: Layer, layers: Sequence[Layer]) -> Layer:
    """Of the layers that return one tensor, the innermost block with a convolution, or the first.

    A block, its last activation and the stage they end return one tensor under three names.
    """
    same = [layer for layer in layers if layer.tensor == last.tensor and layer.layout is not None]
    convolutions = [layer.name for layer in layers if "conv" in layer.operator]
    around = [
        layer for layer in same if any(name.startswith(layer.name + ".") for name in convolutions)
    ]
    return max(around, key=lambda layer: layer.name.count("."), default=same[0])


def _reason(last: Layer, placed: Sequence[Layer], reached: bool) -> str:
    what = "patch tokens" if last.layout and "tokens" in last.layout.kind else "maps"
    if not reached:
        return f"the last layer with {what}; the score's gradient reaches none of them"
    after = placed[placed.index(last) + 1 :]
    unreached = f" ({after[-1].name} gets none)" if after else ""
    return f"the last layer with {what} that the score's gradient reaches{unreached}"


def auto_layer(model: Model, inputs: Tensor) -> AutoLayer:
    """The choice for these inputs, made once for each image size."""
    key = ("auto", tuple(inputs.shape[1:]))
    if key not in model.known:
        model.known[key] = choose(survey(model, inputs))
    found: AutoLayer = model.known[key]
    return found
