"""What methods work on: images, their targets, and the model's answers, computed once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TypeVar

import torch
from torch import Tensor

from gradscope.attribution.chunks import Chunks, fitting
from gradscope.errors import UsageError
from gradscope.models.layers import AutoLayer, auto_layer, has_others_behind
from gradscope.models.layout import Layout, layout_of
from gradscope.models.model import Model, first_convolution
from gradscope.models.probe import Pass, run
from gradscope.models.scores import Scores
from gradscope.text import quoted

#: Items and images [M] -> inputs [M, C, H, W]: the inputs that a method puts to the model.
Points = Callable[[Tensor, Tensor], Tensor]
#: Items [M], images [M] and the values for them.
Answer = tuple[Tensor, Tensor, Tensor]
Found = TypeVar("Found")
#: Which of the chunks' sizes counts.
Size = Callable[[Chunks], int]
#: Work done, and all work.
Tick = Callable[[int, int], None]

#: From so many images on, channels come last in memory.
_MANY = 4


def backward(chunks: Chunks) -> int:
    """Inputs at a time with a backward pass."""
    return chunks.gradient


def forward(chunks: Chunks) -> int:
    """Inputs at a time without one."""
    return chunks.forward


def in_windows(chunks: Chunks) -> int:
    """The same of inputs that are alike at first, in all but a window."""
    return chunks.windows


@dataclass(eq=False)
class Subject:
    """N images, a target for each, and a held model."""

    model: Model
    #: [N, C, H, W]
    inputs: Tensor
    #: [N]; and with a contrast, the classes whose score is subtracted.
    targets: Tensor
    versus: Tensor | None = None
    #: None lets the model's layers decide.
    layer: str | None = None
    seed: int = 0
    chunks: Chunks | None = None
    #: The normalisation of pixels 0..1, (pixels - mean) / std, each [C]; None if unknown.
    mean: Tensor | None = None
    std: Tensor | None = None
    tick: Tick = lambda _done, _total: None
    #: Passes made so far, by the layer tapped; subjects with the same inputs share them.
    shared: dict[str, Pass] = field(default_factory=dict)

    def limit(self, chunk: int) -> None:
        """Put no more than ``chunk`` inputs to the model at a time. Raises UsageError below 1."""
        if chunk < 1:
            raise UsageError("chunk has to be at least 1")
        self.chunks = replace(
            self._chunks(), gradient=chunk, forward=chunk, windows=chunk, notes=[]
        )

    def about(self, targets: Tensor, versus: Tensor | None = None) -> Subject:
        """The same images and passes with other targets."""
        return replace(self, targets=targets, versus=versus)

    def only(self, image: int) -> Subject:
        """One of the images."""
        here = slice(image, image + 1)
        return replace(
            self,
            inputs=self.inputs[here],
            targets=self.targets[here],
            versus=None if self.versus is None else self.versus[here],
            shared={},
        )

    # -- the whole model ---------------------------------------------------------------------------

    def objective(self, logits: Tensor, images: Tensor) -> Tensor:
        """What is explained [M]: the targets' logits, less those of the contrasting classes."""
        found = logits.gather(1, self.targets[images][:, None]).squeeze(1)
        if self.versus is not None:
            found = found - logits.gather(1, self.versus[images][:, None]).squeeze(1)
        return found

    def score(self, inputs: Tensor, images: Tensor) -> Tensor:
        """The objective [M] of inputs [M, C, H, W] that stand for ``images`` [M]."""
        return self.objective(run(self.model, inputs).logits, images)

    def probability(self, inputs: Tensor, images: Tensor) -> Tensor:
        """The targets' probabilities [M]; the objective where the model gives no probabilities."""
        seen = run(self.model, inputs)
        if seen.probabilities is None:
            return self.objective(seen.logits, images)
        return seen.probabilities.gather(1, self.targets[images][:, None]).squeeze(1)

    @property
    def answered(self) -> Pass:
        """A pass over the images as they are; any that was made."""
        if not self.shared:
            with torch.no_grad():
                self.shared[""] = run(self.model, self.inputs)
        return next(iter(self.shared.values()))

    @property
    def answer(self) -> Scores:
        """The scores [1, K] of the first image."""
        found = self.answered.scores
        return Scores(found.values[:1].detach(), found.head)

    @property
    def own_scores(self) -> Tensor:
        """The objective [N] of the images as they are."""
        return self.objective(self.answered.logits, self.images).detach()

    @property
    def images(self) -> Tensor:
        """The images' indices [N]."""
        return torch.arange(len(self.inputs), device=self.inputs.device)

    def own(self, _items: Tensor, images: Tensor) -> Tensor:
        """The images themselves, as points."""
        return self.inputs[images]

    def gradients(self, points: Points, items: int = 1) -> Iterator[Answer]:
        """For every item and image: (items [M], images [M], the score's gradients [M, C, H, W])."""

        for which, images, gradients, _ in self.scored_gradients(points, items):
            yield which, images, gradients

    def scored_gradients(
        self, points: Points, items: int = 1
    ) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """The same, and the scores [M] at the points."""

        def work(which: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
            leaf = self._laid(points(which, images)).detach().requires_grad_()
            with torch.enable_grad():
                scores = self.score(leaf, images)
            if not scores.requires_grad:
                # Of what a detector no longer finds the score is 0, whatever the image.
                return torch.zeros_like(leaf), scores.detach()
            found = torch.autograd.grad(scores.sum(), leaf, materialize_grads=True)[0]
            return found.detach(), scores.detach()

        for which, images, found in self._worked(work, items, backward):
            yield which, images, *found

    def scores(
        self,
        points: Points,
        items: int = 1,
        ask: Callable[[Tensor, Tensor], Tensor] | None = None,
        size: Size = forward,
    ) -> Iterator[Answer]:
        """For every item and image: (items [M], images [M], scores [M]), without a graph."""
        answer = ask or self.score
        return self.answers(
            lambda which, images: answer(self._laid(points(which, images)), images), items, size
        )

    def answers(
        self, work: Callable[[Tensor, Tensor], Tensor], items: int, size: Size = forward
    ) -> Iterator[Answer]:
        """What ``work`` returns for every item and image, in chunks, without a graph."""

        def without_graph(which: Tensor, images: Tensor) -> Tensor:
            with torch.no_grad():
                return work(which, images).detach()

        yield from self._worked(without_graph, items, size)

    def _worked(
        self, work: Callable[[Tensor, Tensor], Found], items: int, size: Size
    ) -> Iterator[tuple[Tensor, Tensor, Found]]:
        """Items by images, items first, in chunks; one that does not fit is retried in halves."""
        count = len(self.inputs)
        start, total = 0, items * count
        while start < total:
            chunks = self._chunks()
            index = torch.arange(start, min(total, start + size(chunks)), device=self.inputs.device)
            which, images = index // count, index % count
            try:
                found = work(which, images)
            except RuntimeError as error:
                if not _out_of_memory(error) or size(chunks) == 1:
                    raise
                chunks.halve()
                continue
            yield which, images, found
            start += len(index)
            self.tick(start, total)

    def _laid(self, inputs: Tensor) -> Tensor:
        """Inputs in the memory layout in which convolutions of many images are fastest."""
        if len(inputs) < _MANY or not self._chunks().channels_last:
            return inputs
        return inputs.contiguous(memory_format=torch.channels_last)

    def _chunks(self) -> Chunks:
        if self.chunks is None:
            key = ("chunks", tuple(self.inputs.shape[1:]), self.inputs.device)
            known, lasting = self.model.known, self.model.lasting
            if key not in lasting:
                lasting[key] = _measured(self)
            # What did not fit is told in each report.
            self.chunks = known.setdefault(key, replace(lasting[key], notes=[]))
        return self.chunks

    # -- one layer ---------------------------------------------------------------------------------

    @cached_property
    def choice(self) -> AutoLayer | None:
        """The layer that ``auto`` takes, and why; None where a layer was named."""
        return auto_layer(self.model, self.inputs) if self.layer is None else None

    @cached_property
    def layer_name(self) -> str:
        """The layer that is read."""
        return self.layer if self.choice is None else self.choice.layer.name  # type: ignore[return-value]

    @property
    def tapped(self) -> Pass:
        """The pass with a tap at the layer; its graph begins there."""
        if self.layer_name not in self.shared:
            self.shared[self.layer_name] = run(self.model, self.inputs, [self.layer_name])
        return self.shared[self.layer_name]

    @cached_property
    def layout(self) -> Layout:
        """How the layer's output lies over the image. Raises UsageError where it does not."""
        piece = self.tapped.pieces[self.layer_name][0]
        shape = tuple(piece.shape)
        found = layout_of(shape, (self.model.batch or len(self.inputs), *self.inputs.shape[1:]))
        if found is None:
            raise UsageError(
                f"layer {quoted(self.layer_name)} returns {list(shape)}, which has no positions in "
                f"an image of {self.inputs.shape[2]}×{self.inputs.shape[3]}; maps have shape "
                "[N, C, h, w], patch tokens [N, tokens, C] (see `gradscope layers`)"
            )
        # One token before the patches is that of the class; more may lie behind them.
        if found.prefix > 1 and has_others_behind(
            self.model, self.inputs, found.prefix + math.prod(found.grid)
        ):
            raise UsageError(
                f"layer {quoted(self.layer_name)} has learned tokens behind those of the patches "
                "(a detector's), so that places cannot be told: choose one with maps (see "
                "`gradscope layers`)"
            )
        return found

    @cached_property
    def activations(self) -> Tensor:
        """The layer's output as maps [N, C, h, w]."""
        return self.as_maps(self.tapped.pieces[self.layer_name])

    @cached_property
    def activation_gradients(self) -> Tensor:
        """The gradient of the objective by the layer's output [N, C, h, w]."""
        total = self.objective(self.tapped.logits, self.images).sum()
        return self.as_maps(self.tapped.gradients(total, self.layer_name))

    def as_maps(self, pieces: tuple[Tensor, ...]) -> Tensor:
        """Pieces of the layer's output, or of what belongs to it, as maps [N, C, h, w]."""
        maps = torch.cat([self.layout.maps(piece.detach()) for piece in pieces])
        return maps[: len(self.inputs)]


def _measured(subject: Subject) -> Chunks:
    """Chunks by what one input's backward pass keeps."""
    held: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        held[storage.data_ptr()] = storage.nbytes()
        return tensor

    # The parameters are held anyway.
    owned = {p.untyped_storage().data_ptr() for p in subject.model.module.parameters()}
    leaf = subject.inputs[:1].detach().clone().requires_grad_()
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        subject.score(leaf, subject.images[:1])
    kept = [size for pointer, size in held.items() if pointer not in owned]
    chunks = fitting(kept, subject.inputs.device, subject.model.batch)
    # A private copy of the model has inputs in the order that suits it.
    copied = subject.model.quick and subject.model.copied is not None
    return replace(chunks, channels_last=not copied and _takes_channels_last(subject))


def _takes_channels_last(subject: Subject) -> bool:
    """Whether the model gives the same logits; some use views that this layout does not allow."""
    if first_convolution(subject.model.module) is None:
        return False
    image = subject.inputs[:1]
    two = image.expand(subject.model.batch or 2, *image.shape[1:])
    try:
        found = run(subject.model, two.contiguous(memory_format=torch.channels_last)).logits
    except RuntimeError:
        return False
    wanted = subject.answered.logits[:1].detach()
    scale = float(wanted.abs().max())
    if not math.isfinite(scale):
        return False
    return torch.allclose(found[:1], wanted, rtol=1e-3, atol=1e-4 * scale)


def _out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
