"""Values whose squares float64 does not have, and subnormals: measured as any others.

The oracle scales by a power of two, which is exact, and measures in extended precision.
"""

from __future__ import annotations

import math
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import scipy.stats

from gradscope.checkpoints.tiles import Tile
from gradscope.statistics import Pool, extremes, profile, threads
from gradscope.statistics.description import finish
from gradscope.statistics.layout import UnitLayout
from gradscope.statistics.records import Statistics
from gradscope.statistics.scan import scan
from gradscope.statistics.tally import tally
from gradscope.statistics.torch_scan import TorchScan

from .oracle import PIECE, Array, accurate_mean_std, assert_quantiles, lower_median, tensor

SCANS = pytest.mark.parametrize("by", [scan, TorchScan("cpu")], ids=["kernels", "torch"])


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def exact_l2(x: Array) -> float:
    """By fractions: no rounding but the root's."""
    squares = sum(Fraction(float(v)) ** 2 for v in x.ravel())
    shift = (squares.numerator.bit_length() - squares.denominator.bit_length()) // 2
    return math.ldexp(math.sqrt(squares * Fraction(4) ** -shift), shift)


def assert_described(s: Statistics, x: Array) -> None:
    """Everything that rests on powers, against values scaled to about 1."""
    _, exponent = np.frexp(np.abs(x).max())
    unit = np.ldexp(x, -exponent)
    mean, std = accurate_mean_std(unit)
    assert s.mean is not None
    assert s.std is not None
    assert s.rms is not None
    back = float(2.0 ** -int(exponent // 2)), float(2.0 ** -int(exponent - exponent // 2))
    assert s.mean * back[0] * back[1] == pytest.approx(mean, rel=1e-9, abs=1e-12 * std)
    assert s.std * back[0] * back[1] == pytest.approx(std, rel=1e-9)
    assert s.rms * back[0] * back[1] == pytest.approx(math.hypot(mean, std), rel=1e-9)
    assert s.l2_norm == pytest.approx(exact_l2(x), rel=1e-9, abs=0)
    assert s.skewness == pytest.approx(scipy.stats.skew(unit.astype(float)), rel=1e-6, abs=1e-6)
    assert s.kurtosis == pytest.approx(scipy.stats.kurtosis(unit), rel=1e-6, abs=1e-6)


@SCANS
@pytest.mark.parametrize(
    "scale", [1e-300, 1e-200, 1e-170, 1e-154, 1e-140, 1e-100, 1e-80, 1, 1e76, 1e100, 1e160, 1e300]
)
def test_float64_of_any_size_is_described(scale: float, by: object, tmp_path: Path) -> None:
    x = (rng().normal(0.3, 1, size=(40, 75)) ** 3) * scale
    found = profile([tensor(tmp_path, "F64", x)], scan=by).tensors[0]
    assert_described(found.statistics, x.ravel())
    s = found.statistics
    assert s.median == pytest.approx(lower_median(x.ravel()), rel=0.01, abs=0)
    assert_quantiles(s, x.ravel(), rel=0.01)
    assert s.negentropy_bits is not None
    ordinary = profile([tensor(tmp_path, "F64", x / scale)]).tensors[0].statistics
    assert s.negentropy_bits == pytest.approx(ordinary.negentropy_bits, abs=0.02)
    assert s.trimmed_kurtosis == pytest.approx(ordinary.trimmed_kurtosis, rel=0.05)


@SCANS
@pytest.mark.parametrize("scale", [1e-320, 1e-310, 1e-200, 1e-170, 1e-160, 1e140, 1e160, 1e290])
@pytest.mark.parametrize("columns", [False, True])
def test_units_of_any_size_have_norms(
    scale: float, columns: bool, by: object, tmp_path: Path
) -> None:
    x = rng().uniform(0.5, 1, size=(30, 40)) * scale
    x[7] *= 1e-4
    stored = np.ascontiguousarray(x.T) if columns else x
    layout = UnitLayout.along(stored.shape, int(columns))
    ref = tensor(tmp_path, "F64", stored)
    found = profile([ref], scan=by, layout=lambda _: layout).tensors[0].units
    assert found is not None
    norms = np.array([exact_l2(row) for row in x])
    assert found.dead == (7,)
    assert found.norm_median == pytest.approx(np.median(norms), rel=1e-12, abs=0)
    assert found.norm_max == pytest.approx(norms.max(), rel=1e-12, abs=0)
    assert found.norm_min == pytest.approx(norms.min(), rel=1e-12, abs=0)


def test_each_unit_is_measured_in_a_window_of_its_own(tmp_path: Path) -> None:
    sizes = np.array([1e-310, 1e-250, 1e-160, 1e-130, 1e-10, 1.0, 1e100, 1e154, 1e200, 1e300])
    x = rng().uniform(0.5, 1, size=(10, 40)) * sizes[:, None]
    whole = tally(Tile(ref := tensor(tmp_path, "F64", x), 0, ref.numel), scan)
    norms = extremes.unit_norms(whole)
    assert norms is not None
    for row, norm in zip(x, norms, strict=True):
        assert norm == pytest.approx(exact_l2(row), rel=1e-12, abs=0)


def test_complex_values_of_any_size_are_described(tmp_path: Path) -> None:
    x = (rng().normal(size=(30, 40)) + 1j * rng(1).normal(size=(30, 40))) * 1e-170
    found = profile([tensor(tmp_path, "C128", x)]).tensors[0]
    assert_described(found.statistics, np.abs(x).ravel())
    assert found.units is not None
    assert found.units.norm_max == pytest.approx(
        1e-170 * np.linalg.norm(x * 1e170, axis=1).max(), rel=1e-12, abs=0
    )


def test_a_constant_of_any_size_has_no_spread(tmp_path: Path) -> None:
    for value in (1e-300, 1e300, 1e-320):
        s = profile([tensor(tmp_path, "F64", np.full((5, 8), value))]).tensors[0].statistics
        assert (s.mean, s.std, s.kurtosis) == (value, 0.0, None)
        assert s.l2_norm == pytest.approx(value * math.sqrt(40), rel=1e-9, abs=0)


def test_a_norm_beyond_float64_is_undefined(tmp_path: Path) -> None:
    x = np.full(100, 1.7e308)
    x[::2] *= -1
    s = profile([tensor(tmp_path, "F64", x)]).tensors[0].statistics
    assert (s.mean, s.l2_norm) == (0.0, None)
    assert s.std == pytest.approx(1.7e308)


@pytest.mark.parametrize("scale", [1e-170, 1e160])
def test_tiles_and_threads_do_not_change_a_bit(scale: float, tmp_path: Path) -> None:
    ref = tensor(tmp_path, "F64", rng().normal(size=(3, PIECE + 77)) * scale)
    once = profile([ref], engine=threads(1))
    tiled = profile([ref], engine=threads(2), tile_elements=PIECE)
    assert repr(once.tensors) == repr(tiled.tensors)
    x = np.fromfile(ref.file)
    assert once.tensors[0].statistics.std == pytest.approx(
        (x / scale).std() * scale, rel=1e-9, abs=0
    )


# -- pools -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "scales",
    [(1e-170,), (1e160,), (1e-170, 2e-170), (1.0, 1e-170), (1.0, 1e160), (1e-170, 1e160), (1e100,)],
    ids=str,
)
def test_pools_of_any_size_are_described(scales: tuple[float, ...], tmp_path: Path) -> None:
    parts = [rng(i).normal(0.5, 1, size=500) * scale for i, scale in enumerate(scales)]
    pool = Pool()
    for part in parts:
        ref = tensor(tmp_path, "F64", part)
        pool.add(finish(tally(Tile(ref, 0, ref.numel), scan)))
    s, x = pool.statistics(), np.concatenate(parts)
    scale = max(scales)
    mean, std = accurate_mean_std(x / scale)
    assert s.mean == pytest.approx(mean * scale, rel=1e-9, abs=0)
    assert s.std == pytest.approx(std * scale, rel=1e-9, abs=0)
    assert s.l2_norm == pytest.approx(np.linalg.norm(x / scale) * scale, rel=1e-9, abs=0)
    assert s.kurtosis == pytest.approx(scipy.stats.kurtosis(x / scale), rel=1e-6)
    assert_quantiles(s, x, rel=0.01)


def test_constants_that_lie_far_apart_are_pooled(tmp_path: Path) -> None:
    pool = Pool()
    for value in (1e160, -1e160):
        ref = tensor(tmp_path, "F64", np.full(10, value))
        pool.add(finish(tally(Tile(ref, 0, 10), scan)))
    assert pool.statistics().std == pytest.approx(1e160)


# -- subnormals ------------------------------------------------------------------------------------

LEAST = {"F32": np.float32(2.0**-149), "F64": 5e-324}


def subnormals(dtype: str, n: int, seed: int = 0) -> Array:
    """Subnormals of either sign whose magnitudes are spread over all their exponents."""
    bits = 23 if dtype == "F32" else 52
    steps = np.floor(2.0 ** rng(seed).uniform(0, bits, n)) * rng(seed + 1).choice([-1, 1], n)
    return (steps * float(LEAST[dtype])).astype(np.float32 if dtype == "F32" else np.float64)


def assert_ranked(s: Statistics, x: Array, step: float) -> None:
    """Quantiles, median and MAD within 1 % or the step that subnormals have."""
    wide = x.ravel().astype(np.float64)
    expected = np.quantile(wide, [float(q) for q in s.quantiles or ()], method="inverted_cdf")
    for got, want in zip((s.quantiles or {}).values(), expected, strict=True):
        assert abs(got - want) <= 0.01 * abs(want) + step / 2
    assert s.mad is not None
    mad = lower_median(np.abs(wide - lower_median(wide)))
    assert abs(s.mad - mad) <= 0.01 * mad + step


@SCANS
@pytest.mark.parametrize("n", [1000, PIECE + 999])
@pytest.mark.parametrize("dtype", ["F32", "F64"])
def test_quantiles_of_subnormals_are_not_zero(
    dtype: str, n: int, by: object, tmp_path: Path
) -> None:
    x = subnormals(dtype, n)
    s = profile([tensor(tmp_path, dtype, x)], scan=by).tensors[0].statistics
    assert_ranked(s, x, float(LEAST[dtype]) if dtype == "F64" else 0.0)
    assert s.mad


@pytest.mark.parametrize("dtype", ["F32", "F64"])
@pytest.mark.parametrize("zeros", [0.0, 0.1, 0.6, 0.99])
def test_subnormals_among_zeros_and_normal_values_keep_their_ranks(
    zeros: float, dtype: str, tmp_path: Path
) -> None:
    x = subnormals(dtype, PIECE + 5)
    x[: len(x) // 3] = rng().normal(size=len(x) // 3)
    x[rng(3).random(len(x)) < zeros] = 0
    x = rng(4).permutation(x)
    s = profile([tensor(tmp_path, dtype, x)]).tensors[0].statistics
    assert_ranked(s, x, float(LEAST[dtype]) if dtype == "F64" else 0.0)
    assert s.zero_count == np.count_nonzero(x == 0)


@pytest.mark.parametrize("dtype", ["F32", "F64"])
def test_a_tensor_is_not_read_again_for_a_few_subnormals(
    dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half zeros, a few subnormals: whatever their signs, every quantile is a zero or normal."""
    x = rng().normal(size=PIECE + 5).astype(np.float32 if dtype == "F32" else np.float64)
    x[: len(x) * 2 // 3] = 0
    x[-50:] = subnormals(dtype, 50)
    monkeypatch.setattr(extremes, "with_subnormals", None)
    s = profile([tensor(tmp_path, dtype, x)]).tensors[0].statistics
    assert (s.median, s.mad) == (0.0, 0.0)


def test_the_oracle_sees_a_lost_square() -> None:
    x = rng().normal(size=50) * 1e-170
    with np.errstate(under="ignore"):
        assert float(np.linalg.norm(x)) != pytest.approx(exact_l2(x), rel=1e-3, abs=0)
