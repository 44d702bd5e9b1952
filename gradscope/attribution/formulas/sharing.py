"""How relevance is shared by what an operator without weights took, by the kind of operator.

Linear operators share by contribution (the epsilon rule). Products and softmax follow AttnLRP
(Achtibat et al. 2024, arXiv:2402.05602): the factors of a product get half each (eq. 7), softmax is
decomposed at the image's own values (eq. 13), norms are linear at the image's own scale (eq. 9).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from gradscope.attribution.formulas.operators import Kind
from gradscope.attribution.formulas.relevance import stabilised
from gradscope.models.tape import Step

#: The relevance of each tensor taken, and that of constants.
Shares = tuple[Sequence[Tensor], float]
#: A step and the relevance of its results (None where nothing arrived) -> shares.
Sharing = Callable[[Step, list[Tensor | None]], Shares]

_SMALL = 1e-6


def arriving(given: Sequence[Tensor | None]) -> Tensor:
    """The relevance of an operator's first result."""
    return next(part for part in given if part is not None)


def passed(_: Step, given: list[Tensor | None]) -> Shares:
    """All of it, element by element."""
    return [arriving(given)], 0.0


def moved(step: Step, given: list[Tensor | None]) -> Shares:
    """To where each element came from; what came from a constant is that constant's."""
    found = step.pull(given)
    return found, _total(given) - _total(found)


def contributed(step: Step, given: list[Tensor | None]) -> Shares:
    """In proportion to what each element adds to the result."""
    each = [
        None if relevance is None else relevance / stabilised(z, _SMALL)
        for relevance, z in zip(given, step.results, strict=True)
    ]
    found = [x * p for x, p in zip(step.taken, step.pull(each), strict=True)]
    alone = step.apply([torch.zeros_like(x) for x in step.taken])
    return found, _total(b * e for b, e in zip(alone, each, strict=True) if e is not None)


def halved(step: Step, given: list[Tensor | None]) -> Shares:
    """Half to each factor; of a quotient, half to the inverse of the divisor."""
    (z,) = step.results
    pulled = step.pull([arriving(given) / stabilised(2 * z, 2 * _SMALL)])
    sign = -1 if step.name == "div" else 1
    a, b = (x * p for x, p in zip(step.taken, pulled, strict=True))
    # A matrix product may have a bias that is added to it.
    return [a, sign * b], _total(given) - _total([a, sign * b])


def normalised(step: Step, given: list[Tensor | None]) -> Shares:
    """In proportion to what each element adds to the result, the scale taken as given."""
    x, each = step.taken[0], arriving(given) / stabilised(step.results[0], _SMALL)
    weight, shift, dimensions = _affine(step)
    _, root, _, centred = normed(step)
    pulled = (weight * each).reshape(dimensions)
    pulled = (pulled - pulled.mean(-1, keepdim=True) if centred else pulled) * root
    return [x * pulled.view_as(x)], _total([shift * each])


def normed(step: Step) -> tuple[Tensor, Tensor, Tensor, bool]:
    """What a norm scales [groups…, M], by how much [groups…, 1], its weight, and if it centres."""
    weight, _, dimensions = _affine(step)
    x, centred = step.taken[0].reshape(dimensions), step.name != "_fused_rms_norm"
    root = step.results[-1].reshape(*x.shape[:-1], 1)
    return (x - x.mean(-1, keepdim=True) if centred else x), root, weight, centred


def _affine(step: Step) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    """A norm's weight and bias, as they are multiplied and added, and [groups…, what is normed]."""
    x = step.taken[0]
    if step.name == "native_group_norm":
        _, weight, bias, count, _, _, groups, _ = step.arguments
        wide: tuple[int, ...] = (1, -1, *(1 for _ in x.shape[2:]))
        return *_or(x, weight, bias, wide), (count, groups, -1)
    _, shape, weight, *bias = step.arguments
    kept = x.shape[: x.dim() - len(shape)]
    return *_or(x, weight, bias[0] if len(bias) > 1 else None, tuple(shape)), (*kept, -1)


def _or(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, shape: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    one, zero = x.new_ones(()), x.new_zeros(())
    return (
        one if weight is None else weight.view(shape),
        zero if bias is None else bias.view(shape),
    )


def softened(step: Step, given: list[Tensor | None]) -> Shares:
    """x_i (R_i - s_i sum R): softmax, linear at the image's own x; the rest is its constant's."""
    relevance = arriving(given)
    dimension = step.arguments[1]
    total = relevance.sum(dimension, keepdim=True)
    found = step.taken[0] * (relevance - step.results[0] * total)
    return [found], _total([relevance]) - _total([found])


def _total(parts: Iterable[Tensor | None]) -> float:
    return sum(float(part.detach().double().sum()) for part in parts if part is not None)


#: The sharing of each kind but layers.
SHARING: Mapping[Kind, Sharing] = {
    Kind.MOVE: moved,
    Kind.ACTIVATION: passed,
    Kind.LINEAR: contributed,
    Kind.PRODUCT: halved,
    Kind.NORM: normalised,
    Kind.BATCH_NORM: passed,
    Kind.LENGTH: contributed,
    Kind.SOFTMAX: softened,
}
