"""Relevance in transformers: AttnLRP at the pixels, and Chefer et al.'s at the patches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import reduce

import torch
from torch import Tensor

from gradscope.attribution.formulas.attention import one_map, stacked
from gradscope.attribution.formulas.gradients import Result
from gradscope.attribution.formulas.lrp import SMALL
from gradscope.attribution.formulas.operators import Kind
from gradscope.attribution.formulas.propagation import (
    Composite,
    Relevance,
    beginning,
    propagated,
    slopes,
)
from gradscope.attribution.formulas.relevance import Rule, alpha_beta_rule, epsilon_rule, gamma_rule
from gradscope.attribution.formulas.sharing import Shares, arriving, contributed, passed
from gradscope.attribution.subject import Subject
from gradscope.errors import NotApplicableError, UsageError
from gradscope.models.attention_weights import is_attention
from gradscope.models.tape import Step, record


def attention_lrp(
    subject: Subject, *, gamma: float, convolution_gamma: float, epsilon: float
) -> Result:
    """lrp, with R_i = x_i (R_i - s_i sum R) through softmax s and half for each factor of A V, Q K.

    Values [N, C, H, W]. The gamma rule in dense layers and the patches' convolution takes away much
    of the noise; with 0 it is the epsilon rule.
    """
    if min(gamma, convolution_gamma, epsilon) < 0:
        raise UsageError("gamma, convolution_gamma and epsilon have to be at least 0")

    def rule(gamma: float) -> Rule:
        return gamma_rule(gamma, epsilon) if gamma else epsilon_rule(epsilon)

    return propagated(subject, Composite(rule(convolution_gamma), rule(gamma)), Kind.SOFTMAX)


def relevance(subject: Subject) -> Result:
    """A_L ... A_1, A_b = I + E_h[(dS/dA_b * R_b)+], R_b the relevance of block b's weights.

    R_b is that of the z+ rule from one at the target (eq. 5-9 of the paper); norms, activations and
    softmax pass it on, biases get none. Values [N, h, w] in the geometry of the patches.
    """
    return stacked([_relevant(subject, image) for image in range(len(subject.inputs))])


def _relevant(subject: Subject, image: int) -> Result:
    def formula(weights: Sequence[Tensor], gradients: Sequence[Tensor], _: int) -> Tensor:
        weighed = list(_of_weights(subject, image))
        if len(weighed) != len(weights):
            raise NotApplicableError("relevance does not reach the attention of every block")
        pairs = zip(gradients, weighed, strict=True)
        blocks = (_with_skip((g * r).relu().mean(0)) for g, r in pairs)
        return reduce(lambda product, block: block @ product, blocks)

    return one_map(subject, image, formula)


def _with_skip(weights: Tensor) -> Tensor:
    return weights + torch.eye(len(weights), dtype=weights.dtype, device=weights.device)


def _of_weights(subject: Subject, image: int) -> Iterator[Tensor]:
    """The relevance of each block's attention weights [heads, T, T], the first block's first."""
    tape = record(subject.model, subject.inputs[image : image + 1])
    batch, kept = len(tape.logits), list[Tensor]()

    def keep(step: Step, given: list[Tensor | None]) -> Shares:
        if is_attention(step.results[0]):
            arrived = arriving(given)
            kept.append(arrived.reshape(batch, -1, *arrived.shape[-2:])[0])
        return passed(step, given)

    composite = Composite(
        alpha_beta_rule(1, SMALL), alpha_beta_rule(1, SMALL), biases=False,
        others={Kind.SOFTMAX: keep, Kind.NORM: passed, Kind.LINEAR: _balanced},
    )  # fmt: skip
    value, logits = beginning(tape)
    start = {value: slopes(subject, image, logits)}
    tape.back(start, Relevance(tape, composite).through)
    yield from reversed(kept)


def _balanced(step: Step, given: list[Tensor | None]) -> Shares:
    """The parts of a sum, scaled so that together they carry what arrived (eq. 9)."""
    found, constants = contributed(step, given)
    if len(found) < 2:
        return found, constants
    whole = sum(part.sum() for part in given if part is not None)
    totals = [part.sum() for part in found]
    size = sum(total.abs() for total in totals)
    return [
        part * torch.where(total * size != 0, total.sign() * whole / size, 0.0)
        for part, total in zip(found, totals, strict=True)
    ], constants
