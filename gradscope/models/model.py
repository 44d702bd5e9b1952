"""One interface to a model of any form: an input and taps at named layers in, its output out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from typing import Any

from torch import Tensor, nn
from torch.fx.immutable_collections import immutable_list

from gradscope.errors import UsageError
from gradscope.models.precision import Widened, note_of, tensors_of, wide_copy
from gradscope.models.scores import Answering, Scores, answering
from gradscope.text import escaped, quoted

#: Sees a layer's output; what it returns, unless None, replaces that output.
Tap = Callable[[Tensor], Tensor | None]
Forward = Callable[[Tensor, Mapping[str, Tap]], Any]


@dataclass(frozen=True, eq=False, slots=True)
class Copy:
    """A private copy's forward pass, and the layers whose outputs are not the model's in it."""

    forward: Forward
    changed: frozenset[str] = frozenset()


@dataclass(frozen=True, eq=False, slots=True)
class Model:
    """A vision model that can be tapped: an ``nn.Module``, TorchScript or an exported program."""

    #: Owns the parameters and the training flags.
    module: nn.Module
    format: str
    #: The layers that can be tapped, in the order of definition.
    layers: tuple[str, ...]
    forward: Forward
    #: The one batch size that an exported program takes; None for any.
    batch: int | None = None
    #: The one size [C, H, W] of its images, where it is known; each None where it is free.
    size: tuple[int | None, int | None, int | None] = (None, None, None)
    notes: tuple[str, ...] = ()
    #: The output that is asked for, by name or position; None lets the outputs decide.
    output: str | None = None
    #: How many classes have names; 0 where that is unknown.
    names: int = 0
    #: How a target reads what the model returns; None for one score for each class.
    reading: Callable[[Any], Scores] | None = None
    #: Facts about the model that cost a pass to find out, by what asked for them.
    known: dict[Any, Any] = field(default_factory=dict)
    #: The same that no target changes: sizes of chunks, its copy.
    lasting: dict[Any, Any] = field(default_factory=dict)
    #: Faster copies of the model for an image, the best first; None where there are none.
    copied: Callable[[Tensor], Iterator[Copy]] | None = None
    #: Whether answers may be found on another way, where that is proved to give the same.
    quick: bool = False

    def answering(self, answer: Any) -> Answering:
        """How the model answers, as its first finite answer shows. Raises UsageError."""
        if "answering" not in self.known:
            found = answering(answer, self.output, self.names, self.module)
            if not found.read(answer).finite:
                return found
            self.known["answering"] = found
        known: Answering = self.known["answering"]
        return known

    def scores(self, answer: Any) -> Scores:
        """The scores [N, K] in what a pass returned. Raises UsageError where it has none."""
        return (self.reading or self.answering(answer).read)(answer)

    def read_by(self, reading: Callable[[Any], Scores]) -> Model:
        """The same model for another target."""
        return replace(self, reading=reading, known={})

    def check_layers(self, names: Iterable[str]) -> None:
        """Raise UsageError for a name that no layer has, with the closest names."""
        for name in names:
            if name not in self.layers:
                raise UsageError(
                    f"the model has no layer {quoted(name)}{nearest(name, self.layers)}"
                )


def nearest(name: str, names: Iterable[str]) -> str:
    """The end of a sentence that offers similar names; a common last part counts as similar."""
    offered = list(names)
    ends = [n for n in offered if n.rsplit(".", 1)[-1] == name.rsplit(".", 1)[-1]]
    close = list(dict.fromkeys(get_close_matches(name, offered, n=3) + ends))[:3]
    return f"; did you mean {', '.join(map(escaped, close))}?" if close else ""


def module_model(module: nn.Module) -> Model:
    """A model of named modules; ``torch.compile`` and data parallel wrappers are looked through.

    Of one in half precision a copy is computed in float32.
    """
    # Hooks on a compiled module never fire.
    module = getattr(module, "_orig_mod", module)
    if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
        module = module.module
    notes = note_of(tensors_of(module))
    called = _widely if notes else _plainly
    if notes:
        module = wide_copy(module)
    return Model(
        module,
        "module",
        tuple(name for name, _ in module.named_modules() if name),
        hooked(module, called(module)),
        size=(_channels(module), *_built_size(module)),
        notes=notes,
        names=_named_classes(module),
        copied=lambda image: _copies(module, called, image),
    )


def _named_classes(module: nn.Module) -> int:
    named = getattr(getattr(module, "config", None), "id2label", None)
    return len(named) if isinstance(named, Mapping) else 0


def _copies(
    module: nn.Module, called: Callable[[nn.Module], Callable[[Tensor], Any]], image: Tensor
) -> Iterator[Copy]:
    from gradscope.models.folding import folded_copies, sharing

    yield from folded_copies(
        lambda: sharing(module), lambda made: hooked(made, called(made)), image
    )


def _plainly(module: nn.Module) -> Callable[[Tensor], Any]:
    return module


def _widely(module: nn.Module) -> Callable[[Tensor], Any]:
    def call(inputs: Tensor) -> Any:
        with Widened():
            return module(inputs)

    return call


def hooked(module: nn.Module, call: Callable[[Tensor], Any]) -> Forward:
    """A forward pass whose taps are forward hooks."""
    modules = dict(module.named_modules())

    def forward(inputs: Tensor, taps: Mapping[str, Tap]) -> Any:
        with ExitStack() as hooks:
            for name, tap in taps.items():
                handle = modules[name].register_forward_hook(
                    lambda _module, _inputs, output, tap=tap: _through(tap, output)
                )
                hooks.callback(handle.remove)
            return call(inputs)

    return forward


def _through(tap: Tap, output: Any) -> Any:
    """A layer with several outputs is tapped at the first, as attention blocks order them.

    A part of an exported program also returns intermediate values that later parts need; its own
    output comes last.
    """
    if isinstance(output, Tensor):
        return tap(output)
    if not isinstance(output, tuple | list):
        return None
    tensors = [i for i, part in enumerate(output) if isinstance(part, Tensor)]
    inside = isinstance(output, immutable_list)
    if not tensors or (tensors[0] != 0 and not inside):
        return None
    at = tensors[-1] if inside else 0
    found = tap(output[at])
    return None if found is None else _like(output, [*output[:at], found, *output[at + 1 :]])


def _like(output: Any, parts: list[Any]) -> Any:
    """Parts in a container of the same type; a named tuple keeps its fields."""
    return (
        output._replace(**dict(zip(output._fields, parts, strict=True)))
        if hasattr(output, "_replace")
        else type(output)(parts)
    )


def first_convolution(module: nn.Module) -> Tensor | None:
    """The first four-dimensional weight, which in vision models reads the image."""
    named = module.named_parameters()
    return next((p for name, p in named if p.dim() == 4 and name.endswith("weight")), None)


def _channels(module: nn.Module) -> int | None:
    for child in module.modules():
        if isinstance(child, nn.Conv2d):
            return child.in_channels
    weight = first_convolution(module)
    return None if weight is None else int(weight.shape[1])


def _built_size(module: nn.Module) -> tuple[int, int] | tuple[None, None]:
    """The size that a vision transformer is built for, under the names that libraries give it.

    What cuts the image into patches knows it; a configuration says what it likes. Later embeddings
    cut maps, of another size.
    """
    for holder in (module, getattr(module, "patch_embed", None)):
        for size in _named(holder):
            return size
    channels = _channels(module)
    for part in module.modules():
        convolutions = [child for child in part.children() if isinstance(child, nn.Conv2d)]
        if any(child.in_channels == channels for child in convolutions):
            for size in _named(part):
                return size
    return None, None


def _named(holder: object) -> Iterator[tuple[int, int]]:
    for name in ("img_size", "image_size", "input_resolution"):
        yield from pair(getattr(holder, name, None))


def pair(size: Any) -> Iterator[tuple[int, int]]:
    """Height and width as libraries write them: one number, or two; nothing for anything else."""
    if isinstance(size, int) and size > 0:
        yield size, size
    elif isinstance(size, Sequence) and len(size) == 2 and all(isinstance(n, int) for n in size):
        yield size[0], size[1]
