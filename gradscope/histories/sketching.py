"""Count-sketches: a gradient's direction in k numbers, from which any cosine can be estimated.

Element i of a row goes to bucket ``(h & 0x7FFFFFFF) mod k``, with a minus where the highest of the
32 bits of h is set; h is a full hash of i and of the row's seed. The hash is murmur3's 32-bit
finaliser, in integers below 2^63, so that NumPy and torch (which has no unsigned 32-bit arithmetic)
agree to the bit. Structured shortcuts, such as ``i mod k``, fail on gradients of low rank.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

WIDTH = 128
_MASK = 0xFFFFFFFF
_GOLDEN = 0x9E3779B9
_FIRST, _SECOND = 0x85EBCA6B, 0xC2B2AE35
#: Elements hashed at a time.
_CHUNK = 1 << 20


def seed_of(name: str, seed: int = 0) -> int:
    """The seed of a row, from its name: sketches of one parameter agree between runs (FNV-1a)."""
    value = 0x811C9DC5 ^ (seed & _MASK)
    for byte in name.encode(errors="surrogatepass"):
        value = ((value ^ byte) * 0x01000193) & _MASK
    return value


def hashed(index: NDArray[np.int64], seed: int) -> NDArray[np.int64]:
    """A 32-bit hash of each index below 2^32, as int64.

    h = index * 0x9E3779B9 + seed; h ^= h >> 16; h *= 0x85EBCA6B; h ^= h >> 13; h *= 0xC2B2AE35;
    h ^= h >> 16, all modulo 2^32. Products of 32-bit numbers wrap modulo 2^64, which leaves the
    low 32 bits right.
    """
    with np.errstate(over="ignore"):
        found: NDArray[np.int64] = mixed(index, seed)
    return found


def mixed(index: Any, seed: int) -> Any:
    """``hashed``, also of one index: compiled loops are made of it."""
    h = (index * _GOLDEN + seed) & _MASK
    h = ((h ^ (h >> 16)) * _FIRST) & _MASK
    h = ((h ^ (h >> 13)) * _SECOND) & _MASK
    return h ^ (h >> 16)


def sketch(values: NDArray[np.floating], *, seed: int, width: int = WIDTH) -> NDArray[np.float64]:
    """The count-sketch of an array's elements in row-major order, float64 [width].

    Linear; the inner product of two sketches with one seed is an unbiased estimate of that of the
    arrays (Charikar, Chen & Farach-Colton 2002).
    """
    flat = np.asarray(values, dtype=np.float64).ravel()
    out = np.zeros(width)
    for first in range(0, len(flat), _CHUNK):
        part = flat[first : first + _CHUNK]
        h = hashed(np.arange(first, first + len(part), dtype=np.int64), seed)
        signs = 1.0 - 2.0 * (h >> 31)
        out += np.bincount((h & 0x7FFFFFFF) % width, weights=signs * part, minlength=width)
    return out
