"""Relevance, passed from the logits to the image over a recorded pass, and an account of it.

What does not arrive at the image went to biases and other constants, was lost to a stabiliser, or
shows that a rule does not fit: the account tells the first from the rest.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from gradscope.attribution.formulas.gradients import Result
from gradscope.attribution.formulas.operators import Kind, is_layer, kind, moves
from gradscope.attribution.formulas.relevance import Rule, foldable, layer_of
from gradscope.attribution.formulas.sharing import SHARING, Shares, Sharing, arriving
from gradscope.attribution.subject import Subject
from gradscope.errors import NotApplicableError
from gradscope.models.tape import Step, Tape, record

_SOFTMAXES = ("_softmax", "_log_softmax", "_safe_softmax")


@dataclass(frozen=True, eq=False, slots=True)
class Composite:
    """The rule of each kind of layer."""

    convolution: Rule
    dense: Rule
    #: That of layers before which there is none; and where they see the pixels as they are.
    first: Rule | None = None
    first_of_pixels: Rule | None = None
    #: Whether biases get a share; otherwise it goes to what they are added to.
    biases: bool = True
    #: Where a kind of operator is shared in another way.
    others: Mapping[Kind, Sharing] = field(default_factory=dict)


def propagated(subject: Subject, composite: Composite, needed: Kind | None = None) -> Result:
    """The relevance of each image's pixels [N, C, H, W], and the account.

    Raises UsageError for a model without the kind of operator that is ``needed``.
    """
    values, accounts = [], []
    for image in range(len(subject.inputs)):
        tape = record(subject.model, subject.inputs[image : image + 1])
        if needed is not None and not any(kind(step) is needed for step in tape.steps):
            raise NotApplicableError(f"the model has no {needed}; use lrp")
        found = Relevance(tape, composite)
        value, logits = beginning(tape)
        start = slopes(subject, image, logits) * logits
        values.append(tape.back({value: start}, found.through)[:1].detach())
        accounts.append(_account(float(start.double().sum()), values[-1], found.constants))
        subject.tick(image + 1, len(subject.inputs))
    return torch.cat(values), {name: [a[name] for a in accounts] for name in accounts[0]}


def beginning(tape: Tape) -> tuple[int, Tensor]:
    """The value that relevance starts from, and its tensor: the logits, before a softmax too."""
    maker = next((step for step in tape.steps if tape.answer in step.outputs), None)
    if maker is not None and maker.name in _SOFTMAXES:
        return next(iter(maker.inputs.values())), maker.taken[0].detach()
    return tape.answer, tape.logits


def slopes(subject: Subject, image: int, logits: Tensor) -> Tensor:
    """The derivative of one image's score by logits [N, K], whose first row is that image's."""
    with torch.enable_grad():
        leaf = logits.detach().clone().requires_grad_()
        score = subject.objective(leaf[:1], subject.images[image : image + 1]).sum()
    return torch.autograd.grad(score, leaf)[0]


def _account(score: float, values: Tensor, constants: float) -> dict[str, Any]:
    missing = float(values.double().sum()) + constants - score
    return {
        "completeness_delta": missing,
        "relative_delta": abs(missing / score) if score else None,
        "relevance_of_constants": constants / score if score else None,
    }


class Relevance:
    """Shares relevance step by step, and adds up what constants get."""

    def __init__(self, tape: Tape, composite: Composite) -> None:
        self.composite = composite
        self.constants = 0.0
        self.folded = dict(_folds(tape))
        self.first, self.of_pixels = _first_layers(tape)

    def through(self, step: Step, given: list[Tensor | None]) -> Sequence[Tensor]:
        """The relevance of what a step took, from that of its results."""
        found = kind(step)
        if found in self.composite.others:
            shares, constants = self.composite.others[found](step, given)
        elif found is Kind.LAYER:
            shares, constants = self._layer(step, arriving(given))
        else:
            shares, constants = SHARING[found](step, given)
        self.constants += constants
        return shares

    def _layer(self, step: Step, relevance: Tensor) -> Shares:
        layer = layer_of(step, self.folded.get(id(step)))
        if not self.composite.biases:
            layer = replace(layer, bias=torch.zeros_like(layer.bias))
        rule = self.composite.convolution if layer.convolution else self.composite.dense
        if id(step) in self.first:
            rule = self._first(step, rule) if layer.convolution else self.composite.first or rule
        found, bias = rule(layer, relevance)
        return [found], float(bias.double().sum())

    def _first(self, step: Step, rule: Rule) -> Rule:
        if self.composite.first_of_pixels is None:
            return self.composite.first or rule
        if id(step) not in self.of_pixels:
            raise NotApplicableError(
                "the model computes on its pixels before the first convolution, so that their "
                "range is not that of its inputs; use composite=epsilon-gamma"
            )
        return self.composite.first_of_pixels


def _folds(tape: Tape) -> Iterator[tuple[int, Step]]:
    """Batch norms by the layer that they are folded into, which nothing else reads."""
    makers = {value: step for step in tape.steps for value in step.outputs}
    readers: dict[int, list[Step]] = {}
    for step in tape.steps:
        for value in step.inputs.values():
            readers.setdefault(value, []).append(step)
    for value, reading in readers.items():
        maker = makers.get(value)
        if maker is not None and len(reading) == 1 and foldable(maker, reading[0]):
            yield id(maker), reading[0]


def _first_layers(tape: Tape) -> tuple[set[int], set[int]]:
    """The layers before which there is none, and those of them that see the pixels themselves."""
    first, of_pixels = set(), set()
    before, pixels = {tape.image}, {tape.image}
    for step in tape.steps:
        taken = set(step.inputs.values())
        if is_layer(step):
            first |= {id(step)} if taken <= before else set()
            of_pixels |= {id(step)} if taken <= pixels else set()
        elif taken <= before:
            before.update(step.outputs)
            pixels.update(step.outputs if moves(step) and taken <= pixels else ())
    return first, of_pixels
