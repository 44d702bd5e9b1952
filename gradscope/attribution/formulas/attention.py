"""Maps of a vision transformer's attention: one block's, or all of them multiplied.

Values [N, h, w] in the geometry of the patches. Whose attention is shown is measured, not assumed:
that of the tokens that the score reads after the last block, which are the class token, class and
distillation token, or the patches themselves in a model that averages them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce

import torch
from torch import Tensor

from gradscope.attribution.formulas.gradients import Result
from gradscope.attribution.subject import Subject
from gradscope.errors import NotApplicableError, UsageError
from gradscope.models.attention_weights import attentions
from gradscope.models.layers import has_others_behind
from gradscope.models.layout import Layout, layout_of
from gradscope.text import plural

#: Weights and their gradients [blocks][heads, T, T], number of prefix tokens -> [T, T].
Formula = Callable[[tuple[Tensor, ...], tuple[Tensor, ...], int], Tensor]


def fused(weights: Tensor, fusion: str) -> Tensor:
    """Weights [heads, T, T] as one head [T, T]: the mean, maximum or minimum over heads."""
    if fusion == "mean":
        return weights.mean(0)
    return weights.amax(0) if fusion == "max" else weights.amin(0)


def attention(subject: Subject, *, block: int, fusion: str) -> Result:
    """One block's weights, F_b; the heads fused."""

    def formula(weights: tuple[Tensor, ...], _: tuple[Tensor, ...], __: int) -> Tensor:
        if not -len(weights) <= block < len(weights):
            raise UsageError(f"no block {block}: the model has {plural(len(weights), 'block')}")
        return fused(weights[block], fusion)

    return _mapped(subject, formula)


def attention_rollout(subject: Subject, *, fusion: str, discard: float) -> Result:
    """R = A_L ... A_1, A_l the row-normalised 1/2 F_l + 1/2 I."""
    if not 0 <= discard < 1:
        raise UsageError(f"discard is a fraction of at least 0 and below 1, not {discard:g}")

    def formula(weights: tuple[Tensor, ...], _: tuple[Tensor, ...], prefix: int) -> Tensor:
        return rollout([without_least(fused(w, fusion), discard, prefix) for w in weights])

    return _mapped(subject, formula)


def rollout(blocks: list[Tensor]) -> Tensor:
    """The product of single-head weights [T, T], residuals included, last block leftmost."""

    def with_residual(weights: Tensor) -> Tensor:
        mixed = weights + torch.eye(len(weights), dtype=weights.dtype, device=weights.device)
        return mixed / mixed.sum(-1, keepdim=True)

    return reduce(lambda product, block: block @ product, map(with_residual, blocks))


def without_least(weights: Tensor, share: float, prefix: int) -> Tensor:
    """Weights [T, T] with the smallest ``share`` of each row's patch weights set to zero.

    Weights for prefix tokens (the first ``prefix``), which have no position, stay.
    """
    count = int(share * (weights.shape[-1] - prefix))
    if count == 0:
        return weights
    least = weights[:, prefix:].argsort(dim=-1, stable=True)[:, :count] + prefix
    return weights.scatter(1, least, 0.0)


def gradient_rollout(subject: Subject) -> Result:
    """R <- R + E_h[(dS/dA * A)+] R through the blocks, from R = I."""

    def formula(weights: tuple[Tensor, ...], gradients: tuple[Tensor, ...], _: int) -> Tensor:
        relevance = torch.eye(weights[0].shape[-1], dtype=weights[0].dtype).to(weights[0])
        for weight, gradient in zip(weights, gradients, strict=True):
            relevance = relevance + (gradient * weight).relu().mean(0) @ relevance
        return relevance

    return _mapped(subject, formula)


def _mapped(subject: Subject, formula: Formula) -> Result:
    return stacked([one_map(subject, image, formula) for image in range(len(subject.inputs))])


def stacked(found: Sequence[Result]) -> Result:
    """The maps of several images, with what is said of the first."""
    return torch.stack([values for values, _ in found]), found[0][1]


def one_map(subject: Subject, image: int, formula: Formula) -> Result:
    """The map [h, w] of one image: weights take memory quadratic in the tokens."""
    seen = attentions(subject.model, subject.inputs[image : image + 1])
    objective = subject.objective(seen.logits, subject.images[image : image + 1]).sum()
    weights, gradients = seen.weights, seen.gradients(objective)
    layout = _layout(subject, weights[0].shape[-1])
    readers = _readers(gradients[-1], layout.prefix)
    rows = formula(weights, gradients, layout.prefix)[readers].mean(0)
    facts = {
        "blocks": len(weights),
        "heads": len(weights[0]),
        "tokens": len(rows),
        "read_by": _described(readers.tolist(), layout.prefix),
    }
    return rows[layout.prefix :].reshape(layout.grid), facts


def _layout(subject: Subject, tokens: int) -> Layout:
    found = layout_of((1, tokens, 1), (1, *subject.inputs.shape[1:]))
    if found is None:
        raise NotApplicableError(
            f"{tokens} tokens do not form a grid of square patches over an image of "
            f"{subject.inputs.shape[2]}×{subject.inputs.shape[3]}"
        )
    if found.prefix > 1 and has_others_behind(subject.model, subject.inputs, tokens):
        raise NotApplicableError(
            "learned tokens follow those of the patches (a detector's), so that places cannot be "
            "told"
        )
    return found


def _readers(gradient: Tensor, prefix: int) -> Tensor:
    """Indices of the tokens that the score reads: those with a gradient in the last block."""
    read = (gradient != 0).any(-1).any(0)
    tokens = torch.arange(len(read), device=read.device)
    if prefix and not read[prefix:].any():
        return tokens[:prefix][read[:prefix]] if read.any() else tokens[:1]
    return tokens[prefix:]


def _described(readers: list[int], prefix: int) -> str:
    if readers[0] >= prefix:
        return "patches"
    return f"token{'s' * (len(readers) > 1)} {', '.join(map(str, readers))}"
