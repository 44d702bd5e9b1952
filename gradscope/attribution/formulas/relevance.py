"""Rules of layer-wise relevance propagation: how a layer's relevance is shared by what it took.

Each rule of a layer is one or two shares of the relevance R of its results, in proportion to
contributions that it defines: x_j <- x_j sum_k w_jk R_k / (z_k ± e), z_k the sum of all of them and
of the bias. What a share gives to biases is told, so that relevance can be accounted for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import reduce

import torch
from torch import Tensor

from gradscope.attribution.formulas.operators import BATCH_NORMS, CONVOLUTIONS, is_layer
from gradscope.models.tape import Step

_aten = torch.ops.aten
#: What arrives at the layer's input, and what goes to its bias.
Shared = tuple[Tensor, Tensor]


@dataclass(frozen=True, eq=False, slots=True)
class Layer:
    """A convolution or dense layer, the batch norm behind it folded in."""

    x: Tensor
    weight: Tensor
    #: As wide as it takes to be added to the results.
    bias: Tensor
    #: Input and weight -> results without a bias.
    product: Callable[[Tensor, Tensor], Tensor]
    convolution: bool


#: A rule: a layer and the relevance of its results -> what its input and its bias get.
Rule = Callable[[Layer, Tensor], Shared]
#: An input, a weight and a bias, whose product is one part of the contributions.
Part = tuple[Tensor, Tensor, Tensor]


def stabilised(z: Tensor, epsilon: float) -> Tensor:
    """A denominator: moved away from zero by epsilon, zero itself upwards."""
    return z + torch.where(z < 0, -epsilon, epsilon)


def shared(layer: Layer, parts: Sequence[Part], relevance: Tensor, epsilon: float) -> Shared:
    """Relevance shared in proportion to the contributions of ``parts``, their biases included."""
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_() for x, _, _ in parts]
        made = [
            layer.product(leaf, weight)
            for leaf, (_, weight, _) in zip(leaves, parts, strict=True)
        ]  # fmt: skip
    bias = reduce(torch.add, (b for _, _, b in parts))
    z = reduce(torch.add, (m.detach() for m in made)) + bias
    each = relevance / stabilised(z, epsilon)
    pulled = torch.autograd.grad(made, leaves, [each] * len(made))
    found = reduce(torch.add, (x * p for (x, _, _), p in zip(parts, pulled, strict=True)))
    return found, bias * each


def epsilon_rule(epsilon: float) -> Rule:
    """Bach et al. 2015, eq. 58: contributions x_j w_jk."""

    def rule(layer: Layer, relevance: Tensor) -> Shared:
        return shared(layer, [(layer.x, layer.weight, layer.bias)], relevance, epsilon)

    return rule


def gamma_rule(gamma: float, epsilon: float) -> Rule:
    """Montavon et al. 2019, for inputs of both signs as in Andéol et al. 2021.

    What speaks for the sign of a result counts 1 + gamma times.
    """

    def rule(layer: Layer, relevance: Tensor) -> Shared:
        z = layer.product(layer.x, layer.weight) + layer.bias
        up, down = (_favoured(layer, sign, gamma) for sign in (1, -1))
        above = shared(layer, up, relevance * (z > 0), epsilon)
        below = shared(layer, down, relevance * (z < 0), epsilon)
        return above[0] + below[0], above[1] + below[1]

    return rule


def _favoured(layer: Layer, sign: int, gamma: float) -> list[Part]:
    """Contributions with those of one sign 1 + gamma times as large."""

    def more(values: Tensor, towards: int) -> Tensor:
        return values + gamma * (values.clamp(min=0) if towards > 0 else values.clamp(max=0))

    positive, negative = layer.x.clamp(min=0), layer.x.clamp(max=0)
    return [
        (positive, more(layer.weight, sign), more(layer.bias, sign)),
        (negative, more(layer.weight, -sign), torch.zeros_like(layer.bias)),
    ]


def alpha_beta_rule(alpha: float, epsilon: float) -> Rule:
    """Bach et al. 2015, eq. 60: positive contributions alpha times, negative ones alpha - 1 times.

    With alpha 1 it is the z+ rule.
    """

    def rule(layer: Layer, relevance: Tensor) -> Shared:
        up, down = (shared(layer, _of_sign(layer, s), relevance, epsilon) for s in (1, -1))
        pairs = zip(up, down, strict=True)
        above, bias = (alpha * u - (alpha - 1) * d for u, d in pairs)
        return above, bias

    return rule


def _of_sign(layer: Layer, sign: int) -> list[Part]:
    """Contributions of one sign."""

    def only(values: Tensor, towards: int) -> Tensor:
        return values.clamp(min=0) if towards > 0 else values.clamp(max=0)

    return [
        (only(layer.x, 1), only(layer.weight, sign), only(layer.bias, sign)),
        (only(layer.x, -1), only(layer.weight, -sign), torch.zeros_like(layer.bias)),
    ]


def box_rule(low: Tensor, high: Tensor, epsilon: float) -> Rule:
    """Montavon et al. 2017, z^B: contributions x_j w_jk - l_j w_jk+ - h_j w_jk-, pixels in l..h."""

    def rule(layer: Layer, relevance: Tensor) -> Shared:
        nothing = torch.zeros_like(layer.bias)
        weight = layer.weight
        return shared(
            layer,
            [
                (layer.x, weight, nothing),
                (low.expand_as(layer.x), -weight.clamp(min=0), nothing),
                (high.expand_as(layer.x), -weight.clamp(max=0), nothing),
            ],
            relevance,
            epsilon,
        )

    return rule


def flat_rule(epsilon: float) -> Rule:
    """Lapuschkin et al. 2019: everything that a result reads contributes the same."""

    def rule(layer: Layer, relevance: Tensor) -> Shared:
        ones = torch.ones_like(layer.x), torch.ones_like(layer.weight)
        return shared(layer, [(*ones, torch.zeros_like(layer.bias))], relevance, epsilon)

    return rule


def layer_of(step: Step, norm: Step | None = None) -> Layer:
    """A step with constant weights as a layer, with the batch norm that reads it folded in."""
    if step.name in CONVOLUTIONS:
        x, weight, bias, *rest = step.arguments[:9]

        def convolved(x: Tensor, weight: Tensor) -> Tensor:
            return torch.as_tensor(_aten.convolution(x, weight, None, *rest))

        wide = (1, -1, *(1 for _ in weight.shape[2:]))
        shift = weight.new_zeros(wide[:1] * len(wide)) if bias is None else bias.view(wide)
        layer = Layer(x, weight, shift, convolved, convolution=True)
        return layer if norm is None else _folded(layer, norm, int(rest[3]))
    layer = _dense(step)
    return layer if norm is None else _folded(layer, norm, 1)


def _dense(step: Step) -> Layer:
    """A matrix product; where a bias is added to it, that comes first."""
    *added, a, b = step.leaves
    bias = added[0] if added else a.new_zeros(1)
    if len(step.leaves) - 1 in step.inputs:
        return Layer(b, a, bias, lambda x, weight: weight @ x, convolution=False)
    return Layer(a, b, bias, lambda x, weight: x @ weight, convolution=False)


def foldable(step: Step, norm: Step) -> bool:
    """Whether a batch norm can be folded into the layer that it reads."""
    if norm.name not in BATCH_NORMS or not is_layer(step):
        return False
    if step.name in CONVOLUTIONS:
        transposed, groups = step.arguments[6], step.arguments[8]
        return not transposed or groups == 1
    return step.name in ("addmm", "mm") and len(step.leaves) - 1 not in step.inputs


def _folded(layer: Layer, norm: Step, outputs: int) -> Layer:
    """The layer with a batch norm's scale and shift in its weight, along ``outputs``, and bias."""
    _, weight, bias, mean, variance, *_, epsilon = norm.arguments
    scale = (variance + epsilon).rsqrt() * (1 if weight is None else weight)
    wide = [1] * layer.weight.dim()
    wide[outputs] = -1
    results = [1] * layer.weight.dim()
    results[1] = -1
    shift = (layer.bias - mean.view(results)) * scale.view(results)
    return replace(
        layer,
        weight=layer.weight * scale.view(wide),
        bias=shift if bias is None else shift + bias.view(results),
    )
