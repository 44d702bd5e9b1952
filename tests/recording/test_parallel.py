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
    with GradientRecorder(model, optimizer, folder, every=1) as recorder:
        for step in range(4):
            optimizer.zero_grad()
            (model(inputs[step].chunk(2)[rank]) ** 2).mean().backward()
            recorder.capture(step)
            optimizer.step()
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


@pytest.mark.parametrize("how", ["ddp", "fsdp2"])
def test_norms_of_two_processes_are_those_of_one(how: str, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    code = textwrap.dedent(WORKER)
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(rank), port, str(tmp_path / "two"), how],
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for worker in workers:
        _, said = worker.communicate(timeout=120)
        assert worker.returncode == 0, said
    alone(tmp_path / "one")

    one, two = open_history(str(tmp_path / "one")), open_history(str(tmp_path / "two"))

    assert [layer.name for layer in two.layers] == [layer.name for layer in one.layers]
    for field in ("l2", "max_abs", "param_l2", "update_l2", "zero_fraction"):
        np.testing.assert_allclose(getattr(two, field), getattr(one, field), rtol=2e-4, atol=1e-6)
    assert two.meta["rank"] == 0
