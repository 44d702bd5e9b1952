"""The norm of a convolution against the dense matrix of the map that torch computes."""

from __future__ import annotations

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
        ((30, 40, 3, 3), 1, 5), ((60, 30, 3), 2, 6),
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


def test_zeros_have_no_norm() -> None:
    assert operator_norm(np.zeros((3, 2, 3, 3))) == 0.0
    assert operator_norm(np.zeros((40, 30, 3, 3))) == 0.0
