"""Who feeds whom, read from the graph of one forward pass."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from gradscope import GradientRecorder
from gradscope.histories.open import open_history

from .training import transformer


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Linear(4, 4), nn.LayerNorm(4)
        self.inner, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu_(self.embed(x))
        return self.head(x + self.inner(self.norm(x)))


def edges_of(model: nn.Module, inputs: torch.Tensor, folder: Path) -> set[tuple[str, str]]:
    with GradientRecorder(model, None, folder, every=1) as recorder:
        out = model(inputs)
        (out[0] if isinstance(out, tuple) else out).sum().backward()
        recorder.capture(0)
    history = open_history(str(folder))
    assert history.topology == "recorded"
    assert history.edges is not None
    names = [*(layer.module for layer in history.layers), "loss", "input"]
    return {(names[u], names[v]) for u, v in history.edges.tolist()}


def test_the_edges_of_a_residual_net_are_those_of_its_code(tmp_path: Path) -> None:
    assert edges_of(Residual(), torch.randn(3, 4), tmp_path / "a") == {
        ("input", "embed"), ("embed", "norm"), ("norm", "inner"), ("inner", "head"),
        ("embed", "head"), ("head", "loss"),
    }  # fmt: skip


def test_the_edges_of_a_transformer_pass_attention_and_its_skips(tmp_path: Path) -> None:
    model = transformer()
    model.train()

    edges = edges_of(model, torch.randn(2, 5, 8), tmp_path / "a")

    first = "0.layers.0"
    assert (f"{first}.self_attn", f"{first}.self_attn.out_proj") in edges
    assert (f"{first}.self_attn.out_proj", f"{first}.norm1") in edges
    assert (f"{first}.norm1", f"{first}.norm2") in edges
    assert (f"{first}.norm2", "0.layers.1.self_attn") in edges
    assert ("1", "loss") in edges


def test_a_recurrent_and_a_shared_module_are_one_node(tmp_path: Path) -> None:
    lstm = nn.LSTM(4, 3, batch_first=True)
    shared = nn.Linear(4, 4)

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shared, self.head = shared, nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(torch.tanh(self.shared(torch.tanh(self.shared(x)))))

    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm, self.head = lstm, nn.Linear(3, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.lstm(x)[0])

    assert edges_of(Twice(), torch.randn(2, 4), tmp_path / "a") == {
        ("input", "shared"), ("shared", "head"), ("head", "loss"),
    }  # fmt: skip
    assert edges_of(Recurrent(), torch.randn(2, 5, 4), tmp_path / "b") == {
        ("input", "lstm"), ("lstm", "head"), ("head", "loss"),
    }  # fmt: skip


def test_layers_are_in_the_order_they_are_used_not_the_order_they_are_defined(
    tmp_path: Path,
) -> None:
    class Backwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last, self.first = nn.Linear(4, 2), nn.Linear(3, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(torch.tanh(self.first(x)))

    edges_of(Backwards(), torch.randn(2, 3), tmp_path / "a")

    modules = [layer.module for layer in open_history(str(tmp_path / "a")).layers]
    assert list(dict.fromkeys(modules)) == ["first", "last"]


def test_a_reentrant_checkpoint_hides_its_inside_so_no_edges_are_claimed(tmp_path: Path) -> None:
    from torch.utils.checkpoint import checkpoint

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return checkpoint(self.b, self.a(x), use_reentrant=True)

    model = Checkpointed()
    with GradientRecorder(model, None, tmp_path / "a", every=1) as recorder:
        model(torch.randn(2, 3)).sum().backward()
        recorder.capture(0)

    assert open_history(str(tmp_path / "a")).topology == "assumed-chain"
