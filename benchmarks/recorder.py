"""What recording costs: the same training loop with and without, interleaved, in one process.

    python benchmarks/recorder.py [rounds]

Prints the median ratio of wall time for every=10 (target: at most 1.05 on a small net on the CPU)
and for every=1. The net is the one a user would call small: three convolutions on 8 x 8 digits,
a step of a few milliseconds; the larger the step, the smaller the share.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from gradscope import GradientRecorder

STEPS = 300
TARGET = 1.05


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.second = nn.Conv2d(16, 32, 3, padding=1)
        self.third = nn.Conv2d(32, 32, 3, padding=1)
        self.head = nn.Linear(128, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = F.max_pool2d(F.relu(self.second(F.relu(self.norm(self.first(images))))), 2)
        return self.head(F.max_pool2d(x + F.relu(self.third(x)), 2).flatten(1))


def seconds(every: int | None) -> float:
    """One training run; ``None`` records nothing."""
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    images, labels = torch.randn(256, 1, 8, 8), torch.randint(0, 10, (256,))
    with tempfile.TemporaryDirectory() as folder:
        recorder = GradientRecorder(model, optimizer, folder, every=every) if every else None
        began = time.perf_counter()
        for step in range(STEPS):
            batch = torch.randint(0, 256, (64,))
            loss = F.cross_entropy(model(images[batch]), labels[batch])
            loss.backward()
            if recorder is not None:
                recorder.capture(step, loss=loss)
            optimizer.step()
            optimizer.zero_grad()
        if recorder is not None:
            recorder.close()
        return time.perf_counter() - began


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 9
    torch.set_num_threads(1)
    seconds(None), seconds(10)
    ratios: dict[int, list[float]] = {10: [], 1: []}
    step = 0.0
    for _ in range(rounds):
        for every, found in ratios.items():
            # Both sides of the pair run next to each other, in either order.
            plain, recorded = seconds(None), seconds(every)
            found.append(recorded / plain)
            step = plain / STEPS
    print(f"recorder, {rounds} pairs of {STEPS} steps of {step * 1e3:.1f} ms, one thread")
    for every, found in ratios.items():
        median = statistics.median(found)
        met = (
            f"   target <= {TARGET}: {'met' if median <= TARGET else 'MISSED'}"
            if every == 10
            else ""
        )
        print(f"  every={every:<3} {median:.3f} x the loop without{met}")


if __name__ == "__main__":
    main()
