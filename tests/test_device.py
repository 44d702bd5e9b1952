"""What --device accepts, and how it refuses the rest."""

from __future__ import annotations

import pytest
import torch

from gradscope.device import CPU, has_float64, resolve
from gradscope.errors import UsageError


@pytest.fixture
def no_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)


@pytest.mark.usefixtures("no_accelerator")
@pytest.mark.parametrize("name", ["cpu", "auto"])
def test_without_an_accelerator_the_cpu_does_the_work(name: str) -> None:
    assert resolve(name) == torch.device("cpu")


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "", "tpu:0", "cpu cuda"])
def test_a_name_that_torch_does_not_know(name: str) -> None:
    with pytest.raises(UsageError, match="torch does not know that name") as caught:
        resolve(name)
    assert repr(name) in str(caught.value)
    assert "Available here: cpu" in str(caught.value)


@pytest.mark.parametrize("name", ["cuda:99", "meta", "hpu"])
def test_an_absent_device_is_never_replaced(name: str) -> None:
    with pytest.raises(UsageError, match="Available here: cpu"):
        resolve(name)


def refuse(error: type[Exception], text: str) -> object:
    def ones(*_: object, **__: object) -> None:
        raise error(text)

    return ones


@pytest.mark.usefixtures("no_accelerator")
def test_a_build_without_cuda_says_where_to_find_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch, "ones", refuse(AssertionError, "Torch not compiled with CUDA"))
    with pytest.raises(UsageError, match=r"has no CUDA; .*https://pytorch.org/get-started"):
        resolve("cuda")


@pytest.mark.usefixtures("no_accelerator")
def test_a_cuda_build_without_a_gpu_names_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch, "ones", refuse(RuntimeError, "Found no NVIDIA driver.\nMore"))
    with pytest.raises(UsageError, match=r"Found no NVIDIA driver; `nvidia-smi`") as caught:
        resolve("cuda")
    assert "More" not in str(caught.value)


def test_a_device_number_too_high_says_how_many_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch, "ones", refuse(RuntimeError, "CUDA error: invalid device ordinal"))
    with pytest.raises(UsageError, match=r"'cuda:7': .* 2 .*Available here: cpu, cuda:0, cuda:1"):
        resolve("cuda:7")


def test_float64_is_asked_of_the_device_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    assert has_float64(torch.device(CPU))
    monkeypatch.setattr(torch, "zeros", refuse(TypeError, "MPS has no float64"))
    assert not has_float64(torch.device(CPU))
