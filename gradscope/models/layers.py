"""The layers of a model as one image sees them, and the one that ``auto`` takes."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gradscope.errors import NotApplicableError
from gradscope.models.graph import has_dead_end
from gradscope.models.layout import Layout, layout_of
from gradscope.models.model import Model, Tap
from gradscope.models.stream import Flow, Operation, on_stream


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
    #: Whether it is the residual stream, or a form of it without mixing.
    stream: bool = False
    #: The operation that it came from, and as bits all that it was computed from.
    made_by: int = 0
    above: int = 0


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
    made_by: int | None
    calls: int = 1


_POOLING = ("pool", "mean", "upsample", "_softmax")


def survey(model: Model, inputs: Tensor, target: int | None = None) -> list[Layer]:
    """Every layer that returns a tensor, in the order of its last call, for the first image.

    One forward and one backward pass. The model must be held. Raises UsageError for a model that
    returns no scores.
    """
    leaf = inputs[:1].expand(model.batch or 1, *inputs.shape[1:]).detach().clone().requires_grad_()
    flow, seen = Flow(leaf), dict[str, _Seen]()

    def observer(name: str) -> Tap:
        def observe(output: Tensor) -> None:
            before = seen.pop(name, None)
            tensor = (output.untyped_storage()._cdata, output._version)
            calls = 1 if before is None else before.calls + 1
            seen[name] = _Seen(output, tuple(output.shape), tensor, flow.maker(output), calls)

        return observe

    with torch.enable_grad(), flow:
        answer = model.forward(leaf, {name: observer(name) for name in model.layers})
    logits = model.scores(answer).values
    score = logits.max(1).values.sum() if target is None else logits[:, target].sum()
    # Where an operator has no derivative, what comes through is not the score's gradient.
    whole = score.requires_grad and not has_dead_end(score)
    known = [s.output for s in seen.values() if s.output.requires_grad and whole]
    found = iter(torch.autograd.grad(score, known, allow_unused=True) if known else ())
    gradients = [next(found) if s.output.requires_grad and whole else None for s in seen.values()]
    stream = on_stream(flow.operations)
    layers = []
    for (name, one), gradient in zip(seen.items(), gradients, strict=True):
        layer = _layer(name, one, gradient, tuple(leaf.shape))
        layers.append(layer if one.made_by is None else replace(
            layer, operator=flow.operations[one.made_by].name, stream=stream[one.made_by],
            made_by=one.made_by, above=flow.operations[one.made_by].above,
            layout=None if _has_other_tokens(layer, flow.operations[one.made_by])
            else layer.layout,
        ))  # fmt: skip
    return layers


def _layer(name: str, seen: _Seen, gradient: Tensor | None, images: tuple[int, ...]) -> Layer:
    layout = layout_of(seen.shape, images)
    receives = None
    if layout is not None:
        received = None if gradient is None else layout.maps(gradient).abs().amax(1)
        receives = 0.0 if received is None else float((received > 0).double().mean())
    return Layer(name, seen.shape, layout, seen.calls, "", receives, seen.tensor)


def choose(layers: Sequence[Layer]) -> AutoLayer:
    """The last layer with more than one position that the score's gradient reaches.

    Pooling layers and what is split into attention heads do not count; among token outputs only
    the residual stream and its normalised forms do. Raises UsageError when no layer has positions.
    """
    # A block may return what an early one made.
    placed = sorted(_placed(layers), key=lambda layer: layer.made_by)
    if not placed:
        raise NotApplicableError(
            "no layer returns maps or patch tokens; name one with --layer, or use a method that "
            "reads none (saliency, integrated-gradients, occlusion, rise)"
        )
    reached = [layer for layer in placed if layer.receives]
    last = (reached or placed)[-1]
    why = _reason(last, placed[placed.index(last) + 1 :], bool(reached), layers)
    return AutoLayer(_owner(last, layers), why + _beside(last, reached, layers))


def _placed(layers: Sequence[Layer]) -> Iterator[Layer]:
    """The layers whose outputs have positions, and each position what the model knows of it."""
    tokens = [layer for layer in layers if _has_tokens(layer)]
    sizes = {size for layer in tokens for size in _token_sizes(layer)}
    # Where only maps have one, what attention pools them by are no places of the model's own.
    streams = any(layer.stream for layer in layers if _has_places(layer))
    for layer in layers:
        passed = layer.stream or not streams or layer not in tokens
        if passed and _has_places(layer) and not _is_of_heads(layer, sizes):
            yield layer


def _has_tokens(layer: Layer) -> bool:
    return layer.layout is not None and "tokens" in layer.layout.kind


def _has_other_tokens(layer: Layer, operation: Operation) -> bool:
    """Whether its tokens, or those after the patches, are learned ones that ask for objects."""
    if not _has_tokens(layer):
        return False
    return operation.queries or (operation.followed and layer.shape[1] == operation.size[0])


def _has_places(layer: Layer) -> bool:
    if layer.layout is None or layer.layout.grid[0] * layer.layout.grid[1] < 2:
        return False
    return not any(word in layer.operator for word in _POOLING)


def _token_sizes(layer: Layer) -> Iterator[tuple[int, int]]:
    """How many tokens with how many channels, with and without those that have no position."""
    assert layer.layout is not None
    count = layer.shape[1 - layer.layout.batch_dim]
    yield count, layer.shape[-1]
    yield count - layer.layout.prefix, layer.shape[-1]


def _is_of_heads(layer: Layer, tokens: Collection[tuple[int, int]]) -> bool:
    """Whether it is some tokens with their channels split, [N, heads, tokens, d] or the like.

    By its shape alone, that may look like maps.
    """
    if len(layer.shape) != 4:
        return False
    _, one, other, d = layer.shape
    return (other, one * d) in tokens or (one, other * d) in tokens


def _owner(last: Layer, layers: Sequence[Layer]) -> Layer:
    """Of the layers that return one tensor, the innermost block with a convolution, or the first.

    A block, its last activation and the stage they end return one tensor under three names. The
    convolutions of a gate over channels, which have no positions, make no block.
    """
    same = [
        layer for layer in layers if layer.tensor == last.tensor and _grid(layer) == _grid(last)
    ]
    convolutions = [
        layer.name for layer in layers if "conv" in layer.operator and _has_places(layer)
    ]
    around = [
        layer for layer in same if any(name.startswith(layer.name + ".") for name in convolutions)
    ]
    return max(around, key=lambda layer: layer.name.count("."), default=same[0])


def _grid(layer: Layer) -> tuple[int, int] | None:
    return None if layer.layout is None else layer.layout.grid


def _reason(last: Layer, after: Sequence[Layer], reached: bool, layers: Sequence[Layer]) -> str:
    what = "patch tokens" if last.layout and "tokens" in last.layout.kind else "maps"
    if not reached:
        return f"the last layer with {what}; the score's gradient reaches none of them"
    unreached = f" ({_owner(after[-1], layers).name} gets none)" if after else ""
    return f"the last layer with {what} that the score's gradient reaches{unreached}"


def _beside(last: Layer, reached: Sequence[Layer], layers: Sequence[Layer]) -> str:
    """What to say of a branch that the score rests on as well, and that this layer knows not of."""
    others = [layer for layer in reached if not last.above >> layer.made_by & 1]
    if not others:
        return ""
    other = _owner(others[-1], layers).name
    return f"; one of several branches, {other} is the last of another (--layer takes it)"


def has_others_behind(model: Model, inputs: Tensor, tokens: int) -> bool:
    """Whether sequences of so many tokens end in learned ones that are no places of the image.

    How many patches are before them cannot be told from a layer's output. One forward pass for
    each image size. The model must be held.
    """
    key = ("followed", tuple(inputs.shape[1:]))
    if key not in model.known:
        flow = Flow(inputs[:1].expand(model.batch or 1, *inputs.shape[1:]).detach().clone())
        with torch.no_grad(), flow:
            model.forward(flow.images, {})
        model.known[key] = {o.size[0] for o in flow.operations if o.followed}
    return tokens in model.known[key]


def auto_layer(model: Model, inputs: Tensor) -> AutoLayer:
    """The choice for these inputs, made once for each image size."""
    key = ("auto", tuple(inputs.shape[1:]))
    if key not in model.known:
        model.known[key] = choose(survey(model, inputs))
    found: AutoLayer = model.known[key]
    return found


#: About as many layers as fit on a screen.
_SHORT = 10


def shortlist(layers: Sequence[Layer], choice: AutoLayer | None) -> list[Layer]:
    """The layers worth trying: ``auto``'s choice, then the last blocks of each grid, last first.

    A block is numbered and has parts; where a grid has none, its last layer stands for it.
    """
    placed = [layer for layer in layers if _has_places(layer) and layer.receives]
    grids = dict.fromkeys(layer.layout.grid for layer in reversed(placed) if layer.layout)
    first = [] if choice is None else [choice.layer]
    found = [*first]
    for grid in grids:
        here = [layer for layer in placed if layer.layout and layer.layout.grid == grid]
        blocks = [layer for layer in here if _is_block(layer, layers)] or here[-1:]
        distinct = {layer.tensor: layer for layer in blocks}
        taken = list(reversed(distinct.values()))[: max(1, _SHORT // len(grids))]
        found += [layer for layer in taken if all(layer.tensor != f.tensor for f in first)]
    return found


def _is_block(layer: Layer, layers: Sequence[Layer]) -> bool:
    inside = layer.name + "."
    return layer.name[-1:].isdigit() and any(other.name.startswith(inside) for other in layers)
