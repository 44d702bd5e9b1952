"""The recorder on a fake accelerator: the numbers of the CPU, and no waiting before a shard.

Run by test_fakegpu.py in a process of its own.
"""

from __future__ import annotations

from pathlib import Path

import fakegpu
import numpy as np
import pytest
import torch
from torch import nn

REASON = fakegpu.missing()
if REASON:
    pytest.skip(REASON, allow_module_level=True)
fakegpu.register()

from gradscope import GradientRecorder  # noqa: E402
from gradscope.histories.history import History  # noqa: E402
from gradscope.histories.open import open_history  # noqa: E402


def run(device: str, folder: Path, capacity: int = 64) -> list[dict[str, int]]:
    """Train on a device; what each capture asked of it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, foreach=False)
    batches = torch.randn(6, 4, 6)
    asked = []
    with GradientRecorder(model, optimizer, folder, every=1, capacity=capacity) as recorder:
        for step, batch in enumerate(batches):
            loss = (model(batch.to(device)) ** 2).mean()
            loss.backward()
            fakegpu.CALLS.clear()
            recorder.capture(step, loss=loss)
            asked.append(dict(fakegpu.CALLS))
            optimizer.step()
            optimizer.zero_grad()
    return asked


def test_a_recording_on_the_device_is_that_of_the_cpu(tmp_path: Path) -> None:
    run(fakegpu.NAME, tmp_path / "device")
    run("cpu", tmp_path / "cpu")
    here, there = (open_history(str(tmp_path / name)) for name in ("cpu", "device"))

    def arrays(history: History) -> list[np.ndarray]:
        names = ("l2", "max_abs", "zero_fraction", "param_l2", "update_l2", "loss", "total_l2")
        return [getattr(history, name) for name in names]

    for ours, theirs in zip(arrays(there), arrays(here), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-7)
    assert there.sketches is not None
    assert here.sketches is not None
    np.testing.assert_allclose(there.sketches.values, here.sketches.values, atol=2e-3)
    assert there.edges.tolist() == here.edges.tolist()


def test_no_capture_waits_for_the_device_until_the_ring_is_full(tmp_path: Path) -> None:
    asked = run(fakegpu.NAME, tmp_path / "a", capacity=4)

    waited = [bool(calls.get(fakegpu.FETCHED) or fakegpu.WAITING & set(calls)) for calls in asked]

    assert waited == [False, False, False, False, True, False]
