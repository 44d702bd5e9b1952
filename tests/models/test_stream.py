"""Which tensors are a network's residual stream: small twins of the blocks that people write."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import gradscope
from gradscope.errors import UsageError
from gradscope.models.forms import as_model
from gradscope.models.layers import AutoLayer, Layer, choose, survey
from gradscope.models.probe import held

SIDE, WIDTH, HEADS = 16, 32, 2


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((WIDTH,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Root(nn.Module):
    """RMS normalisation as it is written by hand."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


class Attention(nn.Module):
    """Heads are normalised, and named by modules that do nothing, as [N, heads, tokens, d]."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=bias)
        self.q_norm = nn.LayerNorm(WIDTH // HEADS)
        self.k_norm = nn.Identity()
        self.attn_drop = nn.Dropout(0.1)
        self.proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.qkv(x).unflatten(2, (3, HEADS, WIDTH // HEADS)).permute(2, 0, 3, 1, 4)
        q, k, v = heads.unbind(0)
        weights = self.attn_drop((self.q_norm(q) @ self.k_norm(k).mT / 4).softmax(-1))
        return self.proj((weights @ v).transpose(1, 2).flatten(2))


class Gelu(nn.Module):
    """Written by hand, it adds a function of the hidden layer to it."""

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * x * (1 + torch.tanh(0.8 * (x + 0.04 * x**3)))


class Block(nn.Module):
    """``order`` is where the normalisation is, or that both branches start from one."""

    def __init__(self, order: str = "pre", norm: Callable[[], nn.Module] | None = None) -> None:
        super().__init__()
        self.order = order
        made = norm or (lambda: nn.LayerNorm(WIDTH))
        self.norm1, self.norm2 = made(), made()
        self.attn = Attention()
        self.ls1, self.ls2 = Scale(), Scale()
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), Gelu(), nn.LayerNorm(2 * WIDTH),
                                 nn.Linear(2 * WIDTH, WIDTH))  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        if self.order == "post":
            x = self.norm1(x + self.ls1(self.attn(x)))
            return self.norm2(x + self.ls2(self.mlp(x)))
        if self.order == "parallel":
            y = self.norm1(x)
            return x + self.ls1(self.attn(y)) + self.ls2(self.mlp(y))
        if self.order == "fused":
            x = torch.addcmul(x, self.ls1.gamma, self.attn(self.norm1(x)))
            return torch.addcmul(x, self.ls2.gamma, self.mlp(self.norm2(x)))
        x = self.ls1(self.attn(self.norm1(x))) + x.view(x.shape)
        return self.ls2(self.mlp(self.norm2(x))).add_(x)


class Vit(nn.Module):
    def __init__(self, depth: int = 2, pooled: bool = False, cls: bool = True, patch: int = 4,
                 **block: object) -> None:  # fmt: skip
        super().__init__()
        self.embed = nn.Conv2d(3, WIDTH, patch, patch)
        self.cls = nn.Parameter(torch.randn(1, int(cls), WIDTH))
        self.position = nn.Parameter(torch.randn(1, (SIDE // patch) ** 2 + int(cls), WIDTH))
        self.blocks = nn.Sequential(*(Block(**block) for _ in range(depth)))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 3)
        self.pooled = pooled

    def tokens(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], 1) + self.position
        return self.norm(self.blocks(x))

    def forward(self, x: Tensor) -> Tensor:
        x = self.tokens(x)
        return self.head(x.mean(1) if self.pooled else x[:, 0])


def surveyed(net: nn.Module | torch.jit.ScriptModule) -> list[Layer]:
    x = torch.randn((1, 3, SIDE, SIDE), generator=torch.Generator().manual_seed(0))
    model = as_model(net)
    with held(model.module):
        return survey(model, x)


def chosen(net: nn.Module) -> AutoLayer:
    torch.manual_seed(0)
    return choose(surveyed(net.eval()))


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        # Past the class token's last attention no patch is read.
        ({}, "blocks.1.norm1"),
        ({"depth": 1}, "blocks.0.norm1"),
        ({"norm": Root}, "blocks.1.norm1"),
        ({"order": "fused"}, "blocks.1.norm1"),
        ({"order": "parallel"}, "blocks.1.norm1"),
        ({"order": "post"}, "blocks.0.norm2"),
        ({"pooled": True}, "norm"),
        ({"pooled": True, "cls": False}, "norm"),
        ({"pooled": True, "order": "post"}, "norm"),
    ],
)
def test_auto_takes_the_residual_stream_of_every_way_to_write_a_transformer(
    options: dict[str, object], wanted: str
) -> None:
    assert chosen(Vit(**options)).layer.name == wanted


def test_what_lies_on_the_stream_is_told_from_what_does_not() -> None:
    layers = {layer.name: layer.stream for layer in surveyed(Vit().eval())}

    on = {name for name, stream in layers.items() if stream}
    assert on == {"norm", "blocks", *(f"blocks.{i}{end}" for i in (0, 1)
                                      for end in ("", ".norm1", ".norm2"))}  # fmt: skip
    assert {"embed", "blocks.1.ls2", "blocks.1.attn.q_norm", "blocks.1.mlp.2"} <= layers.keys() - on


@pytest.mark.parametrize("patch", [4, 2, 1])
def test_what_is_split_into_heads_is_never_taken_for_maps(patch: int) -> None:
    """Of 16 or 64 tokens and two heads of 16 channels, [N, 2, 17, 16] looks like maps."""
    found = chosen(Vit(patch=patch))

    assert found.layer.name == "blocks.1.norm1"
    assert found.layer.shape == (1, (SIDE // patch) ** 2 + 1, WIDTH)
    assert "patch tokens" in found.reason


@pytest.mark.parametrize("form", ["traced", "exported"])
def test_the_stream_is_found_in_every_form(form: str) -> None:
    torch.manual_seed(0)
    net, x = Vit().eval(), torch.randn(1, 3, SIDE, SIDE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        saved = (
            torch.jit.trace(net, x, check_trace=False)
            if form == "traced"
            else torch.export.export(net, (x,))
        )

    assert choose(surveyed(saved)).layer.name == "blocks.1.norm1"


class TwoBranches(nn.Module):
    """CrossViT's kind: two grids, two heads, their mean."""

    def __init__(self) -> None:
        super().__init__()
        self.fine, self.coarse = Vit(pooled=True, patch=2), Vit(pooled=True, patch=4)

    def forward(self, x: Tensor) -> Tensor:
        return (self.fine(x) + self.coarse(x)) / 2


def test_of_several_branches_the_other_is_named() -> None:
    found = chosen(TwoBranches())

    assert found.layer.name == "coarse.norm"
    assert "one of several branches, fine.norm is the last of another" in found.reason
    assert "branches" not in chosen(Vit()).reason


class Passing(nn.Module):
    """CoaT's kind: a late block returns what an early one made, untouched, beside its own."""

    def __init__(self) -> None:
        super().__init__()
        self.early = nn.Conv2d(3, 4, 3, 1, 1)
        self.late = nn.Conv2d(4, 4, 3, 2, 1)
        self.block = Untouched()
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.early(x))
        x, y = self.block(x, self.late(x))
        return self.head(torch.cat([x.mean((2, 3)), y.mean((2, 3))], 1))


class Untouched(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return x, y


def test_what_is_returned_late_but_was_made_early_is_not_the_last() -> None:
    assert chosen(Passing()).layer.name == "late"


class Plain(nn.Module):
    """Tokens without any residual connection."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, WIDTH, 4, 4)
        self.mix = nn.Linear(16, 16)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mix(self.embed(x).flatten(2)).relu()
        return self.head(x.transpose(1, 2)).mean(1)


def test_without_a_stream_every_layer_of_tokens_counts() -> None:
    assert chosen(Plain()).layer.name == "head"


# --- queries --------------------------------------------------------------------------------------


class Asking(nn.Module):
    """A detector as DETR (apart) or YOLOS (beside): four learned tokens, a grid's number."""

    def __init__(self, beside: bool, queries: int = 4) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.beside, self.count = beside, queries
        self.patches = nn.Conv2d(3, WIDTH, 4, 4)
        self.queries = nn.Parameter(torch.randn(1, queries, WIDTH))
        self.norm, self.attention = nn.LayerNorm(WIDTH), Attention()
        self.ask = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.after, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        asked = self.queries.expand(len(x), -1, -1)
        if self.beside:
            tokens = torch.cat([tokens, asked], 1)
        tokens = tokens + self.attention(self.norm(tokens))
        if self.beside:
            found = tokens[:, -self.count :]
        else:
            found = asked + self.ask(asked, tokens, tokens, need_weights=False)[0]
        return self.head(self.after(found)).max(1).values


@pytest.mark.parametrize(("beside", "count"), [(False, 4), (True, 4), (False, 16)])
def test_queries_are_no_grid_of_patches(beside: bool, count: int) -> None:
    """Not even where they are as many as the patches."""
    layers = {layer.name: layer for layer in surveyed(Asking(beside, count).eval())}

    assert {name for name in ("after", "head") if layers[name].layout is not None} == set()
    assert choose([*layers.values()]).layer.name not in ("after", "head", "ask")


class Between(nn.Module):
    """A class token, the patches, and more learned tokens on either side, as YOLOS has them."""

    def __init__(self, before: int, behind: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.patches = nn.Conv2d(3, WIDTH, 4, 4)
        self.before = nn.Parameter(torch.randn(1, before, WIDTH))
        self.behind = nn.Parameter(torch.randn(1, behind, WIDTH))
        self.block, self.norm = Attention(), nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        learned = [self.before, tokens, self.behind][: 3 if self.behind.shape[1] else 2]
        tokens = torch.cat([t.expand(len(x), -1, -1) for t in learned], 1)
        return self.head(self.norm(tokens + self.block(tokens)).mean(1))


def test_patches_with_learned_tokens_behind_them_are_not_read_as_if_these_were_before() -> None:
    """The map would lie five places off."""
    behind = {layer.name: layer.layout for layer in surveyed(Between(1, 5).eval())}
    before = {layer.name: layer.layout for layer in surveyed(Between(6, 0).eval())}

    assert behind["norm"] is None
    assert str(before["norm"]) == "tokens 4×4 + 6 without a position"


def test_tokens_without_their_class_token_are_patches() -> None:
    class Cut(Asking):
        def forward(self, x: Tensor) -> Tensor:
            tokens = torch.cat([self.queries, self.patches(x).flatten(2).transpose(1, 2)], 1)
            tokens = tokens + self.attention(self.norm(tokens))
            return self.head(self.after(tokens[:, self.count :])).max(1).values

    net = Cut(beside=False, queries=1).eval()

    assert {str(layer.layout) for layer in surveyed(net) if layer.name == "after"} == {"tokens 4×4"}
    assert chosen(net).layer.name == "after"


def test_a_layer_whose_tokens_end_in_learned_ones_is_refused_by_name_too() -> None:
    """Registers before the patches are known by their number, those behind are not."""
    x = torch.randn(2, 3, SIDE, SIDE)

    with pytest.raises(UsageError, match="learned tokens behind"):
        gradscope.attribute(Between(1, 5).eval(), x, "gradcam", layer="norm", target=1)
    found = gradscope.attribute(Between(6, 0).eval(), x, "gradcam", layer="norm", target=1)

    assert found.values.shape == (2, SIDE // 4, SIDE // 4)
