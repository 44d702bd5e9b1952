"""What recording costs: the same training with and without, in turns, in one process.

    python benchmarks/recorder.py [rounds]

Prints the median ratio of CPU time (which other programs on the machine touch little; wall time
beside it) for every=10 (target: at most 1.05) and every=1 (at most 1.3), with the range of the
rounds. All that a run of a thousand steps does is in it: the recorder's making, its shards, its
end. The nets are those whose users would feel it most: a step of less than a millisecond, where
every call counts. The larger the step, the smaller the share.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from gradscope import GradientRecorder

#: Both trainings are alive at once and take turns, so that a machine that slows down slows both.
TURN = 50
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


#: Networks, and the steps of a run.
NETS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "MLP 64-64-64-10": (lambda: mlp(64), 1000),
    "MLP 64-256-256-10": (lambda: mlp(256), 1000),
    "CNN": (Cnn, 200),
}


def training(make: Callable[[], nn.Module], every: int | None, steps: int) -> Iterator[None]:
    """A training run that stops after each turn; ``None`` records nothing."""
    torch.manual_seed(0)
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    images, labels = torch.randn(256, 64), torch.randint(0, 10, (256,))
    with tempfile.TemporaryDirectory() as folder:
        recorder = GradientRecorder(model, optimizer, folder, every=every) if every else None
        for step in range(steps):
            batch = torch.randint(0, 256, (64,))
            loss = F.cross_entropy(model(images[batch]), labels[batch])
            loss.backward()
            if recorder is not None:
                recorder.capture(step, loss=loss)
            optimizer.step()
            optimizer.zero_grad()
            if step % TURN == TURN - 1:
                yield
        if recorder is not None:
            recorder.close()


def seconds(run: Iterator[None]) -> tuple[bool, tuple[float, float]]:
    """Whether a run goes on after its next turn, and the CPU and wall time of that."""
    began = time.process_time(), time.perf_counter()
    goes_on = next(run, StopIteration) is None
    return goes_on, (time.process_time() - began[0], time.perf_counter() - began[1])


def ratios(
    make: Callable[[], nn.Module], every: int, steps: int, first: int
) -> tuple[float, float, float]:
    """CPU and wall time of a recorded run over that of a plain one; CPU seconds of the latter."""
    runs = [training(make, None, steps), training(make, every, steps)]
    spent = [[0.0, 0.0], [0.0, 0.0]]
    goes_on, turn = True, first
    while goes_on:
        for i in (turn % 2, (turn + 1) % 2):
            goes_on, took = seconds(runs[i])
            spent[i] = [a + b for a, b in zip(spent[i], took, strict=True)]
        turn += 1
    plain, recorded = spent
    return recorded[0] / plain[0], recorded[1] / plain[1], plain[0]


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 9
    torch.set_num_threads(1)
    for name, (make, steps) in NETS.items():
        ratios(make, 10, steps, 0)  # what happens once a process
        found = {e: [ratios(make, e, steps, i) for i in range(rounds)] for e in TARGETS}
        step = statistics.median(r[2] for of in found.values() for r in of) / steps
        print(f"{name}: {rounds} rounds of {steps} steps of {step * 1e6:.0f} us, one thread")
        for every, of in found.items():
            cpu, wall = (statistics.median(r[i] for r in of) for i in (0, 1))
            low, high = min(of)[0], max(of)[0]
            met = "met" if cpu <= TARGETS[every] else "MISSED"
            print(
                f"  every={every:<3} {cpu:.3f} x the CPU time ({low:.3f} to {high:.3f}; "
                f"{wall:.3f} x wall)   target <= {TARGETS[every]}: {met}",
                flush=True,
            )


if __name__ == "__main__":
    main()
