"""The statistics on a fake accelerator: right results, on one device, without needless waiting.

Run by test_fakegpu.py in a process of its own.
"""

from __future__ import annotations

from pathlib import Path

import fakegpu
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

REASON = fakegpu.missing()
if REASON:
    pytest.skip(REASON, allow_module_level=True)
fakegpu.register()

from test_torch_scan import DTYPES, SHAPES, assert_profiles_agree, stored_tensor  # noqa: E402

import gradscope  # noqa: E402
from gradscope.checkpoints.tiles import PIECE  # noqa: E402
from gradscope.device import resolve  # noqa: E402
from gradscope.errors import UsageError  # noqa: E402
from gradscope.spectra.algebra import Numpy  # noqa: E402
from gradscope.spectra.matrices import Matrix  # noqa: E402
from gradscope.spectra.torch_algebra import algebra_on  # noqa: E402
from gradscope.statistics import codings, profile, threads  # noqa: E402
from gradscope.statistics.torch_scan import TorchScan, scan_on  # noqa: E402


def test_it_mixes_no_devices_and_gives_no_values_away() -> None:
    shell = torch.arange(6.0).to(fakegpu.NAME)
    assert torch.equal((shell * 2).view(2, 3).sum(1).cpu(), torch.tensor([6.0, 24.0]))
    with pytest.raises(RuntimeError, match="same device"):
        shell + torch.ones(6)
    with pytest.raises(TypeError, match=r"Tensor\.cpu"):
        shell.numpy()


def test_it_is_found_by_name_and_by_auto() -> None:
    assert resolve("auto").type == fakegpu.NAME
    assert resolve(fakegpu.NAME).type == fakegpu.NAME
    assert resolve("cpu").type == "cpu"
    assert isinstance(scan_on("auto"), TorchScan)
    assert isinstance(scan_on("fakegpu:0"), TorchScan)


def test_an_absent_device_is_an_error_that_names_it() -> None:
    with pytest.raises(UsageError, match=r"'cuda:99'.*Available here: cpu, fakegpu:0"):
        resolve("cuda:99")


@pytest.mark.parametrize("dtype", DTYPES)
def test_profiles_agree_with_the_cpu_kernels(dtype: str, tmp_path: Path) -> None:
    refs = [stored_tensor(tmp_path, dtype, shape) for shape in SHAPES]
    scan = scan_on(fakegpu.NAME)
    for ours, theirs in zip(profile(refs, scan=scan).tensors, profile(refs).tensors, strict=True):
        assert_profiles_agree(ours, theirs)


@pytest.mark.parametrize("dtype", [d for d in DTYPES if d not in codings.INTEGERS])
def test_a_piece_is_one_transfer_each_way_and_nothing_waits(dtype: str, tmp_path: Path) -> None:
    ref = stored_tensor(tmp_path, dtype, (3, PIECE // 2 + 5))
    scan = scan_on(fakegpu.NAME)
    profile([ref], scan=scan)  # constants go to the device once
    fakegpu.CALLS.clear()
    profile([ref], scan=scan, engine=threads(1))
    pieces = -(-ref.numel // PIECE)
    assert fakegpu.CALLS[fakegpu.SENT] == pieces
    assert fakegpu.CALLS[fakegpu.FETCHED] == pieces
    assert not fakegpu.WAITING & set(fakegpu.CALLS)


@pytest.mark.parametrize("shape", [(300, 40), (40, 300), (250, 260)])
def test_singular_values_are_those_of_the_cpu(shape: tuple[int, int]) -> None:
    found = Matrix.of(np.random.default_rng(0).standard_normal(shape).astype(np.float32))
    algebra = algebra_on(fakegpu.NAME)

    values = algebra.eigenvalues(found.chunks, found.columns)
    norm = algebra.norm(found.chunks, found.columns)

    np.testing.assert_allclose(values, Numpy().eigenvalues(found.chunks, found.columns))
    assert norm == pytest.approx(np.sqrt(values[-1]), rel=1e-4)


def test_the_spectra_of_a_checkpoint_are_those_of_the_cpu(tmp_path: Path) -> None:
    made = torch.Generator().manual_seed(0)
    shapes = {"a.weight": (60, 40), "b.weight": (40, 300), "conv.weight": (30, 26, 3, 3)}
    tensors = {n: torch.randn(*s, generator=made) / 10 for n, s in shapes.items()}
    save_file(tensors, tmp_path / "m.safetensors")

    cpu, gpu = (
        gradscope.analyze_weights(tmp_path / "m.safetensors", spectral=True, device=d)
        for d in ("cpu", fakegpu.NAME)
    )

    assert [f.name for f in gpu.findings] == [f.name for f in cpu.findings]
    for there, here in zip(gpu.result.tensors, cpu.result.tensors, strict=True):
        assert there.spectrum is not None
        for name, wanted in here.spectrum.model_dump().items():
            found = getattr(there.spectrum, name)
            assert found == (pytest.approx(wanted, rel=1e-6) if wanted else wanted), name
