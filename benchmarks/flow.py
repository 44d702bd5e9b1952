"""How long ``analyze_flow`` takes: against loading the file, and from 1,000 to 10,000 steps.

    python benchmarks/flow.py [layers] [steps]

Targets: 20 times the load at most for 1,000 layers x 10,000 steps, and linear in steps.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from gradscope import analyze_flow
from gradscope.flow.measured import analyze
from gradscope.histories.format import write
from gradscope.histories.open import open_history

TARGET = 20


def seconds(work: Callable[[], object]) -> float:
    """Of CPU time: both sides use one core, and other programs do not change what they cost."""
    began = time.process_time()
    work()
    return time.process_time() - began


def make(path: Path, layers: int, steps: int) -> None:
    rng = np.random.default_rng(0)
    shape = (steps, layers)

    def values(level: float) -> np.ndarray:
        return (level * np.exp(0.3 * rng.standard_normal(shape, dtype=np.float32))).astype(
            np.float32
        )

    write(path, {
        "steps": np.arange(steps), "layer/name": np.array([f"layer.{i}" for i in range(layers)]),
        "layer/kind": np.full(layers, "matrix"), "layer/numel": np.full(layers, 10**6),
        "loss": np.linspace(3, 1, steps), "grad/l2": values(1), "grad/max_abs": values(0.1),
        "grad/zero_frac": np.zeros(shape, np.float32), "param/l2": values(10),
        "update/l2": values(0.01),
    }, {})  # fmt: skip


def load(path: Path) -> None:
    """Every array of the file, as numpy.load gives it."""
    with np.load(path) as file:
        for name in file.files:
            file[name].sum() if file[name].dtype.kind == "f" else file[name]


def main() -> None:
    layers = int(sys.argv[1]) if len(sys.argv) > 1 else 1_000
    steps = int(sys.argv[2]) if len(sys.argv) > 2 else 10_000
    with tempfile.TemporaryDirectory() as folder:
        large, small = Path(folder) / "large.npz", Path(folder) / "small.npz"
        make(large, layers, steps)
        make(small, layers, steps // 10)
        analyze_flow(small)  # compiles
        size = large.stat().st_size / 1e6
        loading = min(seconds(lambda: load(large)) for _ in range(3))
        whole = min(seconds(lambda: analyze_flow(large)) for _ in range(2))
        short, long = open_history(str(small)), open_history(str(large))
        ratio = seconds(lambda: analyze(long)) / seconds(lambda: analyze(short))
    met = "met" if whole <= TARGET * loading else "MISSED"
    print(f"flow, {layers:,} layers x {steps:,} steps, {size:.0f} MB")
    share = f"{whole / loading:.1f} x loading the file ({loading:.2f} s)"
    print(f"  {whole:.1f} s of CPU time, {share}   target <= {TARGET}: {met}")
    print(f"  10 x the steps take {ratio:.1f} x the time")


if __name__ == "__main__":
    main()
