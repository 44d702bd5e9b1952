"""A small network trained on scikit-learn's digits at random places, and where those are."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from architectures import BasicBlock
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate, relu

SIZE = 32


class Residual(nn.Module):
    """Residual blocks and a mean over positions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.blocks = nn.Sequential(BasicBlock(8, 16, 2), BasicBlock(16, 32, 2))
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(relu(self.norm(self.stem(x)))).mean((2, 3)))


def scenes(count: int, seed: int) -> tuple[Tensor, Tensor, list[tuple[int, int, int]]]:
    """Pictures [count, 1, 32, 32] of a digit over a soft background, its class, top, left, side."""
    from make import load_digits

    generator = torch.Generator().manual_seed(seed)
    digits, classes = load_digits()
    which = torch.randint(0, len(digits), (count,), generator=generator)
    cells = torch.rand((count, 1, 5, 5), generator=generator) * 0.4
    pictures = interpolate(cells, size=SIZE, mode="bilinear")
    places = []
    for picture, one in zip(pictures, which.tolist(), strict=True):
        side = int(torch.randint(13, 19, (), generator=generator))
        top, left = (int(torch.randint(0, SIZE - side, (), generator=generator)) for _ in range(2))
        drawn = interpolate(digits[one][None], size=side, mode="bilinear")[0]
        here = picture[:, top : top + side, left : left + side]
        here.copy_(torch.maximum(here, drawn))
        places.append((top, left, side))
    return pictures, classes[which], places


@cache
def trained() -> nn.Module:
    """A network that knows most of the digits."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pictures, classes, _ = scenes(1536, 1)
        net = Residual()
        optimizer = torch.optim.AdamW(net.parameters(), 4e-3)
        for _ in range(5):
            for batch in torch.randperm(len(pictures)).split(64):
                optimizer.zero_grad()
                cross_entropy(net(pictures[batch]), classes[batch]).backward()
                optimizer.step()
    return net.eval()


def digits() -> nn.Module:
    """The committed model of the digits as they are, 8 by 8."""
    from make import digits_model

    net = digits_model()
    net.load_state_dict(load_file(Path(__file__).parents[2] / "fixtures" / "digits.safetensors"))
    return net.eval()
