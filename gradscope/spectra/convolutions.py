"""Convolutions: weightwatcher's slices of a kernel, and the norm of the linear map that it is."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from gradscope.spectra.algebra import Algebra, leading
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
    peak = float(np.abs(kernel).max())
    if peak == 0:
        return 0.0
    waves = _waves(size, grid if math.prod(size) > 1 else 1)
    split = (kernel / peak).reshape(groups, out // groups, into, -1).astype(np.float32)
    if min(out // groups, into) <= _NARROW:
        return peak * max(_of_all(kernels, waves) for kernels in _some(split, waves))
    places = np.ascontiguousarray(np.moveaxis(split, -1, 1))
    return peak * max(_of_likely(kernels, waves) for kernels in places)


#: Rows or columns up to which the matrices of all frequencies are decomposed.
_NARROW = 24
#: Elements of Fourier transforms that are looked at together.
_ELEMENTS = 1 << 22
#: Dimensions of either side in which a kernel is sketched.
_SKETCH = 16
#: Steps of the power method: how far below the greatest frequency one may be and goes on.
_MARGINS = (0.3, 0.2, 0.15, 0.1, 0.08, 0.06, 0.05, 0.04)
#: Frequencies that are decomposed in the end.
_LIKELY = 4


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

    Frequencies are left behind as soon as they are well below the greatest; those of a trained
    kernel soon are, those of noise hardly.
    """
    if not kernel.any():
        return 0.0
    back = np.ascontiguousarray(kernel.swapaxes(1, 2))
    told, vectors = _sketched(kernel, back, waves)
    kept = np.arange(waves.shape[1])
    for margin in _MARGINS:
        near = np.argsort(told)[-max(_LIKELY, np.sum(told >= (1 - margin) * told.max())) :]
        kept, told, vectors = kept[near], told[near], np.ascontiguousarray(vectors[:, near])
        if len(kept) <= _LIKELY:
            break
        images = _product(kernel, vectors, waves[:, kept])
        vectors = _product(back, images, waves[:, kept].conj())
        lengths = np.linalg.norm(vectors, axis=0)
        told, vectors = lengths / np.linalg.norm(images, axis=0), vectors / lengths
    return max(_norm_at(kernel, waves[:, f]) for f in kept[np.argsort(told)[-_LIKELY:]])


def _sketched(kernel: Array, back: Array, waves: Array) -> tuple[Array, Array]:
    """Of each frequency a lower bound of the norm, and the vector [in, frequencies] that shows it.

    Both sides are reduced to the leading dimensions of all places together.
    """
    left, right = _leading_dimensions(kernel), _leading_dimensions(back)
    _, values, vectors = np.linalg.svd(np.tensordot(waves.T, left.T @ kernel @ right, 1))
    return values[:, 0], np.asarray(right @ vectors[:, 0].conj().T, np.complex64)


def _leading_dimensions(kernel: Array) -> Array:
    """An orthonormal basis [out, few] of most of what [places, out, in] has, by two power steps."""
    wide = np.moveaxis(kernel, 0, 1).reshape(kernel.shape[1], -1)
    found = np.random.default_rng(0).standard_normal((wide.shape[1], _SKETCH)).astype(np.float32)
    for _ in range(2):
        found = wide.T @ np.linalg.qr(wide @ found)[0]
    return np.asarray(np.linalg.qr(wide @ np.linalg.qr(found)[0])[0])


def _product(kernel: Array, vectors: Array, waves: Array) -> Array:
    """Of the Fourier transform at each frequency with its vector, [in, frequencies].

    Place by place: a few large products of real matrices instead of many of complex ones.
    """
    real = vectors.view(np.float32)
    parts = ((place @ real).view(np.complex64) for place in kernel)
    return np.asarray(sum(part * wave for part, wave in zip(parts, waves, strict=True)))


def _norm_at(kernel: Array, wave: Array) -> float:
    """The norm at one frequency."""
    matrix = np.tensordot(wave, kernel, 1)
    back = np.ascontiguousarray(matrix.conj().T)

    def product(vector: Values) -> Values:
        image = back @ (matrix @ vector.astype(np.float32).view(np.complex64))
        return np.asarray(image.view(np.float32), np.float64)

    return leading(product, 2 * matrix.shape[1])
