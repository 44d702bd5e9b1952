"""Every statistic of a tensor against NumPy, SciPy and closed forms."""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import scipy.stats

from gradscope.statistics.records import Statistics

from .oracle import (
    CODED,
    GAUSSIAN_BITS,
    INTEGERS,
    NARROW,
    NATIVE,
    PIECE,
    QUANTILES,
    TABLES,
    TORCH,
    WIDE,
    accurate_mean_std,
    assert_moments,
    assert_quantiles,
    decode,
    encode,
    entropy_bits,
    lower_median,
    measure,
    measured,
    tensor,
    trimmed_kurtosis,
)

MANY = 3 * PIECE + 12_345  # several pieces and a ragged one


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def skewed(n: int, seed: int = 0) -> np.ndarray:
    """A lopsided, heavy-tailed sample of ordinary weights."""
    return 0.02 * (rng(seed).standard_t(4, n) + 0.3 * rng(seed + 1).exponential(size=n))


# -- moments ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1000, 4097, MANY])
@pytest.mark.parametrize("dtype", [*WIDE, *NARROW])
def test_moments_are_those_of_the_float64_values(tmp_path: Path, dtype: str, n: int) -> None:
    scale = {"F8_E5M2": 50.0, "F8_E4M3": 50.0}.get(dtype, 50.0 if dtype in TABLES else 1.0)
    stored = encode(dtype, skewed(n) * scale)
    assert_moments(measured(tmp_path, dtype, stored).statistics, decode(dtype, stored))


def test_moments_of_powers_of_two(tmp_path: Path) -> None:
    stored = rng().integers(110, 135, 5000).astype(np.uint8)
    s = measured(tmp_path, "F8_E8M0", stored).statistics
    assert_moments(s, decode("F8_E8M0", stored))


@pytest.mark.parametrize("dtype", INTEGERS)
def test_moments_of_integers(tmp_path: Path, dtype: str) -> None:
    limits = np.iinfo(NATIVE[dtype])
    stored = rng().integers(limits.min // 2, limits.max // 2, PIECE + 77, NATIVE[dtype])
    s = measured(tmp_path, dtype, stored).statistics
    assert_moments(s, stored.astype(np.longdouble))
    assert (s.min, s.max) == (int(stored.min()), int(stored.max()))
    assert isinstance(s.min, int)
    assert isinstance(s.max, int)


@pytest.mark.parametrize("dtype", ["C64", "C128"])
def test_complex_elements_count_by_their_magnitude(tmp_path: Path, dtype: str) -> None:
    stored = (rng().normal(size=MANY) + 1j * rng(1).normal(size=MANY)).astype(NATIVE[dtype])
    s = measured(tmp_path, dtype, stored).statistics
    # The magnitude is rounded to the type of the parts, which NumPy may do in another last bit.
    x = np.abs(stored.astype(np.complex128)).astype(stored.real.dtype).astype(np.float64)
    assert_moments(s, x)
    assert_quantiles(s, x, rel=0.01)
    assert s.max == pytest.approx(x.max(), rel=1e-15)


@pytest.mark.parametrize(
    ("dtype", "n"), [("F32", 4096), ("F32", MANY), ("F64", MANY), ("F16", MANY), ("BF16", MANY)]
)
def test_norm_gains_near_one_lose_nothing_to_cancellation(
    tmp_path: Path, dtype: str, n: int
) -> None:
    stored = encode(dtype, 1 + 1e-3 * rng().standard_normal(n))
    assert_moments(measured(tmp_path, dtype, stored).statistics, decode(dtype, stored))


@pytest.mark.parametrize(
    ("dtype", "scale"),
    [("F32", 1e30), ("F32", 1e-30), ("BF16", 1e30), ("BF16", 1e-30), ("F64", 1e60), ("F64", 1e-60)],
)
def test_huge_and_tiny_scales(tmp_path: Path, dtype: str, scale: float) -> None:
    stored = encode(dtype, scale * rng().standard_t(5, PIECE + 99))
    s = measured(tmp_path, dtype, stored).statistics
    assert s.kurtosis is not None
    assert_moments(s, decode(dtype, stored))


@pytest.mark.parametrize("scale", [1e150, 1e-150, 1e100, 1e-100])
@pytest.mark.parametrize("n", [5000, MANY])
def test_float64_whose_fourth_powers_leave_the_range(tmp_path: Path, scale: float, n: int) -> None:
    x = scale * rng().standard_t(9, n)
    s = measured(tmp_path, "F64", x).statistics
    # skewness and kurtosis come from the buckets of the distribution then
    assert_moments(s, x, shape=0.01)
    assert s.kurtosis is not None
    assert s.trimmed_kurtosis == pytest.approx(trimmed_kurtosis(x / scale), abs=0.02)


def test_float64_whose_squares_leave_the_range_has_a_deviation(tmp_path: Path) -> None:
    x = np.append(1e200 * rng().normal(size=2 * PIECE), [1.7e308, -1.7e308])
    s = measured(tmp_path, "F64", x).statistics
    assert (s.min, s.max) == (x.min(), x.max())
    unit = np.ldexp(x, -1023)
    assert s.std == pytest.approx(np.ldexp(accurate_mean_std(unit)[1], 1023), rel=1e-9)
    assert_quantiles(s, x, rel=0.01)


def test_the_mean_of_values_that_nearly_cancel(tmp_path: Path) -> None:
    x = rng().normal(size=MANY).astype(np.float32)
    x[: MANY // 2] += 1000
    x[MANY // 2 : MANY // 2 * 2] -= 1000
    s = measured(tmp_path, "F32", x).statistics
    assert s.mean == pytest.approx(math.fsum(x.tolist()) / MANY, rel=1e-9, abs=1e-12)


# -- quantiles and what rests on them --------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 3, 10, 1000, 1001, 20_000])
@pytest.mark.parametrize("dtype", NARROW)
def test_quantiles_of_narrow_types_are_exact(tmp_path: Path, dtype: str, n: int) -> None:
    stored = encode(dtype, rng(n).normal(size=n))
    s = measured(tmp_path, dtype, stored).statistics
    x = decode(dtype, stored)
    assert_quantiles(s, x)
    assert s.mad == lower_median(np.abs(x - lower_median(x)))


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1.0, 1e30])
@pytest.mark.parametrize("dtype", WIDE)
def test_quantiles_of_wide_types_are_within_one_percent(
    tmp_path: Path, dtype: str, scale: float
) -> None:
    stored = encode(dtype, scale * skewed(MANY))
    s = measured(tmp_path, dtype, stored).statistics
    x = decode(dtype, stored)
    assert_quantiles(s, x, rel=0.01)
    assert s.mad == pytest.approx(lower_median(np.abs(x - lower_median(x))), rel=0.01)


def test_a_mad_of_float32_norm_gains_is_not_lost_between_buckets(tmp_path: Path) -> None:
    x = (1 + 1e-3 * rng().standard_normal(4096)).astype(np.float32)
    found = measured(tmp_path, "F32", x)
    values = x.astype(np.float64)
    expected = lower_median(np.abs(values - lower_median(values)))
    assert found.statistics.mad == pytest.approx(expected, rel=0.01)
    assert found.statistics.trimmed_kurtosis == pytest.approx(trimmed_kurtosis(values), abs=0.05)
    assert found.outliers is not None
    assert found.outliers.scale == pytest.approx(1e-3, rel=0.1)


@pytest.mark.parametrize("n", [4, 999, 1000, 5000, PIECE + 1])
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F8_E4M3", "F4"])
def test_trimmed_kurtosis_leaves_out_one_in_a_thousand(tmp_path: Path, dtype: str, n: int) -> None:
    stored = encode(dtype, rng(7).standard_t(2.5, n))
    s = measured(tmp_path, dtype, stored).statistics
    assert s.trimmed_kurtosis == pytest.approx(trimmed_kurtosis(decode(dtype, stored)), rel=1e-9)


@pytest.mark.parametrize("dtype", WIDE)
def test_trimmed_kurtosis_of_wide_types_is_close(tmp_path: Path, dtype: str) -> None:
    x = encode(dtype, rng(7).standard_t(2.5, 100_000))
    s = measured(tmp_path, dtype, x).statistics
    assert s.kurtosis is not None
    assert s.trimmed_kurtosis is not None
    assert s.trimmed_kurtosis == pytest.approx(trimmed_kurtosis(x.astype(np.float64)), rel=0.01)
    assert s.trimmed_kurtosis < s.kurtosis / 5  # the tail is gone


# -- entropy ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [*CODED, "U8", "I8", "U16", "I16", "BOOL"])
def test_entropy_is_that_of_the_stored_codes(tmp_path: Path, dtype: str) -> None:
    bits = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}.get(dtype, 8)
    codes = rng().binomial((1 << bits) - 1, 0.4, 20_000)
    wide = dtype in ("BF16", "F16", "U16", "I16")
    stored = codes.astype(np.uint16) * 257 if wide else codes.astype(np.uint8)
    s = measured(tmp_path, dtype, stored).statistics
    assert s.entropy_bits == pytest.approx(entropy_bits(stored), rel=1e-12)


@pytest.mark.parametrize("dtype", [*WIDE, "C64", "I32", "U64"])
def test_types_with_too_many_codes_have_no_entropy(tmp_path: Path, dtype: str) -> None:
    stored = rng().integers(0, 100, 5000).astype(NATIVE[dtype])
    assert measured(tmp_path, dtype, stored).statistics.entropy_bits is None


def test_one_code_has_no_entropy_and_two_in_turn_have_a_bit(tmp_path: Path) -> None:
    one, two = np.zeros(64, np.uint8), np.arange(64, dtype=np.uint8) % 2
    assert measured(tmp_path, "F8_E4M3", one).statistics.entropy_bits == 0.0
    assert measured(tmp_path, "F8_E4M3", two).statistics.entropy_bits == 1.0


@pytest.mark.parametrize("dtype", ["F64", "F32", "BF16", "F16"])
@pytest.mark.parametrize(
    ("law", "bits"),
    [
        (scipy.stats.norm, 0.0),
        (scipy.stats.laplace, 0.1044),
        (scipy.stats.uniform(-1, 2), 0.2546),
        (scipy.stats.t(3), None),
    ],
)
@pytest.mark.parametrize("scale", [0.02, 3.0])
def test_negentropy_of_known_distributions(
    tmp_path: Path,
    dtype: str,
    law: scipy.stats.rv_continuous,
    bits: float | None,
    scale: float,
) -> None:
    x = law.rvs(size=400_000, random_state=rng(3))
    if bits is None:  # of infinite fourth moment: its variance is the sample's
        bits = GAUSSIAN_BITS + math.log2(x.std()) - law.entropy() / math.log(2)
    else:
        closed = GAUSSIAN_BITS + math.log2(law.std()) - law.entropy() / math.log(2)
        assert closed == pytest.approx(bits, abs=1e-3)
    s = measured(tmp_path, dtype, encode(dtype, scale * x)).statistics
    assert s.negentropy_bits == pytest.approx(bits, abs=0.015)


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_quantised_and_sparse_weights_are_far_from_gaussian(tmp_path: Path, dtype: str) -> None:
    x = rng().normal(size=100_000)
    four_bit = encode(dtype, np.round(x * 2) / 2)
    sparse = encode(dtype, np.where(rng(1).random(x.size) < 0.9, 0, x))
    for stored in (four_bit, sparse):
        s = measured(tmp_path, dtype, stored).statistics
        assert s.negentropy_bits is not None
        assert s.negentropy_bits > 3


def test_negentropy_of_few_elements_is_undefined(tmp_path: Path) -> None:
    x = rng().normal(size=1000).astype(np.float32)
    assert measured(tmp_path, "F32", x).statistics.negentropy_bits is not None
    assert measured(tmp_path, "F32", x[:999]).statistics.negentropy_bits is None


# -- counts and extremes ---------------------------------------------------------------------------


def special_codes(dtype: str) -> np.ndarray:
    """Zeros, subnormals, infinities and NaNs of a type, where it has them, among random codes."""
    if dtype in WIDE:
        unsigned = f"u{np.dtype(NATIVE[dtype]).itemsize}"
        x = rng().normal(size=PIECE + 5000).astype(NATIVE[dtype])
        tiny = np.finfo(x.dtype).smallest_subnormal
        x[::7], x[1::11], x[2::13], x[3::17] = 0, -0.0, tiny, -5 * tiny
        x[4::1009], x[5::2003], x[6::3001] = np.nan, np.inf, -np.inf
        bits = x.view(unsigned)
        bits[9000] = np.array(np.inf, x.dtype).view(unsigned) + 1  # signalling
        bits[9001] = ~np.zeros(1, unsigned)[0]
        return x
    codes = {"F4": 16, "F6_E2M3": 64, "F6_E3M2": 64, "BF16": 65536, "F16": 65536}.get(dtype, 256)
    stored = np.uint16 if codes == 65536 else np.uint8
    return rng().integers(0, codes, 2 * PIECE + 4321).astype(stored)


def smallest_normal(dtype: str) -> float:
    if dtype == "F8_E8M0":
        return 0.0
    if dtype in WIDE:
        return float(np.finfo(NATIVE[dtype]).smallest_normal)
    if dtype in TABLES:
        return {"F4": 1.0, "F6_E2M3": 1.0, "F6_E3M2": 0.25}[dtype]
    import torch

    return float(torch.finfo(TORCH[dtype]).smallest_normal)


@pytest.mark.parametrize("dtype", [*WIDE, *CODED])
def test_special_values_are_counted_one_by_one(tmp_path: Path, dtype: str) -> None:
    stored = special_codes(dtype)
    x = decode(dtype, stored)
    s = measured(tmp_path, dtype, stored).statistics
    normal = smallest_normal(dtype)
    assert s.count == x.size
    assert s.nan_count == np.isnan(x).sum()
    assert s.posinf_count == (x == np.inf).sum()
    assert s.neginf_count == (x == -np.inf).sum()
    assert s.zero_count == (x == 0).sum()
    assert s.zero_fraction == s.zero_count / s.count
    assert s.subnormal_count == ((x != 0) & (np.abs(x) < normal)).sum()
    assert s.finite_count == np.isfinite(x).sum()


@pytest.mark.parametrize("dtype", [*WIDE, *CODED])
def test_extremes_are_exact(tmp_path: Path, dtype: str) -> None:
    stored = special_codes(dtype)
    x = decode(dtype, stored)
    x = x[np.isfinite(x)]
    s = measured(tmp_path, dtype, stored).statistics
    assert (s.min, s.max, s.abs_max) == (x.min(), x.max(), np.abs(x).max())


@pytest.mark.parametrize("dtype", [*WIDE, "F16", "F8_E5M2", "F8_E4M3"])
def test_what_is_finite_is_described_as_if_the_rest_were_not_there(
    tmp_path: Path, dtype: str
) -> None:
    x = encode(dtype, skewed(PIECE + 3000) * 20)
    holes = rng(5).random(x.size) < 0.01
    holes[20_000:30_000] = True  # whole blocks
    kept = x[~holes]
    stored = x.copy()
    for i, hole in enumerate([np.nan] if dtype == "F8_E4M3" else [np.nan, np.inf, -np.inf]):
        stored[np.flatnonzero(holes)[i::3]] = encode(dtype, np.array([hole]))[0]
    stored[holes & np.isfinite(decode(dtype, stored))] = encode(dtype, np.array([np.nan]))[0]
    s = measured(tmp_path, dtype, stored).statistics
    clean = measured(tmp_path, dtype, kept).statistics
    assert s.finite_count == clean.count
    assert_moments(s, decode(dtype, kept))
    for name in ("min", "max", "median", "mad", "quantiles", "trimmed_kurtosis"):
        assert getattr(s, name) == pytest.approx(getattr(clean, name), rel=1e-12), name


# -- what is undefined is None ---------------------------------------------------------------------

SHAPED = ("skewness", "kurtosis", "trimmed_kurtosis", "trimmed_skewness", "negentropy_bits")
LOCATED = ("min", "max", "abs_max", "mean", "std", "rms", "l2_norm", "median", "mad", "quantiles")


def undefined(s: Statistics) -> set[str]:
    return {name for name, value in asdict(s).items() if value is None}


@pytest.mark.parametrize("n", [1, 1000, 4095, PIECE + 11])
@pytest.mark.parametrize("value", [0.1, 1.0, 0.0, -3e-5])
@pytest.mark.parametrize("dtype", [*WIDE, "BF16", "F16", "C64", "C128"])
def test_a_constant_has_no_shape_and_no_spread(
    tmp_path: Path, dtype: str, value: float, n: int
) -> None:
    stored = encode(dtype, np.full(n, value))
    s = measured(tmp_path, dtype, stored).statistics
    assert undefined(s) - {"entropy_bits"} == set(SHAPED)
    assert s.std == 0.0
    assert s.mad == 0.0
    assert s.mean == s.median == s.min == s.max == decode(dtype, stored)[0]


def test_constants_pass_for_integers_too(tmp_path: Path) -> None:
    for dtype in INTEGERS:
        stored = np.full(4099, 101, NATIVE[dtype])
        s = measured(tmp_path, dtype, stored).statistics
        assert (s.mean, s.std, s.min, s.max) == (101, 0, 101, 101)
    large = np.full(4099, (1 << 63) - 3, np.int64)
    s = measured(tmp_path, "I64", large).statistics
    assert (s.std, s.min, s.max) == (0.0, (1 << 63) - 3, (1 << 63) - 3)


@pytest.mark.parametrize("dtype", [*WIDE, *CODED, "C64", "U8", "I64"])
def test_an_empty_tensor_has_counts_of_zero_and_nothing_else(tmp_path: Path, dtype: str) -> None:
    found = measured(tmp_path, dtype, np.empty(0, np.uint8), (0, 3))
    assert found.statistics == Statistics()
    assert undefined(found.statistics) >= {*SHAPED, *LOCATED, "zero_fraction", "entropy_bits"}
    assert (found.units, found.outliers, found.nonfinite) == (None, None, ())


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F8_E4M3"])
def test_two_elements_have_no_skewness_and_three_no_kurtosis(tmp_path: Path, dtype: str) -> None:
    stored = encode(dtype, np.array([1.0, 2.0, 4.0, 3.0]))
    two, three, four = (measured(tmp_path, dtype, stored[:n]).statistics for n in (2, 3, 4))
    assert (two.skewness, two.kurtosis) == (None, None)
    assert three.skewness == pytest.approx(scipy.stats.skew([1, 2, 4]))
    assert three.kurtosis is None
    assert four.kurtosis == pytest.approx(scipy.stats.kurtosis([1, 2, 4, 3]))


@pytest.mark.parametrize("dtype", [*WIDE, "BF16", "F16", "F8_E4M3", "F8_E8M0", "C64"])
def test_a_tensor_of_nan_has_no_statistics(tmp_path: Path, dtype: str) -> None:
    stored = encode(dtype, np.full(5000, np.nan))
    found = measured(tmp_path, dtype, stored, (50, 100))
    assert found.statistics.nan_count == 5000
    assert undefined(found.statistics) - {"entropy_bits"} == {*SHAPED, *LOCATED}
    assert found.outliers is None
    assert found.numerics is not None
    assert (found.numerics.headroom_bits, found.numerics.payload) == (None, None)
    assert [e.index for e in found.nonfinite] == [(0, i) for i in range(10)]


@pytest.mark.parametrize("dtype", [*INTEGERS, "BOOL"])
def test_integers_have_no_shape_quantiles_outliers_or_units(tmp_path: Path, dtype: str) -> None:
    found = measured(tmp_path, dtype, np.arange(6).astype(NATIVE[dtype]), (2, 3))
    assert undefined(found.statistics) >= {*SHAPED, "median", "mad", "quantiles"}
    assert (found.units, found.outliers, found.numerics) == (None, None, None)


# -- how values sit in their type ------------------------------------------------------------------


@pytest.mark.parametrize("narrow", ["BF16", "F16"])
@pytest.mark.parametrize("scale", [1e-5, 0.02, 10.0])
def test_float32_that_holds_a_narrower_type_says_so(
    tmp_path: Path, narrow: str, scale: float
) -> None:
    x = decode(narrow, encode(narrow, scale * rng().normal(size=20_000))).astype(np.float32)
    x[[3, 500]] = np.nan, np.inf
    found = measured(tmp_path, "F32", x).numerics
    assert found is not None
    assert found.payload == narrow


@pytest.mark.parametrize(
    "outside", [np.float32(65536 * 2), np.float32(2.0**-25), np.float32(1.75 * 2.0**-24)]
)
def test_float32_of_short_mantissas_outside_the_range_of_float16_is_not_float16(
    tmp_path: Path, outside: np.float32
) -> None:
    x = np.array([1 + 2.0**-10, 0.5, outside], np.float32)
    found = measured(tmp_path, "F32", x).numerics
    assert found is not None
    assert found.payload is None


def test_one_full_mantissa_makes_a_payload_of_float32(tmp_path: Path) -> None:
    x = np.ones(PIECE + 100, np.float32)
    assert measured(tmp_path, "F32", x).numerics.payload == "BF16"
    x[PIECE + 50] = np.nextafter(np.float32(1), np.float32(2))
    assert measured(tmp_path, "F32", x).numerics.payload is None


def test_quantiles_of_bfloat16_in_float32_are_exact(tmp_path: Path) -> None:
    x = decode("BF16", encode("BF16", skewed(20_000))).astype(np.float32)
    s = measured(tmp_path, "F32", x).statistics
    assert_quantiles(s, x.astype(np.float64))
    assert s.mad == lower_median(np.abs(x - lower_median(x)).astype(np.float64))


def test_only_float32_has_a_payload(tmp_path: Path) -> None:
    for dtype in ("F64", "BF16", "F16", "C64"):
        stored = encode(dtype, np.array([1.0, 2.0, 0.5]))
        assert measured(tmp_path, dtype, stored).numerics.payload is None


@pytest.mark.parametrize("dtype", [*WIDE, *CODED])
def test_headroom_counts_doublings_up_to_the_greatest_value(tmp_path: Path, dtype: str) -> None:
    stored = encode(dtype, np.array([1.0, -2.0, 0.5]) if dtype != "F8_E8M0" else np.ones(3))
    every = decode(dtype, special_codes(dtype))
    greatest = (
        float(np.finfo(NATIVE[dtype]).max) if dtype in WIDE else every[np.isfinite(every)].max()
    )
    peak = np.abs(decode(dtype, stored)).max()
    found = measured(tmp_path, dtype, stored).numerics
    assert found.headroom_bits == pytest.approx(math.log2(greatest) - math.log2(peak), rel=1e-12)


@pytest.mark.parametrize("dtype", CODED)
def test_saturation_and_distinct_codes(tmp_path: Path, dtype: str) -> None:
    stored = special_codes(dtype)[:3000]
    x = decode(dtype, stored)
    every = decode(dtype, special_codes(dtype))
    greatest = every[np.isfinite(every)].max()
    found = measured(tmp_path, dtype, stored).numerics
    assert found.saturated_fraction == (np.abs(x) == greatest).mean()
    assert found.distinct == len(np.unique(stored))


def test_wide_types_have_neither_saturation_nor_distinct_codes(tmp_path: Path) -> None:
    for dtype in WIDE:
        found = measured(tmp_path, dtype, np.ones(9, NATIVE[dtype])).numerics
        assert (found.saturated_fraction, found.distinct) == (None, None)


# -- the oracles can fail --------------------------------------------------------------------------


def test_the_oracle_of_moments_sees_one_changed_element(tmp_path: Path) -> None:
    x = skewed(MANY)
    s = measured(tmp_path, "F64", x).statistics
    assert_moments(s, x)
    x[MANY // 2] += 0.01
    with pytest.raises(AssertionError):
        assert_moments(s, x)


@pytest.mark.parametrize("name", ["mean", "std", "rms", "l2_norm", "skewness", "kurtosis"])
def test_the_oracle_of_moments_sees_every_moment(tmp_path: Path, name: str) -> None:
    x = skewed(5000)
    s = measured(tmp_path, "F64", x).statistics
    wrong = replace(s, **{name: getattr(s, name) * (1 + 1e-6)})
    with pytest.raises(AssertionError):
        assert_moments(wrong, x)


def test_the_oracle_of_quantiles_sees_one_changed_element(tmp_path: Path) -> None:
    stored = encode("BF16", rng().normal(size=1001))
    s = measured(tmp_path, "BF16", stored).statistics
    x = decode("BF16", stored)
    assert_quantiles(s, x)
    x[np.flatnonzero(x == s.median)] = np.nextafter(s.median, 9)
    with pytest.raises(AssertionError):
        assert_quantiles(s, x)


def test_a_sum_of_raw_powers_would_fail_on_norm_gains(tmp_path: Path) -> None:
    """The textbook one-pass formula in float32 misses by far what the tests above demand."""
    x = (1 + 1e-3 * rng().standard_normal(MANY)).astype(np.float32)
    naive = math.sqrt(max(0.0, float(np.mean(x * x) - np.mean(x) ** 2)))
    s = measure(tensor(tmp_path, "F32", x)).statistics
    with pytest.raises(AssertionError):
        assert_moments(replace(s, std=naive), x.astype(np.float64))
    assert s.std == pytest.approx(accurate_mean_std(x)[1], rel=1e-12)
    assert len(QUANTILES) == len(s.quantiles or ())
