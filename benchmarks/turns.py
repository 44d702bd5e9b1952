"""Two programs on the same picture by turns: what a row of ``explain.py`` is made of."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "fixtures"))

from architectures import mobilenet_v2, resnet50

from gradscope import attribute
from gradscope.models.forms import as_model
from gradscope.models.images import open_image
from gradscope.models.preprocessing import IMAGENET

FETCHED = Path(__file__).resolve().parents[1] / "fixtures" / "fetched"
CHUNKS = (4, 8, 16)

Run = Callable[[], Any]
clock = time.perf_counter if "--wall" in sys.argv else time.process_time


@dataclass(frozen=True)
class Case:
    """A network, an image and its class."""

    net: nn.Module
    x: Tensor
    target: int

    def ours(self, method: str, **options: Any) -> Run:
        model = as_model(self.net)
        return lambda: attribute(model, self.x, method, target=self.target, **options)


@dataclass(frozen=True)
class Row:
    """What is compared: ours and a peer's, which has to do ``times`` as much as it runs."""

    name: str
    peer: str
    limit: float
    ours: Run
    theirs: Run
    times: float = 1.0
    #: Runs of ours before the clock starts, and whether one run is enough.
    warm: int = 1
    once: bool = False


def random_case(make: Callable[[], nn.Module] = resnet50) -> Case:
    torch.manual_seed(0)
    net, x = make().eval(), torch.randn(1, 3, 224, 224)
    return Case(net, x, int(net(x).argmax()))


def real_case(picture: str = "chelsea") -> Case:
    """Training bends the path; random weights hardly do. Raises OSError where not fetched."""
    net = mobilenet_v2().eval()
    net.load_state_dict(torch.load(FETCHED / "mobilenet_v2.pth"))
    x = IMAGENET(open_image(str(FETCHED / "pictures" / f"{picture}.png"))).inputs[None]
    return Case(net, x, int(net(x).argmax()))


def seconds(run: Run) -> tuple[float, Any]:
    began = clock()
    found = run()
    return clock() - began, found


def timed(row: Row, rounds: int) -> tuple[float, float, Any, Any]:
    """The median of ours over theirs, pair by pair, that of ours in seconds, and what both gave."""
    for _ in range(row.warm):
        row.ours()
    if not row.once:
        row.theirs()
    pairs = []
    for _ in range(1 if row.once else rounds):
        (a, mine), (b, other) = seconds(row.ours), seconds(row.theirs)
        pairs.append((a, b * row.times))
    ratio = statistics.median(a / b for a, b in pairs)
    return ratio, statistics.median(a for a, _ in pairs), mine, other


def apart(ours: Tensor, theirs: Tensor) -> float:
    """The greatest difference of two maps, each from its least value to its greatest."""
    a, b = (values.detach().double().clamp(min=0) for values in (ours, theirs))
    a, b = ((v - v.min()) / (v.max() - v.min()) for v in (a, b))
    return float((a - b).abs().max())


def best(make: Callable[[int], Run]) -> Run:
    return min(map(make, CHUNKS), key=lambda run: seconds(run)[0])


def compared(rows: Callable[[], Iterator[Row]], rounds: int) -> None:
    try:
        for row in rows():
            found, took, mine, other = timed(row, rounds)
            verdict = "met" if found <= row.limit else "MISSED"
            print(
                f"{row.name:<38} {took:7.2f} s  {found:5.2f} x {row.peer:<17} target <= "
                f"{row.limit}: {verdict:<7}{_difference(row, mine, other)}",
                flush=True,
            )
    # RuntimeError: a torchvision that does not fit this torch.
    except (ImportError, RuntimeError, OSError) as error:
        print(f"{rows.__name__} is left out: {error}; pip install captum grad-cam, make fixtures")


def _difference(row: Row, mine: Any, other: Any) -> str:
    if other is None or row.times != 1:
        return ""
    values = mine.upsampled if other.dim() == 3 else mine.values
    return f" maps differ by {apart(values, other):.1e}"
