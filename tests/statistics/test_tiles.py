"""Reading a tensor's elements: layouts, packed types, files that end early, threads."""

from __future__ import annotations

import os
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from gradscope.checkpoints.tensors import DTYPE_BITS, TensorRef
from gradscope.checkpoints.tiles import STORED, Tile, read_range, tiles
from gradscope.errors import InputError
from gradscope.statistics import profile, threads

from .oracle import BITS, NATIVE, PIECE, TABLES, measure, tensor


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def elements(ref: TensorRef, tile_elements: int = PIECE) -> np.ndarray:
    """All stored elements by way of tiles and pieces."""
    parts = [part.copy() for tile in tiles(ref, tile_elements) for _, part in tile.pieces()]
    return np.concatenate(parts) if parts else np.empty(0, STORED[ref.dtype])


def stored_like(dtype: str, n: int) -> np.ndarray:
    kind = STORED[dtype]
    if dtype in NATIVE and kind.kind in "fc":
        return rng().normal(size=n).astype(kind)
    top = 1 << min(DTYPE_BITS[dtype], 8 * kind.itemsize)
    return rng().integers(0, top, n, np.uint64).astype(f"u{kind.itemsize}").view(kind)


def transposed(folder: Path, dtype: str, base: np.ndarray, axes: tuple[int, ...]) -> TensorRef:
    strides = [s // base.itemsize for s in base.transpose(axes).strides]
    shape = base.transpose(axes).shape
    return tensor(folder, dtype, base, shape, pad=8, strides=tuple(strides))


# -- layouts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("pad", [0, 8, 13])
@pytest.mark.parametrize("dtype", DTYPE_BITS)
def test_elements_come_back_in_order(tmp_path: Path, dtype: str, pad: int) -> None:
    stored = stored_like(dtype, 2 * PIECE + 777)
    ref = tensor(tmp_path, dtype, stored, pad=pad)
    for size in (PIECE, 2 * PIECE, 5 * PIECE):
        np.testing.assert_array_equal(elements(ref, size), stored)


def test_tiles_lie_on_the_grid_and_cover_the_tensor(tmp_path: Path) -> None:
    ref = tensor(tmp_path, "U8", np.zeros(5 * PIECE + 3, np.uint8))
    cut = [(tile.start, tile.stop) for tile in tiles(ref, 2 * PIECE)]
    assert cut == [(0, 2 * PIECE), (2 * PIECE, 4 * PIECE), (4 * PIECE, 5 * PIECE + 3)]
    assert [first for first, _ in Tile(ref, 2 * PIECE, 4 * PIECE).pieces()] == [
        2 * PIECE,
        3 * PIECE,
    ]
    assert list(tiles(replace(ref, shape=(0, 4)))) == []


def test_a_scalar_is_one_element(tmp_path: Path) -> None:
    ref = tensor(tmp_path, "F32", np.array([2.5], np.float32), ())
    assert elements(ref).tolist() == [2.5]
    assert measure(ref).statistics.mean == 2.5


@pytest.mark.parametrize("axes", [(1, 0), (0, 1)])
@pytest.mark.parametrize("shape", [(700, 900), (3, 300_000), (300_000, 3), (1, 5)])
def test_a_transposed_matrix_reads_in_row_major_order(
    tmp_path: Path, shape: tuple[int, int], axes: tuple[int, int]
) -> None:
    base = rng().normal(size=shape).astype(np.float32)
    ref = transposed(tmp_path, "F32", base, axes)
    np.testing.assert_array_equal(elements(ref), base.transpose(axes).reshape(-1))


@pytest.mark.parametrize("dtype", ["BF16", "F64", "C64", "I16", "F8_E5M2"])
@pytest.mark.parametrize("axes", [(2, 0, 1), (1, 2, 0), (3, 2, 1, 0)])
def test_permuted_axes_of_any_type(tmp_path: Path, dtype: str, axes: tuple[int, ...]) -> None:
    shape = (31, 70, 211)[: len(axes)] if len(axes) == 3 else (9, 20, 31, 60)
    base = stored_like(dtype, int(np.prod(shape))).reshape(shape)
    ref = transposed(tmp_path, dtype, base, axes)
    np.testing.assert_array_equal(elements(ref), base.transpose(axes).reshape(-1))
    some = slice(4095, 8193)
    got = read_range(ref, some.start, some.stop)
    np.testing.assert_array_equal(got, base.transpose(axes).reshape(-1)[some])


def test_every_other_column_and_an_expanded_row(tmp_path: Path) -> None:
    base = rng().normal(size=(40, 64))
    ref = tensor(tmp_path, "F64", base, (40, 32), strides=(64, 2))
    np.testing.assert_array_equal(elements(ref), base[:, ::2].reshape(-1))
    ref = tensor(tmp_path, "F64", base, (5, 64), strides=(0, 1))
    np.testing.assert_array_equal(elements(ref), np.tile(base[0], 5))
    ref = tensor(tmp_path, "F64", base, (1280,), strides=(2,))
    np.testing.assert_array_equal(elements(ref), base.reshape(-1)[::2])


@pytest.mark.parametrize("pad", [0, 3])
def test_a_strided_tensor_is_profiled_like_its_contiguous_copy(tmp_path: Path, pad: int) -> None:
    base = rng().standard_t(3, (600, 1500)).astype(np.float32)
    whole = tensor(tmp_path, "F32", np.ascontiguousarray(base[:, :1000]), pad=pad)
    view = tensor(tmp_path, "F32", base, (600, 1000), strides=(1500, 1), pad=pad)
    assert replace(measure(view), ref=whole) == measure(whole)


def test_a_piece_of_one_strided_row_of_an_unaligned_file(tmp_path: Path) -> None:
    base = rng().normal(size=(2, PIECE + 10)).astype(np.float32)
    whole = tensor(tmp_path, "F32", np.ascontiguousarray(base[:, :PIECE]))
    view = tensor(tmp_path, "F32", base, (2, PIECE), strides=(PIECE + 10, 1), pad=1)
    assert replace(measure(view), ref=whole) == measure(whole)


@pytest.mark.parametrize("dtype", [d for d, kind in STORED.items() if kind.itemsize > 1])
def test_big_endian_elements_are_swapped(tmp_path: Path, dtype: str) -> None:
    stored = stored_like(dtype, 6000).reshape(60, 100)
    ref = tensor(tmp_path, dtype, stored.byteswap(), big_endian=True)
    np.testing.assert_array_equal(elements(ref), stored.reshape(-1))
    ref = tensor(tmp_path, dtype, stored.byteswap(), (100, 60), big_endian=True, strides=(1, 100))
    np.testing.assert_array_equal(elements(ref), stored.T.reshape(-1))


# -- packed types ----------------------------------------------------------------------------------


def test_two_codes_of_four_bits_share_a_byte_the_low_nibble_first(tmp_path: Path) -> None:
    path = tmp_path / "f4"
    path.write_bytes(bytes([0x21, 0x43, 0xF5]))
    ref = TensorRef("t", "F4", (5,), str(path), 0)
    assert elements(ref).tolist() == [1, 2, 3, 4, 5]
    np.testing.assert_array_equal(TABLES["F4"][elements(ref)], [0.5, 1, 1.5, 2, 3])


def test_four_codes_of_six_bits_share_three_bytes_the_lowest_bits_first(tmp_path: Path) -> None:
    codes = [0b000001, 0b100010, 0b110100, 0b111111, 0b101010]
    stream = sum(code << 6 * i for i, code in enumerate(codes))
    path = tmp_path / "f6"
    path.write_bytes(stream.to_bytes(4, "little"))
    for dtype in ("F6_E2M3", "F6_E3M2"):
        assert elements(TensorRef("t", dtype, (5,), str(path), 0)).tolist() == codes


@pytest.mark.parametrize("n", range(1, 10))
@pytest.mark.parametrize("dtype", BITS)
def test_packed_tensors_of_any_length(tmp_path: Path, dtype: str, n: int) -> None:
    codes = rng(n).integers(0, 1 << BITS[dtype], n).astype(np.uint8)
    assert elements(tensor(tmp_path, dtype, codes)).tolist() == codes.tolist()


# -- files that change -----------------------------------------------------------------------------


@pytest.mark.parametrize("fields", [{}, {"strides": (1, 300)}])
def test_a_file_that_became_shorter_has_changed(tmp_path: Path, fields: dict) -> None:
    ref = tensor(tmp_path, "F32", np.ones((300, 300), np.float32), **fields)
    os.truncate(ref.file, 4 * 300 * 300 - 1)
    with pytest.raises(InputError, match="became shorter") as caught:
        measure(ref)
    assert (caught.value.kind, caught.value.exit_code) == ("changed", 3)
    assert caught.value.path == ref.file
    assert ref.name in str(caught.value)


@pytest.mark.parametrize("fields", [{}, {"strides": (1, 300)}])
def test_a_file_that_vanished_cannot_be_read(tmp_path: Path, fields: dict) -> None:
    ref = tensor(tmp_path, "F32", np.ones((300, 300), np.float32), **fields)
    os.unlink(ref.file)
    with pytest.raises(InputError, match="cannot be read") as caught:
        measure(ref)
    assert caught.value.kind == "malformed"


@pytest.mark.parametrize("fields", [{}, {"strides": (1, 30)}])
def test_a_file_replaced_under_the_same_name_is_read_anew(tmp_path: Path, fields: dict) -> None:
    ref = tensor(tmp_path, "F32", np.ones((30, 30), np.float32), **fields)
    assert measure(ref).statistics.mean == 1
    other = tensor(tmp_path, "F32", np.full((30, 30), 2, np.float32))
    os.replace(other.file, ref.file)
    assert measure(ref).statistics.mean == 2


def test_an_error_in_a_worker_reaches_the_caller(tmp_path: Path) -> None:
    refs = [tensor(tmp_path, "F32", np.ones(1000, np.float32)) for _ in range(20)]
    os.truncate(refs[13].file, 100)
    with pytest.raises(InputError, match="t") as caught:
        profile(refs, engine=threads(4), tile_elements=PIECE)
    assert caught.value.path == refs[13].file


# -- threads ---------------------------------------------------------------------------------------


def test_several_threads_read_several_files_at_once(tmp_path: Path) -> None:
    stored = [rng(i).normal(size=PIECE + 5000 * i).astype(np.float32) for i in range(4)]
    refs = [tensor(tmp_path, "F32", x) for x in stored]
    wrong: list[int] = []
    start = threading.Barrier(4)

    def read(number: int) -> None:
        start.wait()
        for turn in range(12):
            which = (number + turn) % 4
            if not np.array_equal(elements(refs[which]), stored[which]):
                wrong.append(which)

    workers = [threading.Thread(target=read, args=(i,)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert wrong == []


def test_what_read_range_returns_outlives_the_next_read(tmp_path: Path) -> None:
    ref = tensor(tmp_path, "F64", np.arange(9000.0))
    kept = read_range(ref, 0, 4096)
    read_range(ref, 4096, 9000)
    np.testing.assert_array_equal(kept, np.arange(4096.0))


def test_the_comparison_sees_two_elements_swapped(tmp_path: Path) -> None:
    stored = stored_like("F4", 5001)
    ref = tensor(tmp_path, "F4", stored)
    wrong = stored.copy()
    place = int(np.flatnonzero(stored[:-1] != stored[1:])[0])
    wrong[[place, place + 1]] = wrong[[place + 1, place]]
    with pytest.raises(AssertionError):
        np.testing.assert_array_equal(elements(ref), wrong)
