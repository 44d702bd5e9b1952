"""Convolutions: weightwatcher's slices of a kernel, and the norm of the linear map that it is."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from gradscope.spectra.algebra import Algebra, Numpy
from gradscope.spectra.matrices import Matrix

Array = npt.NDArray[Any]
Values = npt.NDArray[np.float64]

#: Places of the input along each dimension.
GRID = 16


def slices(kernel: Array, algebra: Algebra) -> Values:
    """Squared singular values of the matrices [out, in] at every place of a kernel
    [out, in, *places], pooled, as weightwatcher takes them: halved.
    """
    out, into = kernel.shape[:2]
    places = np.moveaxis(kernel.reshape(out, into, -1), -1, 0)
    found = (Matrix.of(place) for place in places)
    return np.sort(np.concatenate([algebra.eigenvalues(m.chunks, m.columns) for m in found])) / 2


def operator_norm(kernel: Array, groups: int = 1, grid: int = GRID) -> float:
    """The norm of a convolution [out, in / groups, *places] of stride 1 on a torus.

    Its singular values are those of the kernel's Fourier transform at each frequency (Sedghi, Gupta
    and Long 2019). The torus has ``grid`` places along each dimension, of a kernel in three
    dimensions half as many, and never fewer than the kernel.
    """
    out, into, *size = kernel.shape
    waves = _waves(size, grid if math.prod(size) > 1 else 1)
    split = kernel.reshape(groups, out // groups, into, -1).astype(np.float32)
    if min(out // groups, into) <= _NARROW:
        return max(_of_all(kernels, waves) for kernels in _some(split, waves))
    places = np.ascontiguousarray(np.moveaxis(split, -1, 1))
    return max(_of_likely(kernels, waves) for kernels in places)


#: Rows or columns up to which the matrices of all frequencies are decomposed.
_NARROW = 24
#: Elements of Fourier transforms that are looked at together.
_ELEMENTS = 1 << 22
#: Vectors and steps of the power method that shows which frequencies are likely, and how many.
_WIDTH, _STEPS, _LIKELY = 4, 6, 6


def _waves(size: list[int], grid: int) -> npt.NDArray[np.complex64]:
    """[places of the kernel, frequencies]; of each frequency and its negative, one."""
    sides = [max(grid if len(size) < 3 else grid // 2, n) for n in size]
    frequencies = np.stack(np.meshgrid(*map(np.arange, sides), indexing="ij"), -1)
    flat = (frequencies / np.array(sides)).reshape(-1, len(size))
    places = np.stack(np.meshgrid(*map(np.arange, size), indexing="ij"), -1).reshape(-1, len(size))
    kept = flat[flat[:, -1] <= 0.5]
    return np.asarray(np.exp(-2j * np.pi * places @ kept.T), np.complex64)


def _some(kernels: Array, waves: Array) -> Iterator[Array]:
    """Runs of groups whose Fourier transforms fit into memory."""
    size = kernels[0, ..., 0].size * waves.shape[1]
    step = max(_ELEMENTS // size, 1)
    yield from (kernels[at : at + step] for at in range(0, len(kernels), step))


def _of_all(kernels: Array, waves: Array) -> float:
    """The greatest singular value of [groups, out, in, places] at any frequency."""
    found = np.moveaxis(kernels @ waves, -1, 1)
    if 1 in found.shape[2:]:  # depthwise: vectors
        return float(np.linalg.norm(found, axis=(2, 3)).max())
    return float(np.linalg.svd(found, compute_uv=False).max())


def _of_likely(kernel: Array, waves: Array) -> float:
    """The same of one [places, out, in], looked for where the power method leads.

    All frequencies are multiplied at once, place by place, which is a few large products of real
    matrices instead of many of complex ones.
    """
    vectors = np.random.default_rng(0).standard_normal((kernel.shape[2], waves.shape[1], _WIDTH))
    images = _product(kernel, vectors.astype(np.complex64), waves)
    for _ in range(_STEPS):
        back = _product(kernel.swapaxes(1, 2), images, waves.conj())
        q = np.linalg.qr(np.moveaxis(back, 0, 1))[0]
        images = _product(kernel, np.ascontiguousarray(np.moveaxis(q, 1, 0)), waves)
    told = np.linalg.norm(np.moveaxis(images, 0, 1), 2, axis=(1, 2))
    return max(_norm_at(kernel, waves[:, f]) for f in np.argsort(told)[-_LIKELY:])


def _product(kernel: Array, vectors: Array, waves: Array) -> Array:
    """Of the Fourier transform at each frequency with vectors [in, frequencies, width]."""
    into, *rest = vectors.shape
    real = vectors.view(np.float32).reshape(into, -1)
    parts = ((place @ real).view(np.complex64).reshape(-1, *rest) for place in kernel)
    return np.asarray(sum(p * wave[:, None] for p, wave in zip(parts, waves, strict=True)))


def _norm_at(kernel: Array, wave: Array) -> float:
    """The norm at one frequency, of the real matrix that does the same."""
    matrix = np.tensordot(wave, kernel, 1)
    real = np.block([[matrix.real, -matrix.imag], [matrix.imag, matrix.real]])
    return Numpy().norm(lambda: (real,), real.shape[1])
