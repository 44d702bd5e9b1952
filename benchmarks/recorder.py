"""What recording costs: the same training loop with and without, interleaved, in one process.

    python benchmarks/recorder.py [rounds]

Prints the median ratio of CPU time (which other programs on the machine touch little; wall time
beside it) for every=10 (target: at most 1.05) and every=1 (at most 1.3). The nets are those whose
users would feel it most: a step of a few hundred microseconds, where every call counts. The larger
the step, the smaller the share.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from gradscope import GradientRecorder

STEPS = 1000
TARGETS = {10: 1.05, 1: 1.3}


class Cnn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.second = nn.Conv2d(16, 32, 3, padding=1)
        self.third = nn.Conv2d(32, 32, 3, padding=1)
        self.head = nn.Linear(128, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = images.view(-1, 1, 8, 8)
        x = F.max_pool2d(F.relu(self.second(F.relu(self.norm(self.first(x))))), 2)
        return self.head(F.max_pool2d(x + F.relu(self.third(x)), 2).flatten(1))


def mlp(width: int) -> nn.Module:
    return nn.Sequential(
        nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)
    )


NETS: dict[str, Callable[[], nn.Module]] = {
    "MLP 64-64-64-10": lambda: mlp(64),
    "MLP 64-256-256-10": lambda: mlp(256),
    "CNN": Cnn,
}


def seconds(make: Callable[[], nn.Module], every: int | None) -> tuple[float, float]:
    """CPU and wall time of one training run; ``None`` records nothing."""
    torch.manual_seed(0)
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    images, labels = torch.randn(256, 64), torch.randint(0, 10, (256,))
    with tempfile.TemporaryDirectory() as folder:
        recorder = GradientRecorder(model, optimizer, folder, every=every) if every else None
        began = time.process_time(), time.perf_counter()
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
        return time.process_time() - began[0], time.perf_counter() - began[1]


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 9
    torch.set_num_threads(1)
    for name, make in NETS.items():
        seconds(make, None), seconds(make, 10)
        ratios: dict[int, list[tuple[float, float]]] = {every: [] for every in TARGETS}
        step = 0.0
        for i in range(rounds):
            for every, found in ratios.items():
                # Both sides of the pair run next to each other, in either order.
                pair = {e: seconds(make, e) for e in ((None, every) if i % 2 else (every, None))}
                plain, recorded = pair[None], pair[every]
                found.append((recorded[0] / plain[0], recorded[1] / plain[1]))
                step = plain[0] / STEPS
        print(f"{name}: {rounds} pairs of {STEPS} steps of {step * 1e6:.0f} us, one thread")
        for every, found in ratios.items():
            cpu, wall = (statistics.median(pair[i] for pair in found) for i in (0, 1))
            met = "met" if cpu <= TARGETS[every] else "MISSED"
            said = f"target <= {TARGETS[every]}: {met}"
            print(f"  every={every:<3} {cpu:.3f} x the CPU time ({wall:.3f} x wall)   {said}")


if __name__ == "__main__":
    main()
