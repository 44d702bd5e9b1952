"""Singular values on every device against NumPy's and SciPy's decompositions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.torch import save_file
from threadpoolctl import threadpool_info

from gradscope.checkpoints import open_checkpoint
from gradscope.errors import UsageError
from gradscope.spectra import algebra as cpu_algebra
from gradscope.spectra import matrices
from gradscope.spectra.algebra import Algebra, Numpy, leading
from gradscope.spectra.matrices import Matrix, matrix
from gradscope.spectra.torch_algebra import Torch, algebra_on
from gradscope.statistics.engine import one_blas_thread

Array = npt.NDArray[Any]

ALGEBRAS: list[Algebra] = [Numpy(), Torch(torch.device("cpu"))]


def heavy(m: int, n: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_t(3, (m, n)).astype(np.float32)


@pytest.mark.parametrize("algebra", ALGEBRAS)
@pytest.mark.parametrize(("m", "n"), [(5, 5), (30, 200), (200, 30), (1, 7), (120, 119)])
def test_all_eigenvalues_are_squared_singular_values(algebra: Algebra, m: int, n: int) -> None:
    w = heavy(m, n)
    found = Matrix.of(w)

    values = algebra.eigenvalues(found.chunks, found.columns)

    wanted = np.linalg.svd(w.astype(np.float64), compute_uv=False)[::-1] ** 2
    np.testing.assert_allclose(values, wanted, rtol=0, atol=1e-13 * wanted[-1])


@pytest.mark.parametrize("algebra", ALGEBRAS)
@pytest.mark.parametrize(("m", "n"), [(300, 300), (500, 210), (210, 900), (7, 5)])
@pytest.mark.parametrize("gaussian", [True, False])
def test_the_norm_is_the_greatest_singular_value(
    algebra: Algebra, m: int, n: int, gaussian: bool
) -> None:
    w = np.random.default_rng(2).standard_normal((m, n)).astype(np.float32)
    found = Matrix.of(w if gaussian else heavy(m, n))

    norm = algebra.norm(found.chunks, found.columns)

    (w,) = found.chunks()
    assert norm == pytest.approx(np.linalg.norm(w.astype(np.float64), 2), rel=1e-4)


@pytest.mark.parametrize("algebra", ALGEBRAS)
@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_norms_of_very_small_and_great_elements_are_found(algebra: Algebra, scale: float) -> None:
    w = heavy(300, 250)
    found = Matrix.of((w.astype(np.float64) * scale).astype(np.float32))

    norm = algebra.norm(found.chunks, found.columns)

    assert norm == pytest.approx(scale * np.linalg.norm(w.astype(np.float64), 2), rel=1e-4)


def test_a_matrix_is_widened_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    w = heavy(130, 20)
    monkeypatch.setattr(cpu_algebra, "_WIDENED", 200)
    found = Matrix.of(w)

    values = Numpy().eigenvalues(found.chunks, found.columns)

    wanted = np.linalg.svd(w.astype(np.float64), compute_uv=False)[::-1] ** 2
    np.testing.assert_allclose(values, wanted, rtol=0, atol=1e-13 * wanted[-1])


def test_blas_uses_one_thread_a_matrix_and_gets_its_own_back() -> None:
    def blas() -> list[int]:
        return [p["num_threads"] for p in threadpool_info() if p["user_api"] == "blas"]

    before = blas()
    with one_blas_thread():
        assert set(blas()) == {1}
    assert blas() == before


def test_equal_and_vanishing_eigenvalues_end_the_search() -> None:
    assert leading(lambda v: 4 * v, 50) == pytest.approx(2.0)
    assert leading(lambda v: 0 * v, 50) == 0.0
    assert leading(lambda v: v * np.array([9.0, 0.0, 0.0]), 3) == pytest.approx(3.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kept", [True, False])
def test_a_tensor_is_read_as_its_values_whether_it_is_kept_or_not(
    dtype: torch.dtype, kept: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(matrices, "PIECE", 64)
    if not kept:
        monkeypatch.setattr(matrices, "KEPT", 10)
    w = torch.from_numpy(heavy(50, 20)).to(dtype)
    save_file({"w": w}, tmp_path / "w.safetensors")
    (ref,) = open_checkpoint(str(tmp_path / "w.safetensors")).tensors

    found = matrix(ref, 30, 20, first=20)

    chunks = list(found.chunks())
    assert (len(chunks) > 1) is not kept
    np.testing.assert_array_equal(np.concatenate(chunks), w[20:].double().numpy())


def test_a_device_that_is_absent_is_an_error() -> None:
    with pytest.raises(UsageError, match="does not know"):
        algebra_on("gpu9")
    assert isinstance(algebra_on("cpu"), Numpy)
