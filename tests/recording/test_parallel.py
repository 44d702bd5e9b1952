"""Several processes: gradients are whole, and one of them writes."""

from __future__ import annotations

import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from gradscope.histories.open import open_history

WORKER = """
    import os, sys, torch
    import torch.distributed as dist
    from torch import nn
    from gradscope import GradientRecorder
    rank, port, folder, how = int(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4]
    recorded, seen = sys.argv[5] == "recorded", []
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))
    torch.manual_seed(1)
    inputs = torch.randn(4, 8, 6)
    if how == "ddp":
        model = nn.parallel.DistributedDataParallel(model)
    elif how == "fsdp2":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard
        fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recorder = GradientRecorder(model, optimizer, folder, every=1) if recorded else None
    for step in range(4):
        optimizer.zero_grad()
        loss = (model(inputs[step].chunk(2)[rank]) ** 2).mean()
        loss.backward()
        if recorder is not None:
            recorder.capture(step, loss=loss)
        optimizer.step()
        local = [getattr(p, "_local_tensor", p).detach().clone() for p in model.parameters()]
        seen.append((loss.detach(), local, torch.get_rng_state()))
    if recorder is not None:
        recorder.close()
    os.makedirs(folder, exist_ok=True)
    torch.save(seen, f"{folder}/seen-{rank}.pt")
    dist.destroy_process_group()
    # torch's own threads abort one exit in ten of FSDP2 over gloo, without a recorder too.
    os._exit(0)
"""


def alone(folder: Path) -> None:
    """The same training in one process: the mean over both halves of each batch."""
    import torch
    from torch import nn

    from gradscope import GradientRecorder

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))
    torch.manual_seed(1)
    inputs = torch.randn(4, 8, 6)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with GradientRecorder(model, optimizer, folder, every=1) as recorder:
        for step in range(4):
            optimizer.zero_grad()
            (model(inputs[step]) ** 2).mean().backward()
            recorder.capture(step)
            optimizer.step()


def two(how: str, folder: Path, kept: str = "recorded") -> None:
    """The training in two processes, each of which leaves what it saw of every step."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    code = textwrap.dedent(WORKER)
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(rank), port, str(folder), how, kept],
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for worker in workers:
        _, said = worker.communicate(timeout=120)
        assert worker.returncode == 0, said


@pytest.mark.parametrize("how", ["ddp", "fsdp2"])
def test_norms_of_two_processes_are_those_of_one(how: str, tmp_path: Path) -> None:
    two(how, tmp_path / "two")
    alone(tmp_path / "one")

    one, both = open_history(str(tmp_path / "one")), open_history(str(tmp_path / "two"))

    assert [layer.name for layer in both.layers] == [layer.name for layer in one.layers]
    for field in ("l2", "max_abs", "param_l2", "update_l2", "zero_fraction"):
        np.testing.assert_allclose(getattr(both, field), getattr(one, field), rtol=2e-4, atol=1e-6)
    assert both.meta["rank"] == 0


@pytest.mark.parametrize("how", ["ddp", "fsdp2"])
def test_two_processes_train_the_same_to_the_bit_with_and_without(how: str, tmp_path: Path) -> None:
    import torch

    two(how, tmp_path / "with")
    two(how, tmp_path / "without", kept="nothing")

    for rank in range(2):
        with_, without = (
            torch.load(tmp_path / name / f"seen-{rank}.pt") for name in ("with", "without")
        )
        assert len(with_) == 4
        for ours, plain in zip(with_, without, strict=True):
            assert torch.equal(ours[0], plain[0])
            assert all(map(torch.equal, ours[1], plain[1]))
            assert torch.equal(ours[2], plain[2])
