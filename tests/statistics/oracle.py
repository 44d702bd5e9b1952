"""What the tests of statistics compare with: NumPy, SciPy, torch and tables copied from a standard.

Nothing here calls gradscope but to make a TensorRef, to measure it and to read the result.
"""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import scipy.stats
import torch

from gradscope.checkpoints.tensors import TensorRef
from gradscope.checkpoints.tiles import PIECE as PIECE
from gradscope.statistics import profile, threads
from gradscope.statistics.records import Statistics, TensorProfile

Array = npt.NDArray[Any]


BITS = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}

# OCP Microscaling Formats (MX) Specification v1.0, tables 4 to 6: the values of the positive codes
# in code order; the top bit of a code is its sign.
F4_E2M1 = (0, 0.5, 1, 1.5, 2, 3, 4, 6)
F6_E2M3 = (
    0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875,
    1, 1.125, 1.25, 1.375, 1.5, 1.625, 1.75, 1.875,
    2, 2.25, 2.5, 2.75, 3, 3.25, 3.5, 3.75,
    4, 4.5, 5, 5.5, 6, 6.5, 7, 7.5,
)  # fmt: skip
F6_E3M2 = (
    0, 0.0625, 0.125, 0.1875,
    0.25, 0.3125, 0.375, 0.4375,
    0.5, 0.625, 0.75, 0.875,
    1, 1.25, 1.5, 1.75,
    2, 2.5, 3, 3.5,
    4, 5, 6, 7,
    8, 10, 12, 14,
    16, 20, 24, 28,
)  # fmt: skip
TABLES = {
    name: np.array([*half, *(-float(v) for v in half)], np.float64)
    for name, half in (("F4", F4_E2M1), ("F6_E2M3", F6_E2M3), ("F6_E3M2", F6_E3M2))
}

TORCH = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
}
CODED = (*TORCH, *TABLES)
NARROW = tuple(d for d in CODED if d != "F8_E8M0")  # signed: any value has a nearest code
WIDE = ("F32", "F64")
INTEGERS = ("U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64")
NATIVE = {
    "F32": np.float32, "F64": np.float64, "C64": np.complex64, "C128": np.complex128,
    "U8": np.uint8, "I8": np.int8, "U16": np.uint16, "I16": np.int16, "BOOL": np.uint8,
    "U32": np.uint32, "I32": np.int32, "U64": np.uint64, "I64": np.int64,
}  # fmt: skip
#: Entropy of a standard normal distribution, in bits.
GAUSSIAN_BITS = 0.5 * math.log2(2 * math.pi * math.e)
QUANTILES = (0.001, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 0.999)


# -- codes and what they mean ----------------------------------------------------------------------


def decode(dtype: str, stored: Array) -> npt.NDArray[np.float64]:
    """Stored elements as float64; complex ones by magnitude."""
    if dtype in TABLES:
        return TABLES[dtype][stored]
    if dtype in TORCH:
        signed = torch.from_numpy(stored.view(f"i{stored.itemsize}"))
        with np.errstate(invalid="ignore"):  # signalling NaNs
            return signed.view(TORCH[dtype]).to(torch.float32).numpy().astype(np.float64)
    if dtype in ("C64", "C128"):
        return np.abs(stored).astype(np.float64)
    if dtype == "BOOL":
        return (stored != 0).astype(np.float64)
    with np.errstate(invalid="ignore"):
        return stored.astype(np.float64)


def encode(dtype: str, values: Array) -> Array:
    """The stored elements nearest to values."""
    if dtype in TABLES:
        table = TABLES[dtype]
        order = np.argsort(table, kind="stable")[1:]  # one zero is enough
        between = (table[order][1:] + table[order][:-1]) / 2
        return order[np.searchsorted(between, values)].astype(np.uint8)
    if dtype in TORCH:
        narrow = torch.from_numpy(values.astype(np.float32)).to(TORCH[dtype])
        size = narrow.element_size()
        return narrow.view(torch.uint8 if size == 1 else torch.int16).numpy().view(f"u{size}")
    return values.astype(NATIVE[dtype])


def packed(dtype: str, stored: Array) -> bytes:
    """The bytes of stored elements; sub-byte codes as one stream of bits, the lowest first."""
    if dtype not in BITS:
        return np.ascontiguousarray(stored).tobytes()
    bits = stored.reshape(-1, 1) >> np.arange(BITS[dtype], dtype=np.uint8) & 1
    return np.packbits(bits, bitorder="little").tobytes()


# -- tensors ---------------------------------------------------------------------------------------

_numbers = itertools.count()


def tensor(
    folder: Path,
    dtype: str,
    stored: Array,
    shape: tuple[int, ...] | None = None,
    *,
    pad: int = 0,
    **fields: Any,
) -> TensorRef:
    """Write stored elements to a raw file of their own, after ``pad`` bytes, and address them."""
    number = next(_numbers)
    path = folder / f"{number}.bin"
    path.write_bytes(b"\xa5" * pad + packed(dtype, stored))
    shape = stored.shape if shape is None else shape
    return TensorRef(f"t{number}", dtype, shape, str(path), pad, **fields)


def measure(ref: TensorRef, *, jobs: int = 1, **options: Any) -> TensorProfile:
    """The profile of one tensor."""
    return profile([ref], engine=threads(jobs), **options).tensors[0]


def measured(
    folder: Path, dtype: str, stored: Array, shape: tuple[int, ...] | None = None
) -> TensorProfile:
    """The profile of a tensor of these stored elements."""
    return measure(tensor(folder, dtype, stored, shape))


# -- the definitions, once more --------------------------------------------------------------------


def accurate_mean_std(x: Array) -> tuple[float, float]:
    """Mean and population standard deviation in extended precision."""
    wide = x.astype(np.longdouble)
    mean = wide.mean()
    return float(mean), float(np.sqrt(((wide - mean) ** 2).mean()))


def assert_moments(s: Statistics, x: Array, *, shape: float = 1e-7) -> None:
    """Mean, std, rms, norm within 1e-9, skewness and kurtosis within ``shape``, of finite x."""
    scale = float(np.abs(x).max())
    unit = (x / scale).astype(np.longdouble)
    mean, std = accurate_mean_std(unit)
    rms = float(np.sqrt((unit * unit).mean()))
    assert s.mean is not None
    assert s.mean / scale == pytest.approx(mean, rel=1e-9, abs=1e-12 * std)
    assert s.std is not None
    assert s.std / scale == pytest.approx(std, rel=1e-9)
    assert s.rms is not None
    assert s.rms / scale == pytest.approx(rms, rel=1e-9)
    assert s.l2_norm is not None
    assert s.l2_norm / scale == pytest.approx(rms * math.sqrt(x.size), rel=1e-9)
    if s.skewness is not None or s.kurtosis is not None:
        # SciPy is exact enough on centred values of ordinary size, and on nothing else.
        centred = ((unit - unit.mean()) / std).astype(np.float64)
        assert s.skewness == pytest.approx(scipy.stats.skew(centred), rel=shape, abs=shape)
        assert s.kurtosis == pytest.approx(scipy.stats.kurtosis(centred), rel=shape, abs=shape)


def assert_quantiles(s: Statistics, x: Array, *, rel: float = 0.0) -> None:
    """Quantiles as NumPy's ``inverted_cdf``, exactly or within a relative error."""
    assert s.quantiles is not None
    expected = np.quantile(x, QUANTILES, method="inverted_cdf")
    assert list(s.quantiles) == [str(q) for q in QUANTILES]
    for got, want in zip(s.quantiles.values(), expected, strict=True):
        assert got == pytest.approx(want, rel=rel, abs=0.0)
    assert s.median == s.quantiles["0.5"]


def lower_median(x: Array) -> float:
    """The element at the middle, the lower of two."""
    return float(np.sort(x)[(len(x) - 1) // 2])


def trimmed_kurtosis(x: Array) -> float:
    """Excess kurtosis without the 0.1 % of elements farthest from the median."""
    ascending = np.sort(x)
    distance = np.abs(ascending - lower_median(x))
    kept = ascending[np.argsort(distance, kind="stable")][: len(x) - len(x) // 1000]
    return float(scipy.stats.kurtosis(kept))


def farthest(x: Array, median: float, k: int = 10) -> list[int]:
    """Flat indices of the k finite elements farthest from the median; of equals the first."""
    finite = np.flatnonzero(np.isfinite(x))
    order = np.argsort(-np.abs(x[finite] - median), kind="stable")
    return [int(i) for i in finite[order][:k]]


def entropy_bits(stored: Array) -> float:
    """Shannon entropy of stored codes."""
    return float(scipy.stats.entropy(np.unique(stored, return_counts=True)[1], base=2))
