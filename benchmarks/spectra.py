"""Time ``gradscope weights --spectral`` against weightwatcher 0.7.7 on the same matrices.

The matrices are those of a BERT of a few layers and the kernels of a ResNet, with heavy tails. Both
programs are timed as they are installed, by the clock, and on one thread, in seconds of the
processor; without imports, the least of some repeats, in turns. Ours include the statistics and
rules of ``gradscope weights``. weightwatcher comes from the extra `oracles`; without it the table
says so.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

WIDTH = 768
REPEATS = 2
Shapes = Sequence[tuple[int, ...]]

TIMED = """
import json, sys, time
def timed(run, found):
    clock, processor = time.perf_counter(), time.process_time()
    result = run()
    seconds = {"clock": time.perf_counter() - clock, "processor": time.process_time() - processor}
    print(json.dumps({**seconds, "alpha": found(result)}))
"""

OURS = (
    TIMED
    + """
import gradscope
path, device, jobs = sys.argv[1], sys.argv[2], int(sys.argv[3]) or None
run = lambda: gradscope.analyze_weights(path, spectral=True, device=device, jobs=jobs)
run()  # compiles the kernels
timed(run, lambda report: [t.spectrum.alpha for t in report.result.tensors])
"""
)

THEIRS = (
    TIMED
    + """
import contextlib, io, logging, warnings
warnings.simplefilter("ignore")
import torch
with contextlib.redirect_stdout(io.StringIO()):
    import weightwatcher
logging.getLogger("weightwatcher").setLevel(logging.ERROR)
def layer(w):
    if w.ndim == 2:
        return torch.nn.Linear(w.shape[1], w.shape[0], bias=False)
    return torch.nn.Conv2d(w.shape[1], w.shape[0], w.shape[2], bias=False)
weights = torch.load(sys.argv[1], weights_only=True)
model = torch.nn.Sequential(*map(layer, weights.values()))
model.load_state_dict(weights)
def run():
    with contextlib.redirect_stdout(io.StringIO()):
        return weightwatcher.WeightWatcher(model=model).analyze()
timed(run, lambda found: list(map(float, found["alpha"])))
"""
)


def bert(layers: int) -> Shapes:
    return ([(WIDTH, WIDTH)] * 4 + [(4 * WIDTH, WIDTH), (WIDTH, 4 * WIDTH)]) * layers


def resnet(layers: int) -> Shapes:
    return [(n, n, 3, 3) for n in (64, 128, 256, 512) for _ in range(layers)]


def checkpoint(path: Path, shapes: Shapes) -> Path:
    made = torch.Generator().manual_seed(0)
    weights = {}
    for index, (out, *rest) in enumerate(shapes):
        w = torch.randn(out, *rest, generator=made) * 0.03
        many = w[0].numel()
        spikes = torch.randn(out, 60, generator=made) @ torch.randn(60, many, generator=made)
        weights[f"{index}.weight"] = w + spikes.reshape(w.shape) * 0.002
    torch.save(weights, path)
    return path


def measured(script: str, *arguments: object, threads: int) -> dict[str, list[float]]:
    command = [sys.executable, "-c", script, *map(str, arguments)]
    one = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    environment = {**os.environ, **(one if threads else {})}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    found: dict[str, list[float]] = json.loads(done.stdout.splitlines()[-1])
    return found


def least(runs: list[dict[str, list[float]]], what: str) -> float:
    return min(float(run[what]) for run in runs)


def rows(path: Path, what: str, device: str, peer: bool) -> Iterator[str]:
    """A row for each way of timing, and one for how far the exponents are apart."""
    for threads, named, clock in ((0, "as installed", "clock"), (1, "one thread", "processor")):
        name = f"`weights --spectral`, {what}, {device}, {named}"
        ours, theirs = [], []
        for _ in range(REPEATS):
            ours.append(measured(OURS, path, device, threads, threads=threads))
            if peer:
                theirs.append(measured(THEIRS, path, threads=threads))
        own = least(ours, clock)
        if not peer:
            yield f"| {name} | weightwatcher 0.7.7 | {own:.2f} s; not installed | ≥ 3× | – |"
            continue
        ratio = least(theirs, clock) / own
        times = f"{ratio:.1f}× faster ({least(theirs, clock):.2f} s / {own:.2f} s)"
        met = "yes" if ratio >= 3 else "no"
        yield f"| {name} | weightwatcher 0.7.7 | {times} | ≥ 3× | {met} |"
    if peer:
        apart = max(abs(a - b) for a, b in zip(ours[0]["alpha"], theirs[0]["alpha"], strict=True))
        met = "yes" if apart <= 1e-3 else "no"
        yield f"| alpha of all of them | weightwatcher 0.7.7 | {apart:.1e} apart | ≤ 1e-3 | {met} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=1, help="of the BERT, and blocks a width")
    parser.add_argument("--device", default="cpu", help="what gradscope computes on")
    given = parser.parse_args()
    peer = importlib.util.find_spec("weightwatcher") is not None
    print("| what | peer | measured | target | met? |\n| --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder:
        for named, shapes in (("BERT", bert(given.layers)), ("ResNet", resnet(given.layers))):
            path = checkpoint(Path(folder) / f"{named}.pt", shapes)
            for row in rows(path, f"{len(shapes)} matrices of a {named}", given.device, peer):
                print(row, flush=True)


if __name__ == "__main__":
    main()
