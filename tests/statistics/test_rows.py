"""Rows, the slices along dimension 0: their norms, which are dead, which repeat another."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from gradscope.checkpoints.tiles import Tile
from gradscope.statistics.records import Units
from gradscope.statistics.scan import scan
from gradscope.statistics.tally import tally

from .oracle import CODED, NARROW, NATIVE, PIECE, WIDE, decode, encode, measured, tensor


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def units(folder: Path, dtype: str, stored: np.ndarray) -> Units:
    found = measured(folder, dtype, stored).units
    assert found is not None
    return found


def row_norms(folder: Path, dtype: str, stored: np.ndarray) -> np.ndarray:
    ref = tensor(folder, dtype, stored)
    norms = tally(Tile(ref, 0, ref.numel), scan).row_norms()
    assert norms is not None
    return norms


def oracle_norms(x: np.ndarray) -> np.ndarray:
    rows = np.where(np.isfinite(x), x, 0).reshape(len(x), -1).astype(np.longdouble)
    return np.sqrt((rows * rows).sum(1)).astype(np.float64)


def assert_units(found: Units, stored: np.ndarray, x: np.ndarray) -> None:
    """All of Units, from norms and from rows compared as bytes."""
    norms = oracle_norms(x)
    median = np.median(norms)
    reference = sorted(norms, reverse=True)[min(len(norms) - 1, max(1, len(norms) // 10))]
    assert norms.max() <= 1000 * reference, "other rows than these tests have"
    dead = np.flatnonzero((norms < 1e-3 * reference) | (norms == 0))
    seen: dict[bytes, int] = {}
    repeats = []
    for i, row in enumerate(stored.reshape(len(stored), -1)):
        first = seen.setdefault(row.tobytes(), i)
        if first != i and norms[i] > 0:
            repeats.append((first, i))
    assert (found.rows, found.dead_rows, found.duplicate_rows) == (len(x), len(dead), len(repeats))
    assert found.dead == tuple(dead[:10])
    assert found.duplicates == tuple(repeats[:10])
    for got, want in (
        (found.norm_min, norms.min()),
        (found.norm_median, median),
        (found.norm_max, norms.max()),
        (found.reference, reference),
    ):
        assert got == pytest.approx(want, rel=1e-12)


# -- norms -----------------------------------------------------------------------------------------

SHAPES = [
    *((3000, n) for n in range(1, 10)),
    (1, 1),
    (1, 5000),
    (7, 4096),
    (5, 4097),
    (70_001, 4),  # pieces end inside no row
    (90_001, 3),  # and inside one
    (3, PIECE),
    (3, PIECE + 1),
    (2, 2 * PIECE + 77),  # a row of three pieces
    (64, 3, 7, 7),
    (10, 3, 5),
    (4, 1, 1, 1, 1),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", ["F32", "F64", "BF16", "F16", "F8_E4M3", "F4"])
def test_row_norms_are_those_of_float64_rows(
    tmp_path: Path, dtype: str, shape: tuple[int, ...]
) -> None:
    stored = encode(dtype, rng().normal(size=int(np.prod(shape)))).reshape(shape)
    norms = row_norms(tmp_path, dtype, stored)
    np.testing.assert_allclose(norms, oracle_norms(decode(dtype, stored)), rtol=1e-12)


@pytest.mark.parametrize("dtype", ["F32", "F64", "BF16", "F16", "F8_E5M2"])
def test_what_is_not_finite_counts_nothing_in_a_row(tmp_path: Path, dtype: str) -> None:
    x = rng().normal(size=(200, 333))
    x[rng(1).random(x.shape) < 0.01] = np.nan
    x[rng(2).random(x.shape) < 0.01] = -np.inf
    stored = encode(dtype, x.reshape(-1)).reshape(x.shape)
    norms = row_norms(tmp_path, dtype, stored)
    np.testing.assert_allclose(norms, oracle_norms(decode(dtype, stored)), rtol=1e-12)


@pytest.mark.parametrize("scale", [1e30, 1e-30])
def test_squares_of_float32_do_not_overflow(tmp_path: Path, scale: float) -> None:
    x = (scale * rng().normal(size=(50, 80))).astype(np.float32)
    np.testing.assert_allclose(row_norms(tmp_path, "F32", x), oracle_norms(x), rtol=1e-12)


def test_complex_rows_have_norms_and_no_duplicates(tmp_path: Path) -> None:
    x = (rng().normal(size=(20, 30)) + 1j * rng(1).normal(size=(20, 30))).astype(np.complex64)
    x[7] = x[3]
    found = units(tmp_path, "C64", x)
    norms = np.linalg.norm(x.astype(np.complex128), axis=1)
    assert found.norm_max == pytest.approx(norms.max(), rel=1e-6)
    assert found.duplicate_rows == 0


def test_vectors_and_scalars_have_no_rows(tmp_path: Path) -> None:
    assert measured(tmp_path, "F32", np.ones(5, np.float32)).units is None
    assert measured(tmp_path, "F32", np.ones(1, np.float32), ()).units is None


# -- dead and duplicate rows -----------------------------------------------------------------------


@pytest.mark.parametrize("width", [1, 2, 5, 9, 300, 4096, 5000])
@pytest.mark.parametrize("dtype", ["F32", "F64", "BF16", "F16"])
def test_dead_and_repeated_rows_are_found(tmp_path: Path, dtype: str, width: int) -> None:
    x = rng().uniform(0.5, 1, size=(60, width)) * rng(1).choice([-1, 1], size=(60, width))
    x[4], x[5], x[6] = 0, 1e-4 * x[6], -0.0
    x[20], x[31], x[59] = x[10], x[10], x[2]
    stored = encode(dtype, x.reshape(-1)).reshape(x.shape)
    found = units(tmp_path, dtype, stored)
    assert_units(found, stored, decode(dtype, stored))
    assert {4, 5, 6} <= set(found.dead)
    if width > 2:
        assert found.duplicates == ((10, 20), (10, 31), (2, 59))


@pytest.mark.parametrize("dtype", [d for d in (*WIDE, *NARROW) if d != "F8_E8M0"])
def test_rows_of_few_codes_are_compared_bit_by_bit(tmp_path: Path, dtype: str) -> None:
    stored = encode(dtype, rng().integers(-2, 3, 4000).astype(float)).reshape(1000, 4)
    found = units(tmp_path, dtype, stored)
    assert_units(found, stored, decode(dtype, stored))
    assert 100 < found.duplicate_rows < 1000


def test_any_number_of_dead_rows_is_counted_and_ten_are_listed(tmp_path: Path) -> None:
    x = rng().normal(size=(100, 8)).astype(np.float32)
    x[::4] = 0
    found = units(tmp_path, "F32", x)
    assert found.dead_rows == 25
    assert found.dead == tuple(range(0, 40, 4))
    assert found.duplicate_rows == 0  # rows of zeros repeat nothing


def test_a_tensor_of_zeros_is_all_dead(tmp_path: Path) -> None:
    found = units(tmp_path, "BF16", np.zeros((6, 5), np.uint16))
    assert (found.dead_rows, found.duplicate_rows, found.norm_max) == (6, 0, 0.0)


def test_minus_zero_makes_another_row(tmp_path: Path) -> None:
    x = np.array([[1, 0, 2], [1, -0.0, 2], [1, 0, 2]], np.float32)
    assert units(tmp_path, "F32", x).duplicates == ((0, 2),)


def test_the_same_elements_in_another_order_make_another_row(tmp_path: Path) -> None:
    base = rng().normal(size=3 * 4096).astype(np.float32)
    swapped, turned = base.copy(), np.roll(base, 1)
    swapped[[10, 11]] = base[[11, 10]]
    blocks = base.reshape(3, 4096)[[1, 0, 2]].reshape(-1)
    found = units(tmp_path, "F32", np.stack([base, swapped, turned, blocks, base]))
    assert found.duplicates == ((0, 4),)


def test_a_row_of_several_pieces_can_repeat_another(tmp_path: Path) -> None:
    x = rng().normal(size=(4, PIECE + 321)).astype(np.float16).view(np.uint16)
    x[3] = x[1]
    assert units(tmp_path, "F16", x).duplicates == ((1, 3),)
    x[3, -1] ^= 1
    assert units(tmp_path, "F16", x).duplicates == ()


def test_a_slice_of_more_dimensions_is_a_row(tmp_path: Path) -> None:
    x = rng().normal(size=(40, 3, 3, 5)).astype(np.float32)
    x[9], x[30] = 0, x[12]
    found = units(tmp_path, "F32", x)
    assert_units(found, x, x.astype(np.float64))
    assert (found.dead, found.duplicates) == ((9,), ((12, 30),))


# -- content hash ----------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), (7,), (5000,), (PIECE + 9,), (40, 7), (3, PIECE), (2, 3, 4)])
@pytest.mark.parametrize("dtype", [*WIDE, "BF16", "F8_E4M3", "F6_E2M3", "F4"])
def test_content_hashes_are_equal_for_equal_elements_alone(
    tmp_path: Path, dtype: str, shape: tuple[int, ...]
) -> None:
    n = int(np.prod(shape))
    stored = encode(dtype, rng().normal(size=n)).reshape(shape)
    whole = measured(tmp_path, dtype, stored).content_hash
    assert whole is not None
    assert measured(tmp_path, dtype, stored.copy()).content_hash == whole
    for place in {0, n // 2, n - 1}:
        other = stored.copy()
        flat = other.reshape(-1).view(f"u{other.itemsize}")
        flat[place] ^= 1
        assert measured(tmp_path, dtype, other).content_hash != whole


@pytest.mark.parametrize("dtype", ["C64", "C128", "I8", "I64", "BOOL"])
def test_only_real_floats_have_a_content_hash(tmp_path: Path, dtype: str) -> None:
    stored = np.arange(12).astype(NATIVE[dtype])
    assert measured(tmp_path, dtype, stored, (3, 4)).content_hash is None


def test_content_hashes_tell_dtypes_shapes_and_signs_of_zero_apart(tmp_path: Path) -> None:
    codes = rng().integers(0, 128, 24).astype(np.uint8)
    hashes = {
        measured(tmp_path, dtype, codes, shape).content_hash
        for dtype in ("F8_E4M3", "F8_E5M2")
        for shape in ((24,), (4, 6), (6, 4), (2, 2, 6))
    }
    assert len(hashes) == 8
    zero, minus = np.zeros(9, np.float32), np.full(9, -0.0, np.float32)
    assert (
        measured(tmp_path, "F32", zero).content_hash
        != measured(tmp_path, "F32", minus).content_hash
    )


def test_every_code_changes_the_hash(tmp_path: Path) -> None:
    found = {
        measured(tmp_path, "F8_E5M2", np.array([3, code, 7], np.uint8)).content_hash
        for code in range(256)
    }
    assert len(found) == 256
    assert len(CODED) == 10


# -- the oracle can fail ---------------------------------------------------------------------------


def test_the_oracle_of_rows_sees_one_changed_element(tmp_path: Path) -> None:
    x = rng().normal(size=(50, 20))
    x[7] = x[3]
    found = units(tmp_path, "F64", x)
    assert_units(found, x, x)
    x[7, 19] = np.nextafter(x[7, 19], 9)  # no longer a duplicate
    with pytest.raises(AssertionError):
        assert_units(found, x, x)
    x[7] = x[3]
    x[np.argmax(oracle_norms(x)), 0] *= 1 + 1e-9
    with pytest.raises(AssertionError):
        assert_units(found, x, x)
