"""Which layers a model has for maps, how their outputs lie over the image, and which to take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gradscope.errors import UsageError
from gradscope.models.model import Model, Tap
from gradscope.models.probe import logits_of

Kind = Literal["maps", "channels-last", "tokens", "tokens-first"]

#: Class, distillation and register tokens come to no more than this.
_MOST_PREFIX_TOKENS = 16


@dataclass(frozen=True, slots=True)
class Layout:
    """How a layer's output lies over the image.

    ``maps`` is [N, C, h, w], ``channels-last`` [N, h, w, C], ``tokens`` [N, prefix + h w, C] and
    ``tokens-first`` [prefix + h w, N, C]; prefix tokens (class, registers) have no place.
    """

    kind: Kind
    grid: tuple[int, int]
    prefix: int = 0

    @property
    def channel_dim(self) -> int:
        """The dimension of the channels."""
        return 1 if self.kind == "maps" else -1

    @property
    def batch_dim(self) -> int:
        """The dimension of the images."""
        return 1 if self.kind == "tokens-first" else 0

    def maps(self, values: Tensor) -> Tensor:
        """An output of the layer as [N, C, h, w]."""
        if self.kind == "maps":
            return values
        if self.kind == "channels-last":
            return values.movedim(-1, 1)
        tokens = values.transpose(0, 1) if self.kind == "tokens-first" else values
        tokens = tokens[:, self.prefix :].transpose(1, 2)
        return tokens.reshape(*tokens.shape[:2], *self.grid)

    def __str__(self) -> str:
        grid = f"{self.grid[0]}×{self.grid[1]}"
        if self.kind == "maps":
            return f"maps {grid}"
        if self.kind == "channels-last":
            return f"maps {grid}, channels last"
        return f"tokens {grid}" + (f" + {self.prefix} without a place" if self.prefix else "")


def layout_of(shape: Sequence[int], images: Sequence[int]) -> Layout | None:
    """How an output of ``shape`` lies over inputs [N, C, H, W]; None where it does not."""
    count, _, height, width = images
    if len(shape) == 4 and shape[0] == count:
        if _covers(shape[2], shape[3], height, width):
            return Layout("maps", (shape[2], shape[3]))
        if _covers(shape[1], shape[2], height, width):
            return Layout("channels-last", (shape[1], shape[2]))
    if len(shape) == 3:
        for kind, batch, length in (("tokens", 0, 1), ("tokens-first", 1, 0)):
            found = _grid(shape[length], height, width) if shape[batch] == count else None
            if found is not None:
                return Layout(kind, found, shape[length] - found[0] * found[1])  # type: ignore[arg-type]
    return None


def _covers(h: int, w: int, height: int, width: int) -> bool:
    """Whether a grid has the image's aspect, as far as rounding and borders allow."""
    if not (1 <= h <= height and 1 <= w <= width):
        return False
    down, across = height / h, width / w
    return abs(down - across) <= 0.3 * max(down, across) or abs(h - w * height / width) <= 1


def _grid(tokens: int, height: int, width: int) -> tuple[int, int] | None:
    """The grid of square patches with the fewest tokens left over for the prefix."""
    best: tuple[int, tuple[int, int]] | None = None
    for patch in range(1, min(height, width) // 2 + 1):
        for grid in {(height // patch, width // patch), (-(-height // patch), -(-width // patch))}:
            prefix = tokens - grid[0] * grid[1]
            if 0 <= prefix <= min(_MOST_PREFIX_TOKENS, tokens // 2) and (
                not best or prefix < best[0]
            ):
                best = (prefix, grid)
    return best[1] if best else None


@dataclass(frozen=True, slots=True)
class Layer:
    """A layer as one image saw it."""

    name: str
    shape: tuple[int, ...]
    #: None where its output has no place in the image.
    layout: Layout | None
    calls: int
    #: The operator that gave the output.
    operator: str
    #: Share of the positions at which the score's gradient is not zero.
    receives: float | None
    #: Outputs that are one tensor, possibly seen through views, share it.
    tensor: tuple[int, int] = (0, 0)


@dataclass(frozen=True, slots=True)
class Choice:
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
    """Knows the last operator that computed something."""

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
#: What gives the residual stream of a transformer, and (by part of its name) its normalised form.
_STREAM = ("add", "add_", "addcmul", "mul", "mul_", "cat")
_NORM = "norm"


def survey(model: Model, inputs: Tensor, target: int | None = None) -> list[Layer]:
    """Every layer that gives a tensor, in the order of its last answer to the first image.

    One pass forward and one back. The model must be held. Raises UsageError for a model that gives
    no scores.
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


def choose(layers: Sequence[Layer]) -> Choice:
    """The last layer with more than one place that the score's gradient reaches.

    Pooling does not count, and of token outputs only the residual stream and its normalised forms.
    Raises UsageError when no layer has places.
    """
    placed = [layer for layer in layers if _has_places(layer)]
    if not placed:
        raise UsageError(
            "no layer gives maps or patch tokens; name one that does with --layer, or take a "
            "method that needs none (saliency, integrated-gradients, occlusion, rise)"
        )
    reached = [layer for layer in placed if layer.receives]
    last = (reached or placed)[-1]
    return Choice(_named(last, layers), _reason(last, placed, bool(reached)))


def _has_places(layer: Layer) -> bool:
    if layer.layout is None or layer.layout.grid[0] * layer.layout.grid[1] < 2:
        return False
    if any(word in layer.operator for word in _POOLING):
        return False
    stream = layer.operator in _STREAM or _NORM in layer.operator
    return stream or "tokens" not in layer.layout.kind


def _named(last: Layer, layers: Sequence[Layer]) -> Layer:
    """Of the layers that give one tensor, the innermost block around a convolution, or the first.

    A block, its last activation and the stage they end are one tensor under three names.
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
    unreached = f" (none comes to those of {after[-1].name})" if after else ""
    return f"the last layer with {what} that the score's gradient reaches{unreached}"


def auto_layer(model: Model, inputs: Tensor) -> Choice:
    """What ``choose`` takes for these inputs, found once for each size of image."""
    key = ("auto", tuple(inputs.shape[1:]))
    if key not in model.known:
        model.known[key] = choose(survey(model, inputs))
    found: Choice = model.known[key]
    return found
