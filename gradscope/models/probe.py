"""Activations and gradients at named layers, leaving the model as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gradscope.errors import UsageError
from gradscope.models.model import Model
from gradscope.models.precision import HALF
from gradscope.text import quoted

#: What a model returns: logits, probabilities, or one logit for "yes".
Head = Literal["logits", "probabilities", "binary"]


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
    """One forward pass: logits [N, K] and the outputs of each tapped layer, piece by piece.

    Pieces are the batches of a model with a fixed batch size; otherwise there is one.
    """

    logits: Tensor
    head: Head
    pieces: Mapping[str, tuple[Tensor, ...]]

    def gradients(self, objective: Tensor, layer: str) -> tuple[Tensor, ...]:
        """Gradients of a scalar by a layer's pieces; zero where it does not depend on one.

        Keeps the graph for other objectives.
        """
        of = self.pieces[layer]
        found = torch.autograd.grad(objective, of, retain_graph=True, allow_unused=True)
        pairs = zip(of, found, strict=True)
        return tuple(torch.zeros_like(t) if g is None else g.detach() for t, g in pairs)

    @property
    def probabilities(self) -> Tensor:
        """Probabilities [N, K] of the classes."""
        if self.head == "probabilities":
            return self.logits
        return self.logits.sigmoid() if self.head == "binary" else self.logits.softmax(1)


def run(model: Model, inputs: Tensor, layers: Sequence[str] = ()) -> Pass:
    """A forward pass of a held model with taps at ``layers``.

    Where the inputs need no gradient, the graph begins at the taps: only what follows them is
    differentiated. A module that is called several times is tapped at its last call. Raises
    UsageError for a layer that does not exist, is not called or returns no tensor, and for a
    model whose output is not an [N, K] tensor.
    """
    model.check_layers(layers)
    pieces: dict[str, list[Tensor]] = {layer: [] for layer in layers}
    answers = []
    for piece in _pieces(inputs, model.batch):
        seen: dict[str, Tensor] = {}
        with torch.enable_grad():
            answers.append(model.forward(piece, {layer: _keeper(seen, layer) for layer in layers}))
        for layer in layers:
            if layer not in seen:
                raise UsageError(
                    f"layer {quoted(layer)} is not called in the forward pass, or returns no "
                    "tensor; `gradscope layers` lists the layers that do"
                )
            pieces[layer].append(seen[layer])
    found = [logits_of(answer) for answer in answers]
    logits = torch.cat([logits for logits, _ in found])[: len(inputs)]
    return Pass(logits, found[0][1], {layer: tuple(kept) for layer, kept in pieces.items()})


def _keeper(seen: dict[str, Tensor], layer: str) -> Callable[[Tensor], Tensor]:
    def keep(output: Tensor) -> Tensor:
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


def logits_of(output: Any) -> tuple[Tensor, Head]:
    """The scores [N, K] in a model's output, K at least 2, and what kind of numbers they are.

    A single logit becomes two, its negative for "no" first. Raises UsageError for other outputs.
    """
    answer = _first_tensor(output)
    if answer is None or (answer.dim() not in (1, 2) and answer.shape[2:].numel() != 1):
        shape = type(output).__name__ if answer is None else list(answer.shape)
        raise UsageError(
            f"the model returns {shape}; attribution needs one score for each class, "
            "[N, classes]: is it an image classifier?"
        )
    logits = answer.reshape(len(answer), -1).float() if answer.dtype in HALF else answer
    logits = logits.reshape(len(answer), -1)
    if logits.shape[1] == 1:
        return torch.cat([-logits, logits], 1), "binary"
    return logits, "probabilities" if _are_probabilities(logits.detach()) else "logits"


def _first_tensor(output: Any) -> Tensor | None:
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping):
        output = output["logits"] if "logits" in output else next(iter(output.values()), None)
    elif hasattr(output, "logits"):
        output = output.logits
    elif isinstance(output, tuple | list):
        output = output[0] if output else None
    return output if isinstance(output, Tensor) else None


def _are_probabilities(logits: Tensor) -> bool:
    return bool((logits >= 0).all() and ((logits.sum(1) - 1).abs() < 1e-4).all())
