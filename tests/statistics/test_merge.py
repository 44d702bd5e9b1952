"""Results do not depend on how the work was cut, in what order it was done or by how many."""

from __future__ import annotations

import dataclasses
import math
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradscope.checkpoints.tensors import TensorRef
from gradscope.checkpoints.tiles import tiles
from gradscope.statistics import Pool, profile, threads
from gradscope.statistics.description import Finished, finish
from gradscope.statistics.moments import Moments
from gradscope.statistics.records import Statistics, TensorProfile
from gradscope.statistics.scan import scan
from gradscope.statistics.tally import merged, tally

from .oracle import (
    BITS,
    NATIVE,
    PIECE,
    WIDE,
    assert_moments,
    decode,
    encode,
    lower_median,
    tensor,
    trimmed_kurtosis,
)

FEW = settings(max_examples=25, deadline=None)
DTYPES = (*WIDE, "BF16", "F16", "F8_E4M3", "F6_E3M2", "F4", "C64", "C128", "I8", "I64", "U16")


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def exact(value: object) -> object:
    """A value that equals another only if every float in it has the same bits."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = dataclasses.fields(value)
        return (type(value), *(exact(getattr(value, f.name)) for f in fields))
    if isinstance(value, dict):
        return tuple((k, exact(v)) for k, v in value.items())
    if isinstance(value, tuple):
        return tuple(map(exact, value))
    return ("float", struct.pack("<d", value)) if isinstance(value, float) else value


def stored_like(dtype: str, n: int, seed: int = 0) -> np.ndarray:
    x = 3 * rng(seed).standard_t(3, n)
    if dtype.startswith("C"):
        return (x + 1j * rng(seed + 1).normal(size=n)).astype(NATIVE[dtype])
    if dtype in ("I8", "I64", "U16"):
        return np.clip(np.abs(x) if dtype[0] == "U" else x, -128, 127).astype(NATIVE[dtype])
    stored = encode(dtype, x)
    if dtype not in BITS:  # a few that are not finite
        stored[rng(seed + 2).random(n) < 1e-4] = encode(dtype, np.array([np.nan]))[0]
    return stored


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("merge")


@pytest.fixture(scope="module")
def large(folder: Path) -> dict[str, TensorRef]:
    """A tensor of five pieces of each type, whose rows pieces share."""
    shape = (401, 11_200)
    return {
        dtype: tensor(folder, dtype, stored_like(dtype, math.prod(shape)).reshape(shape))
        for dtype in DTYPES
    }


@pytest.fixture(scope="module")
def small(folder: Path) -> list[TensorRef]:
    """Tensors of many types and sizes, none and one element among them."""
    sizes = [0, 1, 5, 4096, 9000, 70_000, 17, 0, PIECE, PIECE + 1, 3, 100, 12_345]
    return [
        tensor(folder, dtype, stored_like(dtype, n, seed=n))
        for dtype, n in zip([*DTYPES, "F32"], sizes, strict=True)
    ]


# -- cuts, workers, order --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reference(large: dict[str, TensorRef], small: list[TensorRef]) -> object:
    refs = [*large.values(), *small]
    return exact(profile(refs, engine=threads(1), group=group).tensors)


def group(ref: TensorRef) -> str:
    return "complex" if ref.dtype[0] == "C" else "float" if ref.dtype[0] in "FB" else "integer"


@settings(max_examples=8, deadline=None)
@given(pieces=st.integers(1, 6), jobs=st.integers(1, 4), reverse=st.booleans())
def test_profiles_are_the_same_to_the_bit_for_every_cut_and_number_of_workers(
    large: dict[str, TensorRef],
    small: list[TensorRef],
    reference: tuple[object, ...],
    pieces: int,
    jobs: int,
    reverse: bool,
) -> None:
    refs = [*large.values(), *small]
    order = refs[::-1] if reverse else refs
    found = profile(order, engine=threads(jobs), tile_elements=pieces * PIECE, group=group).tensors
    assert exact(found[::-1] if reverse else found) == reference


@pytest.mark.parametrize("dtype", DTYPES)
def test_tallies_merge_in_any_order_to_the_same_bits(
    large: dict[str, TensorRef], dtype: str
) -> None:
    ref = large[dtype]
    whole = exact(profile([ref], engine=threads(1)).tensors[0])
    for seed in range(4):
        parts = [tally(tile, scan) for tile in tiles(ref, PIECE)]
        assert len(parts) == 5
        rng(seed).shuffle(parts)
        assert exact(finish(merged(parts)).profile) == whole


def test_tallies_merge_in_any_grouping_to_the_same_bits(large: dict[str, TensorRef]) -> None:
    ref = large["F32"]
    whole = exact(profile([ref], engine=threads(1)).tensors[0])
    a, b, c, d, e = (tally(tile, scan) for tile in tiles(ref, PIECE))
    grouped = merged([merged([e, c]), merged([b, merged([d, a])])])
    assert exact(finish(grouped).profile) == whole


def test_pools_are_the_same_to_the_bit_for_every_cut_and_number_of_workers(
    large: dict[str, TensorRef], small: list[TensorRef]
) -> None:
    refs = [*large.values(), *small]
    seen = set()
    for jobs, pieces in [(1, 64), (1, 1), (3, 2), (4, 1)]:
        pools = profile(refs, engine=threads(jobs), tile_elements=pieces * PIECE, group=group).pools
        seen.add(tuple((name, exact(pool.statistics())) for name, pool in pools.items()))
    assert len(seen) == 1


def test_progress_counts_every_byte(large: dict[str, TensorRef], small: list[TensorRef]) -> None:
    refs = [*large.values(), *small]
    for jobs, pieces in [(1, 64), (4, 1)]:
        told: list[int] = []
        profile(refs, engine=threads(jobs), tile_elements=pieces * PIECE, progress=told.append)
        assert sum(told) == pytest.approx(sum(ref.nbytes for ref in refs), abs=len(refs))


# -- moments ---------------------------------------------------------------------------------------

finite = st.floats(-1e3, 1e3, allow_subnormal=False)
chunks = st.lists(st.lists(finite, max_size=20), min_size=1, max_size=12)


def row(values: Sequence[float]) -> np.ndarray:
    """[n, mean, M2, M3, M4] by exact sums."""
    n = len(values)
    if not n:
        return np.zeros(5)
    mean = math.fsum(values) / n
    sums = [math.fsum((v - mean) ** k for v in values) for k in (2, 3, 4)]
    return np.array([n, mean, *sums])


def assert_rows_agree(got: Moments, values: Sequence[float]) -> None:
    want = row(values)
    reach = max(map(abs, values), default=0.0)
    assert got.n == len(values)
    for power, a, b in zip((1, 2, 3, 4), got.row()[1:], want[1:], strict=True):
        assert a == pytest.approx(b, rel=1e-9, abs=1e-11 * (len(values) + 1) * reach**power)


@FEW
@given(chunks)
def test_merged_moments_are_those_of_all_values(parts: list[list[float]]) -> None:
    found = Moments.merged(np.array([row(part) for part in parts]))
    assert_rows_agree(found, [v for part in parts for v in part])


@FEW
@given(chunks)
def test_moments_of_values_are_exact_sums(parts: list[list[float]]) -> None:
    values = [v for part in parts for v in part]
    assert_rows_agree(Moments.of(np.array(values)), values)
    counted = np.array(values), np.arange(1, len(values) + 1)
    repeated = [v for i, v in enumerate(values) for _ in range(i + 1)]
    assert_rows_agree(Moments.of(*counted), repeated)


def test_moments_of_nothing_merge_without_a_trace() -> None:
    values = rng().normal(size=50)
    rows = [np.zeros(5), row(values[:20].tolist()), np.zeros(5), row(values[20:].tolist())]
    assert_rows_agree(Moments.merged(np.array(rows)), values.tolist())
    assert Moments.merged(np.zeros((3, 5))) == Moments()
    assert Moments.merged(np.zeros((0, 5))) == Moments()


# -- pools -----------------------------------------------------------------------------------------


def finished(ref: TensorRef) -> Finished:
    return finish(merged([tally(tile, scan) for tile in tiles(ref)]))


def assert_pooled(s: Statistics, x: np.ndarray) -> None:
    """Counts and moments exact, quantiles within one percent, of all elements together."""
    kept = x[np.isfinite(x)]
    assert (s.count, s.nan_count) == (x.size, np.isnan(x).sum())
    assert (s.posinf_count, s.neginf_count) == ((x == np.inf).sum(), (x == -np.inf).sum())
    assert (s.zero_count, s.zero_fraction) == ((x == 0).sum(), (x == 0).mean())
    assert (s.min, s.max, s.abs_max) == (kept.min(), kept.max(), np.abs(kept).max())
    wide = kept.astype(np.longdouble)
    assert s.mean == pytest.approx(float(wide.mean()), rel=1e-12, abs=1e-14)
    assert s.std == pytest.approx(float(wide.std()), rel=1e-12)
    assert_moments(s, kept)
    assert s.quantiles is not None
    for q, value in s.quantiles.items():
        want = np.quantile(kept, float(q), method="inverted_cdf")
        assert value == pytest.approx(want, rel=0.01)
    assert s.mad == pytest.approx(lower_median(np.abs(kept - lower_median(kept))), rel=0.01)
    assert s.trimmed_kurtosis == pytest.approx(trimmed_kurtosis(kept), rel=0.01, abs=0.01)


@settings(max_examples=12, deadline=None)
@given(
    parts=st.lists(
        st.tuples(
            st.sampled_from(["F32", "F64", "BF16", "F16", "F8_E4M3"]),
            st.integers(300, 20_000),
            st.sampled_from([0.05, 1.0, 7.0]),
        ),
        min_size=1,
        max_size=5,
    )
)
def test_a_pool_has_the_statistics_of_its_tensors_put_together(
    folder: Path, parts: list[tuple[str, int, float]]
) -> None:
    pool, other, values = Pool(), Pool(), []
    for seed, (dtype, n, scale) in enumerate(parts):
        x = scale * rng(seed).standard_t(4, n)
        x[rng(seed).random(n) < 1e-3] = np.nan
        stored = encode(dtype, x)
        values.append(decode(dtype, stored))
        (pool if seed % 2 else other).add(finished(tensor(folder, dtype, stored)))
    both = other.merge(pool)
    assert both.tensors == len(parts)
    assert_pooled(both.statistics(), np.concatenate(values))


def test_a_pool_of_nothing_has_nothing() -> None:
    assert Pool().statistics() == Statistics(zero_fraction=None)


def test_profile_pools_by_the_name_a_tensor_is_given(folder: Path) -> None:
    stored = [rng(i).normal(size=5000 + i).astype(np.float32) for i in range(6)]
    refs = [tensor(folder, "F32", x) for x in stored]
    names = {ref.name: "odd" if i % 2 else None for i, ref in enumerate(refs)}
    pools = profile(refs, group=lambda ref: names[ref.name]).pools
    assert list(pools) == ["odd"]
    assert pools["odd"].tensors == 3
    assert_pooled(pools["odd"].statistics(), np.concatenate(stored[1::2]).astype(np.float64))


# -- the comparisons can fail ----------------------------------------------------------------------


def test_the_comparison_of_profiles_sees_the_last_bit(large: dict[str, TensorRef]) -> None:
    found: TensorProfile = profile([large["F32"]], engine=threads(1)).tensors[0]
    s = found.statistics
    assert s.mean is not None
    nudged = dataclasses.replace(s, mean=math.nextafter(s.mean, 9))
    assert exact(dataclasses.replace(found, statistics=nudged)) != exact(found)
    assert exact(-0.0) != exact(0.0)


def test_the_oracle_of_merging_sees_a_wrong_weight() -> None:
    values = rng().normal(size=40).tolist()
    rows = np.array([row(values[:10]), row(values[10:])])
    assert_rows_agree(Moments.merged(rows), values)
    rows[0, 1] += 1e-6
    with pytest.raises(AssertionError):
        assert_rows_agree(Moments.merged(rows), values)


def test_the_oracle_of_pools_sees_one_changed_element(folder: Path) -> None:
    x = rng().normal(size=5000)
    pool = Pool()
    pool.add(finished(tensor(folder, "F64", x)))
    assert_pooled(pool.statistics(), x)
    x[77] += 1e-6
    with pytest.raises(AssertionError):
        assert_pooled(pool.statistics(), x)
