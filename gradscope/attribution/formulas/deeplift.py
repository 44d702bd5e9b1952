"""DeepLIFT's rescale rule over the operators that ran. Values [N, C, H, W].

Two recorded passes, one of the image and one of the reference, are compared step by step. What an
operator does not do linearly gets the slope between its two results in place of its derivative, so
that the values add up to the difference of the scores.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from gradscope.attribution.formulas.gradients import Result, added_up
from gradscope.attribution.formulas.operators import Kind, kind
from gradscope.attribution.formulas.propagation import beginning, slopes
from gradscope.attribution.formulas.references import references
from gradscope.attribution.formulas.sharing import arriving, normed
from gradscope.attribution.subject import Subject
from gradscope.errors import NotApplicableError
from gradscope.models.tape import Step, Tape, record

#: A step of the image's pass, the same of the reference's, the results' multipliers.
Rescaling = Callable[[Step, Step, list[Tensor | None]], Sequence[Tensor]]
#: Differences below this have no slope; the derivative stands in.
_NO_DIFFERENCE = 1e-10
_EXTREMES = {
    "_adaptive_max_pool2d": torch.maximum, "adaptive_max_pool2d": torch.maximum,
    "amax": torch.maximum, "max": torch.maximum, "max_pool2d_with_indices": torch.maximum,
    "maximum": torch.maximum, "minimum": torch.minimum,
}  # fmt: skip


def deeplift(subject: Subject, *, reference: str | Tensor, draws: int) -> Result:
    """(x - x') times multipliers, chained backwards: a slope (f(x) - f(x')) / (x - x') each.

    The factors of a product get half of each other's sum over both passes; softmax and norms are
    taken apart into exponentials, sums, squares, roots and products.
    """
    bases = references(subject, reference, draws)
    total = torch.zeros_like(subject.inputs)
    deltas, changes = total.new_zeros((2, len(bases), len(total)), dtype=torch.double)
    for image in range(len(total)):
        tape = record(subject.model, subject.inputs[image : image + 1])
        for number, base in enumerate(bases):
            other = record(subject.model, base[image : image + 1])
            values, change = _compared(subject, image, tape, other)
            part = (subject.inputs[image] - base[image]) * values
            total[image] += part / len(bases)
            changes[number, image] = change
            deltas[number, image] = part.double().sum() - change
        subject.tick(image + 1, len(total))
    return total, added_up(deltas, changes)


def _compared(subject: Subject, image: int, tape: Tape, other: Tape) -> tuple[Tensor, float]:
    """The multipliers of the pixels [C, H, W], and the difference of the scores."""
    twins = _twins(tape, other)
    value, logits = beginning(tape)
    _, before = beginning(other)
    start = slopes(subject, image, logits)
    change = float(((logits - before) * start)[0].double().sum())

    def through(step: Step, given: list[Tensor | None]) -> Sequence[Tensor]:
        return _RESCALING[kind(step)](step, twins[id(step)], given)

    return tape.back({value: start}, through)[0].detach(), change


def _twins(tape: Tape, other: Tape) -> Mapping[int, Step]:
    """The reference's step for each of the image's. Raises NotApplicableError where they differ."""
    same = len(tape.steps) == len(other.steps) and all(
        a.name == b.name and a.inputs == b.inputs and a.outputs == b.outputs
        for a, b in zip(tape.steps, other.steps, strict=True)
    )
    if not same:
        raise NotApplicableError(
            "the model computes something else for the reference than for the image, so that they "
            "cannot be compared; use integrated-gradients"
        )
    return {id(a): b for a, b in zip(tape.steps, other.steps, strict=True)}


def _linear(step: Step, other: Step, given: list[Tensor | None]) -> Sequence[Tensor]:
    for at, mine in enumerate(step.leaves):
        if isinstance(mine, Tensor) and at not in step.inputs and not _same(mine, other.leaves[at]):
            raise NotApplicableError(
                f"{step.name} chooses by the image, and chooses otherwise for the reference; use "
                "integrated-gradients"
            )
    return step.pull(given)


def _same(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() or torch.equal(a, b)


def _moved(step: Step, other: Step, given: list[Tensor | None]) -> Sequence[Tensor]:
    """A maximum is shared by where it lies in both passes (Shrikumar et al.'s code)."""
    extreme = _EXTREMES.get(step.name)
    if extreme is None:
        return _linear(step, other, given)
    m, result, before = arriving(given), step.results[0], other.results[0]
    top = extreme(result, before)
    rest = [None] * (len(step.results) - 1)
    parts = zip(
        step.taken, other.taken, step.pull([m * (top - before), *rest]),
        other.pull([m * (result - top), *rest]), step.pull([m, *rest]), strict=True,
    )  # fmt: skip
    return [_ratio(a + b, x - y, slope) for x, y, a, b, slope in parts]


def _rescaled(step: Step, other: Step, given: list[Tensor | None]) -> Sequence[Tensor]:
    m = arriving(given)
    change = m * (step.results[0] - other.results[0])
    return [_ratio(change, step.taken[0] - other.taken[0], step.pull(given)[0])]


def _ratio(change: Tensor, difference: Tensor, derivative: Tensor) -> Tensor:
    none = difference.abs() < _NO_DIFFERENCE
    return torch.where(none, derivative, change / torch.where(none, 1.0, difference))


def _multiplied(step: Step, other: Step, given: list[Tensor | None]) -> Sequence[Tensor]:
    here, there = step.pull(given), other.pull(given)
    a, b = ((p + q) / 2 for p, q in zip(here, there, strict=True))
    if step.name != "div":
        return [a, b]
    (x, y), (x_, y_) = step.taken, other.taken
    # The inverse's slope is -1 / (y y'), whatever the difference.
    return [a, (-(x + x_) / (2 * y * y_) * arriving(given)).sum_to_size(y.shape)]


def _softened(step: Step, other: Step, given: list[Tensor | None]) -> Sequence[Tensor]:
    dimension, m = step.arguments[1], arriving(given).double()
    x, y = step.taken[0].double(), other.taken[0].double()
    top = torch.maximum(x, y).amax(dimension, keepdim=True)
    e, f = (x - top).exp(), (y - top).exp()
    whole, before = e.sum(dimension, keepdim=True), f.sum(dimension, keepdim=True)
    shrunk = (m * (e + f)).sum(dimension, keepdim=True) / (2 * whole * before)
    slope = m * (1 / whole + 1 / before) / 2 - shrunk
    return [_ratio(slope * (e - f), x - y, slope * e).to(step.taken[0].dtype)]


def _normalised(step: Step, other: Step, given: list[Tensor | None]) -> Sequence[Tensor]:
    c, root, weight, centred = normed(step)
    d, other_root, _, _ = normed(other)
    m = (weight * arriving(given)).reshape(c.shape)
    by_root = (m * (c + d)).sum(-1, keepdim=True) / 2
    # (v + e)^-1/2 between both variances; the variance is the mean of squares.
    by_variance = -by_root * root**2 * other_root**2 / (root + other_root)
    found = m * (root + other_root) / 2 + by_variance * (c + d) / c.shape[-1]
    found = found - found.mean(-1, keepdim=True) if centred else found
    return [found.view_as(step.taken[0])]


def _lengthened(step: Step, other: Step, given: list[Tensor | None]) -> Sequence[Tensor]:
    (a,), (b,), m = step.results, other.results, arriving(given)
    whole = torch.where(a + b > 0, a + b, 1.0)
    pairs = zip(step.pull([m * a / whole]), other.pull([m * b / whole]), strict=True)
    return [p + q for p, q in pairs]


_RESCALING: Mapping[Kind, Rescaling] = {
    Kind.MOVE: _moved,
    Kind.ACTIVATION: _rescaled,
    Kind.LINEAR: _linear,
    Kind.LAYER: _linear,
    Kind.PRODUCT: _multiplied,
    Kind.NORM: _normalised,
    Kind.BATCH_NORM: _linear,
    Kind.LENGTH: _lengthened,
    Kind.SOFTMAX: _softened,
}
