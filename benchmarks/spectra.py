"""Time ``gradscope weights --spectral`` against weightwatcher 0.7.7 on the same matrices.

The matrices are those of a BERT of a few layers, with heavy tails. Times are those of the
processor, without imports; ours include the statistics and rules of ``gradscope weights``.
weightwatcher comes from the extra `oracles`; without it the table says so.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

WIDTH = 768

OURS = """
import json, sys, time
import gradscope
gradscope.analyze_weights(sys.argv[1], spectral=True, device=sys.argv[2])  # compiles the kernels
begin = time.process_time()
report = gradscope.analyze_weights(sys.argv[1], spectral=True, device=sys.argv[2])
seconds = time.process_time() - begin
alpha = [tensor.spectrum.alpha for tensor in report.result.tensors]
print(json.dumps({"seconds": seconds, "alpha": alpha}))
"""

THEIRS = """
import contextlib, io, json, logging, sys, time, warnings
warnings.simplefilter("ignore")
import torch
with contextlib.redirect_stdout(io.StringIO()):
    import weightwatcher
logging.getLogger("weightwatcher").setLevel(logging.ERROR)
weights = torch.load(sys.argv[1], weights_only=True)
linear = lambda w: torch.nn.Linear(w.shape[1], w.shape[0], bias=False)
model = torch.nn.Sequential(*map(linear, weights.values()))
model.load_state_dict(weights)
begin = time.process_time()
with contextlib.redirect_stdout(io.StringIO()):
    found = weightwatcher.WeightWatcher(model=model).analyze()
seconds = time.process_time() - begin
print(json.dumps({"seconds": seconds, "alpha": list(map(float, found["alpha"]))}))
"""


def checkpoint(folder: Path, layers: int) -> Path:
    made = torch.Generator().manual_seed(0)
    shapes = [(WIDTH, WIDTH)] * 4 + [(4 * WIDTH, WIDTH), (WIDTH, 4 * WIDTH)]
    weights = {}
    for index, shape in enumerate(shapes * layers):
        w = torch.randn(shape, generator=made) * 0.03
        spikes = torch.randn(shape[0], 60, generator=made) @ torch.randn(
            60, shape[1], generator=made
        )
        weights[f"{index}.weight"] = w + spikes * 0.002
    torch.save(weights, folder / "model.pt")
    return folder / "model.pt"


def measured(script: str, *arguments: object) -> tuple[float, list[float]]:
    command = [sys.executable, "-c", script, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    return found["seconds"], found["alpha"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=4, help="six matrices each")
    parser.add_argument("--device", default="cpu", help="what gradscope computes on")
    given = parser.parse_args()
    print("| what | peer | measured | target | met? |\n| --- | --- | --- | --- | --- |")
    what = f"`weights --spectral`, {6 * given.layers} matrices of a BERT, {given.device}"
    with tempfile.TemporaryDirectory() as folder:
        path = checkpoint(Path(folder), given.layers)
        seconds, alpha = measured(OURS, path, given.device)
        if importlib.util.find_spec("weightwatcher") is None:
            print(f"| {what} | weightwatcher 0.7.7 | not measured: not installed | ≥ 3× | – |")
            return
        their_seconds, their_alpha = measured(THEIRS, path)
    ratio = their_seconds / seconds
    apart = max(abs(a - b) for a, b in zip(alpha, their_alpha, strict=True))
    times = f"{ratio:.1f}× faster ({their_seconds:.2f} s / {seconds:.2f} s)"
    print(f"| {what} | weightwatcher 0.7.7 | {times} | ≥ 3× | {'yes' if ratio >= 3 else 'no'} |")
    print(f"| alpha of all of them | weightwatcher 0.7.7 | {apart:.1e} apart | ≤ 1e-3 | "
          f"{'yes' if apart <= 1e-3 else 'no'} |")  # fmt: skip


if __name__ == "__main__":
    main()
