"""Activations and gradients at named layers, leaving the model as it was."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gradscope.errors import UsageError
from gradscope.models.model import Model, Tap
from gradscope.models.scores import Scores
from gradscope.text import quoted


@contextmanager
def held(module: nn.Module) -> Iterator[None]:
    """The module in evaluation mode with frozen parameters; restored afterwards, after errors too.

    Training flags, ``requires_grad`` and the random state are restored; parameters, their
    gradients and buffers are never written. Gradients are recorded inside, whatever the caller's
    mode is.
    """
    # A frozen ScriptModule has no such flags; an exported module ignores them.
    modes = [(m, m.training) for m in module.modules() if hasattr(m, "training")]
    wanted = [(p, p.requires_grad) for p in module.parameters()]
    state = torch.get_rng_state()
    try:
        for part, training in modes:
            if training:
                part.training = False
        for parameter, _ in wanted:
            parameter.requires_grad_(False)
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        for part, training in modes:
            if part.training != training:
                part.training = training
        for parameter, needed in wanted:
            parameter.requires_grad_(needed)
        torch.set_rng_state(state)


@dataclass(frozen=True, eq=False, slots=True)
class Pass:
    """One forward pass: scores [N, K] and the outputs of each tapped layer, piece by piece.

    Pieces are the batches of a model with a fixed batch size; otherwise there is one.
    """

    scores: Scores
    pieces: Mapping[str, tuple[Tensor, ...]]

    @property
    def logits(self) -> Tensor:
        """The scores [N, K] themselves: logits, where the model returns such."""
        return self.scores.values

    @property
    def probabilities(self) -> Tensor | None:
        """Probabilities [N, K] of the classes; None where the model gives none."""
        return self.scores.probabilities

    def gradients(self, objective: Tensor, layer: str) -> tuple[Tensor, ...]:
        """Gradients of a scalar by a layer's pieces; zero where it does not depend on one.

        Keeps the graph for other objectives.
        """
        of = self.pieces[layer]
        if not objective.requires_grad:
            # Of a layer that is called twice the last call may make another output.
            return tuple(torch.zeros_like(piece) for piece in of)
        found = torch.autograd.grad(objective, of, retain_graph=True, allow_unused=True)
        pairs = zip(of, found, strict=True)
        return tuple(torch.zeros_like(t) if g is None else g.detach() for t, g in pairs)


def run(model: Model, inputs: Tensor, layers: Sequence[str] = ()) -> Pass:
    """A forward pass of a held model with taps at ``layers``.

    Where the inputs need no gradient, the graph begins at the taps: only what follows them is
    differentiated. A module that is called several times is tapped at its last call. Raises
    UsageError for a layer that does not exist, is not called or returns no tensor, and for a
    model without an output [N, K].
    """
    model.check_layers(layers)
    if not layers and model.reading is None and "answering" not in model.known:
        # The graph of the first pass tells what kind of answer it is.
        inputs = inputs if inputs.requires_grad else inputs.detach().requires_grad_()
    pieces: dict[str, list[Tensor]] = {layer: [] for layer in layers}
    answers = []
    for piece in _pieces(inputs, model.batch):
        seen: dict[str, Tensor] = {}
        taps = {layer: _keeper(seen, layer) for layer in layers}
        with torch.enable_grad():
            # A copy: some models normalise what they are given in place.
            answers.append(model.forward(piece.clone(), taps))
        for layer in layers:
            if layer not in seen:
                raise UsageError(
                    f"layer {quoted(layer)} is not called in the forward pass, or returns no "
                    "tensor; `gradscope layers` lists the layers that do"
                )
            pieces[layer].append(seen[layer])
    found = [model.scores(answer) for answer in answers]
    values = torch.cat([scores.values for scores in found])[: len(inputs)]
    kept = {layer: tuple(seen) for layer, seen in pieces.items()}
    return Pass(Scores(values, found[0].head), kept)


def answer_of(model: Model, inputs: Tensor) -> Any:
    """What a held model returns for the first images, with its graph."""
    piece = next(_pieces(inputs, model.batch)).detach().requires_grad_()
    with torch.enable_grad():
        return model.forward(piece.clone(), {})


def _keeper(seen: dict[str, Tensor], layer: str) -> Tap:
    def keep(output: Tensor) -> Tensor | None:
        if not output.is_floating_point():
            seen[layer] = output.dequantize() if output.is_quantized else output.float()
            return None
        kept = output if output.requires_grad else output.detach().requires_grad_()
        seen[layer] = kept
        # Pass on a copy: what follows may write to it in place.
        return kept.clone()

    return keep


def _pieces(inputs: Tensor, batch: int | None) -> Iterator[Tensor]:
    """Batches of the size that the model takes; the last is padded with its last image."""
    if batch is None or batch == len(inputs):
        yield inputs
        return
    for piece in inputs.split(batch):
        lacking = batch - len(piece)
        yield torch.cat([piece, piece[-1:].expand(lacking, *piece.shape[1:])]) if lacking else piece


def first_not_finite(model: Model, inputs: Tensor) -> str | None:
    """The first layer, in the order of the calls, whose output is not finite; None without one."""
    found: list[str] = []

    def look(name: str) -> Tap:
        def tap(output: Tensor) -> None:
            values = output.dequantize() if output.is_quantized else output
            if not found and not bool(torch.isfinite(values).all()):
                found.append(name)

        return tap

    with torch.no_grad():
        for piece in _pieces(inputs, model.batch):
            model.forward(piece.clone(), {name: look(name) for name in model.layers})
    return next(iter(found), None)
