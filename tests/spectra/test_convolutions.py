"""The norm of a convolution against the dense matrix of the map that torch computes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch.nn import functional

from gradscope.spectra.algebra import Numpy
from gradscope.spectra.convolutions import operator_norm, slices

Array = npt.NDArray[Any]
CONV = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}


def kernel(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape)


def dense(k: Array, groups: int, n: int) -> Array:
    """The matrix of the map on a torus of n places along each dimension, column by column."""
    dimensions = k.ndim - 2
    inputs = k.shape[1] * groups
    units = torch.eye(inputs * n**dimensions, dtype=torch.float64)
    x = units.reshape(-1, inputs, *[n] * dimensions)
    pads = [pad for size in reversed(k.shape[2:]) for pad in (0, size - 1)]
    y = CONV[dimensions](
        functional.pad(x, pads, mode="circular"), torch.from_numpy(k), groups=groups
    )
    return y.reshape(len(x), -1).T.numpy()


@pytest.mark.parametrize(
    ("shape", "groups", "n"),
    [
        ((6, 4, 3, 3), 1, 8), ((4, 6, 3, 3), 1, 8), ((8, 1, 3, 3), 8, 8), ((8, 2, 5), 2, 9),
        ((3, 2, 2, 2, 2), 1, 3), ((5, 3, 1, 1), 1, 4), ((5, 4, 4, 3), 1, 5),
        ((30, 40, 3, 3), 1, 5), ((60, 30, 3), 2, 6), ((26, 25, 2, 2, 2), 1, 3),
    ],
)  # fmt: skip
def test_the_norm_is_that_of_the_linear_map(shape: tuple[int, ...], groups: int, n: int) -> None:
    k = kernel(*shape)
    grid = 2 * n if len(shape) == 5 else n

    found = operator_norm(k.astype(np.float32), groups, grid)

    assert found == pytest.approx(np.linalg.norm(dense(k, groups, n), 2), rel=2e-3)


def test_a_kernel_wider_than_the_grid_gets_as_many_places() -> None:
    k = kernel(3, 2, 9)

    assert operator_norm(k, grid=4) == pytest.approx(np.linalg.norm(dense(k, 1, 9), 2), rel=1e-5)


def test_a_moving_average_passes_constants_on() -> None:
    assert operator_norm(np.full((1, 1, 3, 3), 1 / 9)) == pytest.approx(1.0)


def test_slices_are_those_of_every_place_halved() -> None:
    k = kernel(6, 4, 2, 3)

    wanted = [np.linalg.svd(k[:, :, i, j], compute_uv=False) ** 2 for i in (0, 1) for j in range(3)]

    np.testing.assert_allclose(slices(k, Numpy()), np.sort(np.concatenate(wanted)) / 2, rtol=1e-9)


def by_frequency(k: Array, n: int) -> float:
    """The greatest norm of the Fourier transforms that NumPy computes."""
    axes = tuple(range(2, k.ndim))
    found = np.fft.fftn(k, [n] * len(axes), axes).reshape(*k.shape[:2], -1)
    return float(np.linalg.svd(np.moveaxis(found, -1, 0), compute_uv=False).max())


def spiked(*shape: int) -> Array:
    out, into, *places = shape
    rng = np.random.default_rng(5)
    spikes = rng.normal(size=(out, 20)) @ rng.normal(size=(20, into * math.prod(places)))
    return kernel(*shape) + 0.05 * spikes.reshape(shape)


def high_pass(*shape: int) -> Array:
    left, right = kernel(shape[0], 1, seed=1), kernel(1, shape[1], seed=2)
    laplace = np.outer([1, -2, 1], [1, -2, 1])
    return kernel(*shape) + 0.2 * (left @ right)[:, :, None, None] * laplace


@pytest.mark.parametrize(
    ("made", "apart"),
    [(kernel, 1e-2), (spiked, 1e-2), (high_pass, 2e-4), (lambda *s: kernel(*s) + 0.3, 2e-4)],
    ids=["noise", "spiked", "high-pass", "mean"],
)
def test_the_frequency_of_the_norm_is_found_among_many(made: Any, apart: float) -> None:
    """Where frequencies hardly differ, as in noise, to a hundredth; else to the last digits."""
    for out, into in ((48, 48), (96, 64), (32, 80)):
        k = made(out, into, 3, 3)
        wanted = by_frequency(k, 16)

        found = operator_norm(k)

        assert wanted * (1 - apart) <= found <= wanted * (1 + 2e-4)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_the_norm_scales_with_the_kernel(scale: float) -> None:
    k = kernel(30, 26, 3, 3)

    assert operator_norm(scale * k) == pytest.approx(scale * operator_norm(k), rel=1e-5)


def test_zeros_have_no_norm() -> None:
    assert operator_norm(np.zeros((3, 2, 3, 3))) == 0.0
    assert operator_norm(np.zeros((40, 30, 3, 3))) == 0.0
    one_of_two = np.concatenate([np.zeros((30, 30, 3)), kernel(30, 30, 3)])
    assert operator_norm(one_of_two, groups=2) == pytest.approx(operator_norm(kernel(30, 30, 3)))
