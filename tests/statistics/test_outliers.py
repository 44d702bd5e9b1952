"""Elements far from the median, and where elements that are not finite lie."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from gradscope.statistics.records import TensorProfile

from .oracle import (
    NARROW,
    NATIVE,
    PIECE,
    WIDE,
    decode,
    encode,
    farthest,
    lower_median,
    measured,
)

SCORES = (4, 6, 8, 10, 20, 50, 100)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def assert_top(found: TensorProfile, x: np.ndarray) -> None:
    """The listed elements, against a full sort of the distances from the median."""
    assert found.outliers is not None
    median = found.statistics.median
    assert median is not None
    flat = x.reshape(-1)
    expected = farthest(flat, median)
    indices = [tuple(map(int, np.unravel_index(i, x.shape))) for i in expected]
    assert [e.index for e in found.outliers.top] == indices
    assert [e.value for e in found.outliers.top] == [flat[i] for i in expected]
    scores = [abs(flat[i] - median) / found.outliers.scale for i in expected]
    assert [e.score for e in found.outliers.top] == pytest.approx(scores, rel=1e-15)


def shapes(n: int) -> tuple[int, ...]:
    return (n // 10, 2, 5)


@pytest.mark.parametrize("n", [10, 20, 5000, 40_960, PIECE + 12_344])
@pytest.mark.parametrize("dtype", [*WIDE, *NARROW])
def test_the_ten_farthest_elements_are_those_of_a_full_sort(
    tmp_path: Path, dtype: str, n: int
) -> None:
    stored = encode(dtype, rng(n).standard_t(3, n)).reshape(shapes(n))
    assert_top(measured(tmp_path, dtype, stored), decode(dtype, stored))


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_of_equal_distances_the_earlier_element_comes_first(tmp_path: Path, dtype: str) -> None:
    x = np.tile([-1.0, 0.0, 1.0], 30_000)  # median 0: every other element is as far
    found = measured(tmp_path, dtype, encode(dtype, x))
    assert_top(found, x)
    assert found.outliers is not None
    assert [e.index for e in found.outliers.top] == [
        (i,) for i in (0, 2, 3, 5, 6, 8, 9, 11, 12, 14)
    ]


def test_one_block_may_hold_all_and_ties_cross_blocks(tmp_path: Path) -> None:
    x = rng().normal(size=50_000).astype(np.float32)
    x[8192:8200] = 50
    x[[20_000, 40_000, 49_999, 4095]] = 40
    assert_top(measured(tmp_path, "F32", x), x.astype(np.float64))


@pytest.mark.parametrize("dtype", ["F32", "F64", "F16"])
def test_elements_that_are_not_finite_are_no_outliers(tmp_path: Path, dtype: str) -> None:
    x = rng().standard_t(3, 30_000)
    x[::500], x[1::700], x[2::900] = np.nan, np.inf, -np.inf
    x[4096:8192] = np.nan
    stored = encode(dtype, x)
    assert_top(measured(tmp_path, dtype, stored), decode(dtype, stored))


def test_a_complex_outlier_is_found_by_magnitude(tmp_path: Path) -> None:
    x = (rng().normal(size=9000) + 1j * rng(1).normal(size=9000)).astype(np.complex128)
    x[[17, 8000]] = 30j, -40
    found = measured(tmp_path, "C128", x).outliers
    assert found is not None
    assert [(e.index, e.value) for e in found.top[:2]] == [((8000,), 40.0), ((17,), 30.0)]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F8_E5M2", "F8_E4M3"])
def test_counts_above_each_score_are_exact_for_narrow_types(
    tmp_path: Path, dtype: str, seed: int
) -> None:
    stored = encode(dtype, rng(seed).standard_t(1.5, 30_000))
    x = decode(dtype, stored)
    x = x[np.isfinite(x)]
    found = measured(tmp_path, dtype, stored).outliers
    assert found is not None
    median = lower_median(x)
    distance = np.abs(x - median)
    scale = 1.482602218505602 * lower_median(distance)  # 1 / the normal quantile of 3/4
    assert found.scale == pytest.approx(scale, rel=1e-15)
    assert found.counts == {str(s): int((distance > s * found.scale).sum()) for s in SCORES}
    peak = distance.max() / scale / math.sqrt(2 * math.log(x.size))
    assert found.peak_ratio == pytest.approx(peak, rel=1e-12)


@pytest.mark.parametrize("dtype", WIDE)
def test_counts_above_each_score_are_close_for_wide_types(tmp_path: Path, dtype: str) -> None:
    x = encode(dtype, rng().standard_t(1.5, 200_000)).astype(np.float64)
    found = measured(tmp_path, dtype, x.astype(NATIVE[dtype])).outliers
    assert found is not None
    distance = np.abs(x - lower_median(x))
    scale = 1.482602218505602 * lower_median(distance)
    assert found.scale == pytest.approx(scale, rel=0.01)
    for score, count in found.counts.items():
        assert count == pytest.approx((distance > int(score) * scale).sum(), rel=0.03, abs=3)
    peak = distance.max() / scale / math.sqrt(2 * math.log(x.size))
    assert found.peak_ratio == pytest.approx(peak, rel=0.01)


def test_a_gaussian_has_a_peak_ratio_of_one(tmp_path: Path) -> None:
    found = measured(tmp_path, "F32", rng().normal(size=500_000).astype(np.float32)).outliers
    assert found is not None
    assert found.peak_ratio == pytest.approx(1, abs=0.15)


def test_where_most_elements_are_equal_the_scale_is_the_width_that_holds_nearly_all(
    tmp_path: Path,
) -> None:
    x = np.where(rng().random(50_000) < 0.9, 0, rng(1).normal(size=50_000))
    stored = encode("BF16", x)
    x = decode("BF16", stored)
    low, high = np.quantile(x, [0.001, 0.999], method="inverted_cdf")
    found = measured(tmp_path, "BF16", stored).outliers
    assert found is not None
    assert found.scale == pytest.approx((high - low) / (2 * 3.090232306167813), rel=1e-12)


def test_a_constant_has_no_outliers(tmp_path: Path) -> None:
    found = measured(tmp_path, "F32", np.full(5000, 0.3, np.float32)).outliers
    assert found is not None
    assert found.top == ()
    assert found.peak_ratio is None
    assert set(found.counts.values()) == {0}


# -- elements that are not finite ------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [*WIDE, "BF16", "F16", "F8_E5M2"])
def test_the_first_elements_that_are_not_finite_are_listed(tmp_path: Path, dtype: str) -> None:
    x = rng().normal(size=(30, 10_000))
    places = np.sort(rng(1).choice(x.size, 25, replace=False))
    x.reshape(-1)[places] = np.resize([np.nan, np.inf, -np.inf], 25)
    stored = encode(dtype, x.reshape(-1)).reshape(x.shape)
    found = measured(tmp_path, dtype, stored).nonfinite
    assert [e.index for e in found] == [divmod(int(i), 10_000) for i in places[:10]]
    np.testing.assert_array_equal([e.value for e in found], x.reshape(-1)[places[:10]])
    assert {e.score for e in found} == {None}


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E4M3FNUZ", "F8_E8M0"])
def test_types_without_infinities_list_their_nan(tmp_path: Path, dtype: str) -> None:
    stored = encode(dtype, np.where(np.arange(9000) % 4000 == 3, np.nan, 1.0))
    found = measured(tmp_path, dtype, stored).nonfinite
    assert [e.index for e in found] == [(3,), (4003,), (8003,)]
    assert all(math.isnan(e.value) for e in found)


def test_signalling_nans_are_listed_in_silence(tmp_path: Path) -> None:
    bits = np.ones(5000, np.float32).view(np.uint32)
    bits[[5, 4999]] = 0x7F800001, 0xFF800001
    found = measured(tmp_path, "F32", bits.view(np.float32))
    assert [e.index for e in found.nonfinite] == [(5,), (4999,)]
    wide = np.arange(5000.0).view(np.uint64)
    wide[5] = (0x7FF0 << 48) + 1
    assert measured(tmp_path, "F64", wide.view(np.float64)).statistics.nan_count == 1


def test_a_finite_tensor_lists_nothing(tmp_path: Path) -> None:
    assert measured(tmp_path, "F32", np.ones(9000, np.float32)).nonfinite == ()


# -- the ends of the range -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [*WIDE, "C64", "C128"])
def test_the_greatest_and_least_magnitudes_raise_no_warnings(tmp_path: Path, dtype: str) -> None:
    info = np.finfo(NATIVE[dtype])
    big = np.array([info.max, -info.max, 0, 1, -1] * 2000, NATIVE[dtype])
    small = (info.smallest_subnormal * np.arange(-5000, 5000)).astype(NATIVE[dtype])
    if dtype.startswith("C"):
        big, small = big + 1j * big, small + 1j * small
    for x in (big, small, big[:1], small[:1], big[:2]):
        found = measured(tmp_path, dtype, x)
        assert found.statistics.count == x.size
        for value in (found.statistics.mean, found.statistics.std, found.statistics.kurtosis):
            assert value is None or math.isfinite(value)


# -- the oracle can fail ---------------------------------------------------------------------------


def test_the_oracle_of_outliers_sees_one_changed_element(tmp_path: Path) -> None:
    x = rng().normal(size=20_000)
    found = measured(tmp_path, "F64", x)
    assert_top(found, x)
    x[12_345] = 4.7
    with pytest.raises(AssertionError):
        assert_top(found, x)


def test_the_oracle_of_outliers_sees_a_tie_the_wrong_way_round(tmp_path: Path) -> None:
    x = np.tile([-1.0, 0.0, 1.0], 3000)
    found = measured(tmp_path, "F64", x)
    assert_top(found, x)
    with pytest.raises(AssertionError):
        assert_top(found, -x)
