"""AttnLRP and Chefer et al.'s relevance against the papers' formulas, written for one network."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from architectures import resnet18, vit_registers, vit_small
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from gradscope import attribute
from gradscope.attribution.formulas import sharing
from gradscope.attribution.formulas.transformers import _balanced
from gradscope.errors import UsageError
from gradscope.models.forms import as_model
from gradscope.models.tape import record

from .forms import FORMS, images, model, saved
from .oracles import oracle


def net(pool: str = "token") -> Any:
    torch.manual_seed(0)
    made = vit_registers(pool=pool)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if parameter.dim() == 2:
                parameter.mul_(3)
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
    return made.double().eval()


def image(count: int = 1) -> Tensor:
    return torch.randn((count, 3, 32, 48), generator=torch.Generator().manual_seed(1)).double()


def close(found: Any, wanted: Any, tolerance: float = 1e-9) -> None:
    found, wanted = np.asarray(found), np.asarray(wanted.detach())
    scale = np.abs(wanted).max()
    assert scale > 0
    np.testing.assert_allclose(found, wanted, rtol=0, atol=tolerance * scale)


# --- AttnLRP --------------------------------------------------------------------------------------
# Each rule is a part of the network whose derivative is detached: then relevance is the input times
# the gradient (the paper's appendix). Nothing of this is how gradscope computes it.


def halved(product: Tensor) -> Tensor:
    return product / 2 + (product / 2).detach()


def identity(function: Any, x: Tensor) -> Tensor:
    return x * (function(x) / x).detach()


def normed(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    scale = (centred.square().mean(-1, keepdim=True) + norm.eps).rsqrt()
    return centred * scale.detach() * norm.weight + norm.bias


def attnlrp(vit: Any, x: Tensor, target: int) -> Tensor:
    leaf = x.clone().requires_grad_()
    patches = vit.patch_embed(leaf).flatten(2).transpose(1, 2) + vit.pos_embed
    tokens = torch.cat([vit.prefix_tokens.expand(len(x), -1, -1), patches], 1)
    for block in vit.blocks:
        attn, y = block.attn, normed(block.norm1, tokens)
        count, length, width = y.shape
        shape = (count, length, 3, attn.heads, width // attn.heads)
        q, k, v = attn.qkv(y).reshape(shape).permute(2, 0, 3, 1, 4).unbind(0)
        weights = halved(q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
        mixed = halved(weights @ v).transpose(1, 2).reshape(count, length, width)
        tokens = tokens + attn.proj(mixed)
        first, _, last = block.mlp
        tokens = tokens + last(identity(F.gelu, first(normed(block.norm2, tokens))))
    tokens = normed(vit.norm, tokens)
    read = tokens[:, 0] if vit.pool == "token" else tokens[:, vit.prefix :].mean(1)
    return leaf * torch.autograd.grad(vit.head(read)[:, target].sum(), leaf)[0]


@oracle("attention-lrp")
@pytest.mark.parametrize("pool", ["token", "mean"])
def test_attention_lrp_is_input_times_gradient_of_the_papers_detached_network(
    pool: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    vit, x = net(pool), image(2)
    monkeypatch.setattr(sharing, "_SMALL", 0.0)

    found = attribute(
        vit, x, "attention-lrp", target=2, gamma=0.0, convolution_gamma=0.0, epsilon=0.0
    )

    close(found.values, attnlrp(vit, x, 2))


@pytest.mark.parametrize("gamma", [0.0, 0.05, 1.0])
def test_relevance_through_attention_is_conserved_but_for_constants(gamma: float) -> None:
    found = attribute(net(), image(), "attention-lrp", target=2, gamma=gamma)

    (score,), (constants,) = (found.diagnostics[k] for k in ("scores", "relevance_of_constants"))
    assert float(found.values.sum()) + constants * score == pytest.approx(score, rel=5e-3)
    assert found.diagnostics["relative_delta"][0] < 5e-3


# --- Chefer et al. --------------------------------------------------------------------------------


def positive(x: Tensor, weight: Tensor, relevance: Tensor) -> Tensor:
    """Eq. 6: in proportion to the contributions x_j w_ji that are positive."""
    parts = (x[..., None, :] * weight).clamp(min=0)
    return (parts / (parts.sum(-1, keepdim=True) + 1e-6) * relevance[..., None]).sum(-2)


def balanced(a: Tensor, b: Tensor, relevance: Tensor) -> tuple[Tensor, Tensor]:
    """Eq. 7 and 9, of a sum."""
    z = a + b
    each = relevance / (z + torch.where(z < 0, -1e-6, 1e-6))
    a, b = a * each, b * each
    size = a.sum().abs() + b.sum().abs()
    return (
        a * a.sum().abs() / size * relevance.sum() / a.sum(),
        b * b.sum().abs() / size * relevance.sum() / b.sum(),
    )


def matched(a: Tensor, b: Tensor, relevance: Tensor) -> tuple[Tensor, Tensor]:
    """Eq. 7 and 9, of a product: both carry the same sum, so half of it each."""
    z = a @ b
    each = relevance / (z + torch.where(z < 0, -1e-6, 1e-6)) / 2
    return a * (each @ b.transpose(-1, -2)), b * (a.transpose(-1, -2) @ each)


def chefer(vit: Any, x: Tensor, target: int) -> Tensor:
    """The map of one image, by the pages of the paper; vit reads its first token."""
    patches = vit.patch_embed(x).flatten(2).transpose(1, 2) + vit.pos_embed
    tokens = torch.cat([vit.prefix_tokens, patches], 1)
    kept, attention = [], []
    for block in vit.blocks:
        attn, y = block.attn, block.norm1(tokens)
        shape = (1, y.shape[1], 3, attn.heads, y.shape[2] // attn.heads)
        q, k, v = attn.qkv(y).reshape(shape).permute(2, 0, 3, 1, 4).unbind(0)
        weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
        attention.append(weights)
        mixed = (weights @ v).transpose(1, 2).reshape(y.shape)
        out = attn.proj(mixed)
        middle = tokens + out
        first, act, last = block.mlp
        normal = block.norm2(middle)
        hidden = act(first(normal))
        kept.append((block, tokens, y, q, k, v, weights, mixed, out, middle, normal, hidden,
                     last(hidden)))  # fmt: skip
        tokens = middle + last(hidden)
    read = vit.norm(tokens)[:, 0]
    score = vit.head(read)[0, target]
    gradients = torch.autograd.grad(score, attention)
    start = torch.zeros(1, vit.head.out_features).double()
    start[0, target] = 1
    relevance = torch.zeros_like(tokens)
    relevance[:, 0] = positive(read, vit.head.weight, start)
    rolled: list[Tensor] = []
    for (block, before, y, q, k, v, weights, mixed, out, middle, normal, hidden, mlp), g in zip(
        reversed(kept), reversed(gradients), strict=True
    ):
        skip, branch = balanced(middle, mlp, relevance)
        branch = positive(hidden, block.mlp[2].weight, branch)
        branch = positive(normal, block.mlp[0].weight, branch)
        skip, branch = balanced(before, out, skip + branch)
        branch = positive(mixed, block.attn.proj.weight, branch)
        branch = branch.reshape(1, y.shape[1], block.attn.heads, -1).transpose(1, 2)
        of_weights, of_v = matched(weights, v, branch)
        rolled.insert(0, torch.eye(29) + (g * of_weights).clamp(min=0).mean(1)[0])
        scale = q.shape[-1] ** 0.25
        of_q, of_k = matched(q / scale, k.transpose(-1, -2) / scale, of_weights)
        parts = torch.stack([of_q, of_k.transpose(-1, -2), of_v])
        parts = parts.permute(1, 3, 0, 2, 4).reshape(1, y.shape[1], -1)
        relevance = skip + positive(y, block.attn.qkv.weight, parts)
    product = torch.eye(29).double()
    for block in rolled:
        product = block @ product
    return product[0, 5:].reshape(4, 6)


@oracle("relevance")
def test_relevance_is_that_of_the_papers_equations() -> None:
    vit, x = net(), image(2)

    found = attribute(vit, x, "relevance", target=[2, 7])

    for one, mine, target in zip(x, found.values, (2, 7), strict=True):
        close(mine, chefer(vit, one[None], target), 1e-6)
    assert found.diagnostics["read_by"] == "token 0"


def test_relevance_depends_on_the_class_as_attention_alone_does_not() -> None:
    vit, x = net(), image()

    a, b = (attribute(vit, x, "relevance", target=t).values for t in (1, 2))
    plain, other = (attribute(vit, x, "attention-rollout", target=t).values for t in (1, 2))

    assert (a - b).abs().max() > 0.05 * a.abs().max()
    assert torch.equal(plain, other)


# --- every form, and what is refused --------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("method", ["attention-lrp", "relevance"])
def test_every_form_gives_the_maps_of_the_module(method: str, form: str) -> None:
    vit, x = model("vit").double(), images("vit").double()
    wanted = attribute(vit, x, method, target=[1, 2]).values

    other = saved(vit, form, x[: 1 + ("dynamic" in form)])

    close(attribute(other, x, method, target=[1, 2]).values, wanted, 1e-6)


def test_models_without_attention_are_sent_on() -> None:
    x = torch.randn(1, 3, 32, 32)

    with pytest.raises(UsageError, match="no softmax; use lrp"):
        attribute(resnet18(4).eval(), x, "attention-lrp", target=0)
    with pytest.raises(UsageError, match="no self-attention"):
        attribute(resnet18(4).eval(), x, "relevance", target=0)
    with pytest.raises(UsageError, match="use attention-lrp or relevance"):
        attribute(vit_small().eval(), x, "lrp", target=0)


class Adds(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        u, v = x[:, 0].flatten(1), x[:, 1].flatten(1)
        return u + v


@pytest.mark.parametrize(
    ("u", "v"), [([3.0, 1.0], [1.0, 0.5]), ([3.0, 1.0], [-1.5, 0.5]), ([-3.0, 1.0], [0.5, 2.0])]
)
def test_a_sums_parts_carry_what_arrived_whatever_their_signs(u: Any, v: Any) -> None:
    tape = record(as_model(Adds()), torch.tensor([u, v]).double().view(1, 2, 1, 2))
    (step,) = [s for s in tape.steps if s.name == "add"]
    arrived = torch.tensor([[0.7, 0.3]]).double()

    found, _ = _balanced(step, [arrived])

    a, b = step.taken
    for mine, wanted in zip(found, balanced(a, b, arrived), strict=True):
        close(mine, wanted)
    assert float(torch.stack(list(found)).sum()) == pytest.approx(1.0)
