"""Attention of transformers, fused or not, against the formulas in NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from architectures import vit_registers, vit_small
from torch import Tensor, nn

from gradscope import attribute
from gradscope.attribution.formulas.attention import rollout, without_least
from gradscope.errors import UsageError
from gradscope.models.attention_weights import attentions
from gradscope.models.forms import as_model
from gradscope.models.probe import held

from .oracles import oracle


def net(kind: str) -> nn.Module:
    torch.manual_seed(0)
    made = vit_small() if kind == "class token" else vit_registers(pool=kind)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() == 2:
                parameter.mul_(3)
    return made.double().eval()


def image(kind: str) -> Tensor:
    width = 32 if kind == "class token" else 48
    return torch.randn((1, 3, 32, width), generator=torch.Generator().manual_seed(1)).double()


def unfused(model: nn.Module, x: Tensor, target: int) -> tuple[list[Any], list[Any]]:
    """Weights and their gradients of ``vit_registers``, by a plain softmax put in its place."""
    kept: list[Tensor] = []

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
        kept.append(weights)
        return weights @ v

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.nn.functional.scaled_dot_product_attention", plain)
        score = model(x)[0, target]
    gradients = torch.autograd.grad(score, kept)
    return [w[0].detach().numpy() for w in kept], [g[0].numpy() for g in gradients]


def test_recorded_weights_are_those_of_a_plain_softmax_and_their_gradients() -> None:
    model, x = net("token"), image("token")
    weights, gradients = unfused(model, x, 2)

    with held(model):
        seen = attentions(as_model(model), x)
        found = seen.gradients(seen.logits[0, 2])

    for mine, wanted in zip((*seen.weights, *found), (*weights, *gradients), strict=True):
        np.testing.assert_allclose(mine.detach(), wanted, rtol=0, atol=1e-12)


def test_recorded_weights_are_what_multihead_attention_returns() -> None:
    model, x = net("class token"), image("class token")
    kept: list[Tensor] = []
    hooks = [
        block.self_attention.register_forward_pre_hook(
            lambda module, arguments: kept.append(
                type(module).forward(module, *arguments, average_attn_weights=False)[1]
            )
        )
        for block in model.encoder.layers
    ]
    model(x)
    for hook in hooks:
        hook.remove()

    with held(model):
        seen = attentions(as_model(model), x)

    for mine, wanted in zip(seen.weights, kept, strict=True):
        np.testing.assert_allclose(mine, wanted[0].detach(), rtol=0, atol=1e-12)


@oracle("attention-rollout", "gradient-rollout")
@pytest.mark.parametrize("kind", ["token", "mean"])
def test_rollout_and_gradient_rollout_are_the_papers_formulas(kind: str) -> None:
    model, x = net(kind), image(kind)
    weights, gradients = unfused(model, x, 2)
    rolled, relevance = np.eye(29), np.eye(29)
    for w, g in zip(weights, gradients, strict=True):
        mixed = 0.5 * w.mean(0) + 0.5 * np.eye(29)
        rolled = (mixed / mixed.sum(1, keepdims=True)) @ rolled
        relevance = relevance + np.maximum(g * w, 0).mean(0) @ relevance
    rows = slice(0, 1) if kind == "token" else slice(5, None)

    for method, whole in (("attention-rollout", rolled), ("gradient-rollout", relevance)):
        found = attribute(model, x, method, target=2)
        np.testing.assert_allclose(
            found.values[0], whole[rows, 5:].mean(0).reshape(4, 6), rtol=1e-9, atol=1e-12
        )
        assert found.diagnostics["read_by"] == ("token 0" if kind == "token" else "patches")
    np.testing.assert_allclose(rolled.sum(1), 1, atol=1e-12)


@oracle("attention")
@pytest.mark.parametrize(("fusion", "fused"), [("mean", np.mean), ("max", np.max), ("min", np.min)])
def test_one_blocks_attention_is_the_class_tokens_row(fusion: str, fused: Any) -> None:
    model, x = net("token"), image("token")
    weights, _ = unfused(model, x, 2)

    found = attribute(model, x, "attention", target=2, block=1, fusion=fusion)

    np.testing.assert_allclose(found.values[0].flatten(), fused(weights[1], axis=0)[0, 5:])


def test_discarding_takes_each_rows_least_patches_and_never_prefix_columns() -> None:
    weights = (5 * torch.rand((9, 9), generator=torch.Generator().manual_seed(0))).softmax(-1)
    weights[:, 0] = 1e-6

    found = without_least(weights, 0.5, prefix=1)

    assert torch.equal(found[:, 0], weights[:, 0])
    for row, before in zip(found[:, 1:], weights[:, 1:], strict=True):
        least = sorted(before.tolist())[:4]
        assert row.tolist() == [0 if v in least else v for v in before.tolist()]
    whole = rollout([found, found])
    torch.testing.assert_close(whole.sum(1), torch.ones(9))
    # Dividing columns by the rows' sums, as a well known implementation does, is another map.
    mixed = found + torch.eye(9)
    wrong = mixed / mixed.sum(-1)
    assert (wrong @ wrong - whole).abs().max() > 0.01


class Windows(nn.Module):
    """Attention inside quarters of the image only."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 8, 8, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        maps = self.embed(x)
        windows = (
            maps.unfold(2, 2, 2).unfold(3, 2, 2).permute(0, 2, 3, 4, 5, 1).reshape(-1, 1, 4, 8)
        )
        mixed = nn.functional.scaled_dot_product_attention(windows, windows, windows)
        return self.head(mixed.reshape(len(x), -1, 8).mean(1))


class Masked(nn.Module):
    """Rows of weights that do not sum to one: dropout behind the softmax's back."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 8, 8, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        t = self.embed(x).flatten(2).transpose(1, 2)[:, None]
        return self.head((t @ t.transpose(-1, -2)).softmax(-2).matmul(t)[:, 0].mean(1))


def test_windowed_attention_and_other_normalisations_are_refused() -> None:
    x = torch.randn(1, 3, 32, 32)

    with pytest.raises(UsageError, match="not cover all tokens"):
        attribute(Windows(), x, "attention-rollout", target=0)
    with pytest.raises(UsageError, match="miss one by up to"):
        attribute(Masked(), x, "attention-rollout", target=0)
    with pytest.raises(UsageError, match="no block 3"):
        attribute(net("token").float(), image("token").float(), "attention", block=3)


class Across(nn.Module):
    """Blocks whose attention is over 12 channels of 3 heads, as XCiT's; or over 16 tokens."""

    def __init__(self, channels: bool) -> None:
        super().__init__()
        self.channels = channels
        self.embed = nn.Conv2d(3, 36, 8, 8)
        self.head = nn.Linear(36, 3)

    def forward(self, x: Tensor) -> Tensor:
        t = self.embed(x).flatten(2).transpose(1, 2)
        for _ in range(2):
            heads = t.unflatten(2, (3, 12)).transpose(1, 2)  # [N, heads, tokens, 12]
            values = heads.transpose(2, 3) if self.channels else heads
            mixed = (values @ values.transpose(2, 3)).softmax(-1) @ values
            mixed = mixed.transpose(2, 3) if self.channels else mixed
            t = t + mixed.transpose(1, 2).flatten(2)
        return self.head(t.mean(1))


@pytest.mark.filterwarnings("ignore:`torch.jit.trace.*` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("method", ["attention", "attention-rollout", "gradient-rollout"])
def test_attention_over_channels_has_no_place_and_is_refused(method: str, traced: bool) -> None:
    x = torch.randn(1, 3, 32, 32)

    def made(channels: bool) -> Any:
        module = Across(channels).eval()
        return torch.jit.trace(module, x) if traced else module

    with pytest.raises(UsageError, match="over 12 channels, not over the image's tokens"):
        attribute(made(True), x, method, target=0)
    assert attribute(made(False), x, method, target=0).values.shape == (1, 4, 4)
