"""Units that are not rows: columns, channels of transposed convolutions, stacks, parts, heads."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from gradscope.checkpoints.tiles import Tile, tiles
from gradscope.statistics import profile, threads
from gradscope.statistics.layout import Part, UnitLayout
from gradscope.statistics.records import Units
from gradscope.statistics.scan import scan
from gradscope.statistics.tally import Scan, Tally, merged, tally
from gradscope.statistics.torch_scan import TorchScan

from .oracle import PIECE, Array, decode, encode, tensor

TORCH = TorchScan("cpu")
DTYPES = ("F32", "F64", "BF16", "F16", "F8_E4M3", "F4")

#: Shape, layout, and the axes that bring the units to the front.
LAYOUTS: list[tuple[tuple[int, ...], UnitLayout, tuple[int, ...]]] = [
    ((60, 80), UnitLayout.along((60, 80), 1), (1, 0)),
    ((5000, 3), UnitLayout.along((5000, 3), 1), (1, 0)),
    ((9001, 1), UnitLayout.along((9001, 1), 1), (1, 0)),
    ((1, 9001), UnitLayout.along((1, 9001), 1), (1, 0)),
    ((3, 3, 7, 11), UnitLayout.along((3, 3, 7, 11), -1), (3, 0, 1, 2)),
    ((12, 20, 4, 4), UnitLayout.along((12, 20, 4, 4), 1), (1, 0, 2, 3)),
    ((5, 30, 20), UnitLayout.along((5, 30, 20), 1, stacked=1), (0, 1, 2)),
    ((5, 30, 20), UnitLayout.along((5, 30, 20), 2, stacked=1), (0, 2, 1)),
    ((700, 4099), UnitLayout.along((700, 4099), 1), (1, 0)),
    ((3, 5000, 160), UnitLayout.along((3, 5000, 160), 2, stacked=1), (0, 2, 1)),
    ((3, PIECE + 7), UnitLayout.along((3, PIECE + 7), 1), (1, 0)),
]  # fmt: skip
IDS = [f"{shape}-{layout.axis}-{layout.groups}" for shape, layout, _ in LAYOUTS]


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def made(dtype: str, shape: tuple[int, ...]) -> Array:
    return encode(dtype, rng().normal(size=int(np.prod(shape)))).reshape(shape)


def as_rows(stored: Array, layout: UnitLayout, order: tuple[int, ...]) -> Array:
    return np.ascontiguousarray(stored.transpose(order)).reshape(layout.units, -1)


def whole(folder: Path, dtype: str, stored: Array, layout: UnitLayout, by: Scan) -> Tally:
    ref = tensor(folder, dtype, stored)
    return tally(Tile(ref, 0, ref.numel), by, layout)


def units(folder: Path, dtype: str, stored: Array, layout: UnitLayout | None) -> Units:
    ref = tensor(folder, dtype, stored)
    found = profile([ref], engine=threads(1), layout=lambda _: layout).tensors[0].units
    assert found is not None
    return found


@pytest.mark.parametrize("by", [scan, TORCH], ids=["kernels", "torch"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "layout", "order"), LAYOUTS, ids=IDS)
def test_a_unit_has_the_norm_and_the_hash_that_it_has_as_a_row(
    shape: tuple[int, ...],
    layout: UnitLayout,
    order: tuple[int, ...],
    dtype: str,
    by: Scan,
    tmp_path: Path,
) -> None:
    stored = made(dtype, shape)
    rows = as_rows(stored, layout, order)
    found = whole(tmp_path, dtype, stored, layout, by)
    norms = found.unit_norms()
    assert norms is not None
    wide = decode(dtype, rows.reshape(-1)).reshape(rows.shape)
    np.testing.assert_allclose(norms, np.sqrt((wide * wide).sum(1)), rtol=1e-12)
    turned = whole(tmp_path, dtype, rows, UnitLayout.along(rows.shape, 0), scan)
    np.testing.assert_array_equal(found.unit_hashes(), turned.unit_hashes())


@pytest.mark.parametrize("by", [scan, TORCH], ids=["kernels", "torch"])
@pytest.mark.parametrize("dtype", ["F32", "F64", "BF16", "F16", "F8_E5M2"])
def test_what_is_not_finite_counts_nothing_in_a_column(
    dtype: str, by: Scan, tmp_path: Path
) -> None:
    x = rng().normal(size=(333, 200))
    x[rng(1).random(x.shape) < 0.01] = np.nan
    x[rng(2).random(x.shape) < 0.01] = -np.inf
    stored = encode(dtype, x.reshape(-1)).reshape(x.shape)
    wide = decode(dtype, stored.reshape(-1)).reshape(x.shape)
    norms = whole(tmp_path, dtype, stored, UnitLayout.along(x.shape, 1), by).unit_norms()
    assert norms is not None
    finite = np.where(np.isfinite(wide), wide, 0)
    np.testing.assert_allclose(norms, np.sqrt((finite * finite).sum(0)), rtol=1e-12)


@pytest.mark.parametrize("by", [scan, TORCH], ids=["kernels", "torch"])
@pytest.mark.parametrize("shape", [(3000, 1500), (5, 1000, 900)], ids=str)
def test_neither_tiles_nor_threads_nor_order_change_a_bit(
    shape: tuple[int, ...], by: Scan, tmp_path: Path
) -> None:
    layout = UnitLayout.along(shape, -1, stacked=len(shape) - 2)
    ref = tensor(tmp_path, "BF16", made("BF16", shape))
    once = tally(Tile(ref, 0, ref.numel), by, layout)
    pieces = [tally(tile, by, layout) for tile in tiles(ref, PIECE)]
    for order in (pieces, pieces[::-1], [pieces[i] for i in (3, 0, 4, 2, 1)]):
        again = merged([Tally(ref, None, layout=layout), *order])
        assert again.units.total().squares.tobytes() == once.units.total().squares.tobytes()
    jobs = [
        profile([ref], scan=by, layout=lambda _: layout, engine=threads(n), tile_elements=PIECE)
        for n in (1, 3)
    ]
    assert repr(jobs[0].tensors) == repr(jobs[1].tensors)


def test_a_long_column_costs_as_many_sums_as_the_number_of_pieces_has_digits(
    tmp_path: Path,
) -> None:
    shape = (23 * PIECE // 16, 16)
    found = whole(tmp_path, "F8_E4M3", made("F8_E4M3", shape), UnitLayout.along(shape, 1), scan)
    assert len(found.pieces) == 23
    assert len(found.units.nodes) == 4  # 16 + 4 + 2 + 1
    assert all(piece.units is None for piece in found.pieces)


def test_columns_of_a_strided_tensor_are_the_rows_of_its_storage(tmp_path: Path) -> None:
    stored = made("F32", (70, 50))
    stored[7] = 0
    stored[31] = stored[12]
    ref = tensor(tmp_path, "F32", stored)
    turned = replace(ref, shape=(50, 70), strides=(1, 50))
    rows = profile([ref]).tensors[0].units
    columns = profile([turned], layout=lambda _: UnitLayout.along((50, 70), 1)).tensors[0].units
    assert rows is not None
    assert columns is not None
    assert (columns.dead, columns.duplicates) == (rows.dead, rows.duplicates) == ((7,), ((12, 31),))
    assert columns.axis == 1


def test_the_content_hash_does_not_know_the_layout(tmp_path: Path) -> None:
    ref = tensor(tmp_path, "BF16", made("BF16", (40, 70)))
    rows = profile([ref]).tensors[0]
    columns = profile([ref], layout=lambda _: UnitLayout.along((40, 70), 1)).tensors[0]
    assert rows.content_hash == columns.content_hash
    assert rows.statistics == columns.statistics


# -- parts -----------------------------------------------------------------------------------------


def test_a_stacked_matrix_has_the_hash_the_norm_and_the_dead_rows_that_it_has_alone(
    tmp_path: Path,
) -> None:
    stack = made("F16", (4, 30, 20))
    stack[2, 5:9] = 0
    stack[1, 3] = stack[1, 17]
    parts = [Part(f"expert {i}", 30) for i in range(4)]
    layout = UnitLayout.along(stack.shape, 1, stacked=1).divided(*parts)
    found = units(tmp_path, "F16", stack, layout)
    turned = UnitLayout.along((4, 20, 30), 2, stacked=1).divided(*parts)
    assert found.parts is not None
    other = units(tmp_path, "F16", np.ascontiguousarray(stack.transpose(0, 2, 1)), turned)
    assert other.parts == found.parts
    for index, part in enumerate(found.parts):
        alone = profile([tensor(tmp_path, "F16", stack[index])]).tensors[0]
        assert alone.units is not None
        assert part.content_hash == alone.content_hash
        assert (part.dead, part.duplicate_rows) == (alone.units.dead, alone.units.duplicate_rows)
        assert part.norm == pytest.approx(alone.statistics.l2_norm, rel=1e-12)
        assert part.reference == alone.units.reference
    assert found.dead == (65, 66, 67, 68)


def test_parts_of_other_norms_have_references_of_their_own(tmp_path: Path) -> None:
    x = rng().normal(size=(90, 50)).astype(np.float32)
    x[:30] *= 100
    x[60:] *= 0.02
    x[65] *= 2e-3  # a thousandth of its own kind's, and an eight millionth of the first part's
    x[70] *= 2e-4
    layout = UnitLayout.along(x.shape, 0).divided(*(Part(n, 30) for n in "qkv"))
    found = units(tmp_path, "F32", x, layout)
    assert found.parts is not None
    assert [part.dead for part in found.parts] == [(), (), (10,)]
    assert found.dead == (70,)


@pytest.mark.parametrize("scale", [0.0, 1e-7, 0.9e-3])
def test_a_part_that_is_dead_whole_does_not_hide(scale: float, tmp_path: Path) -> None:
    x = np.full((90, 50), 0.1, np.float32)
    x[60:] *= scale
    layout = UnitLayout.along(x.shape, 0).divided(*(Part(n, 30) for n in "qkv"))
    found = units(tmp_path, "F32", x, layout)
    assert found.parts is not None
    assert [part.dead_rows for part in found.parts] == [0, 0, 30]


def test_interleaved_parts_are_told_apart(tmp_path: Path) -> None:
    """Four heads of a query, a key and a value of five units each."""
    x = rng().normal(size=(60, 8)).astype(np.float32)
    x[10:15] = 0  # the value of the first head
    x[45:50] = 0  # the query of the last
    layout = UnitLayout.along(x.shape, 0).divided(*(Part(n, 5) for n in "qkv"), head=5)
    found = units(tmp_path, "F32", x, layout)
    assert found.parts is not None
    assert [part.dead for part in found.parts] == [(15, 16, 17, 18, 19), (), (0, 1, 2, 3, 4)]
    assert [part.dead_heads for part in found.parts] == [(3,), (), (0,)]
    assert {part.heads for part in found.parts} == {4}


def test_a_head_is_dead_when_all_its_units_are(tmp_path: Path) -> None:
    x = rng().normal(size=(60, 8)).astype(np.float32)
    x[20:30] = 0
    x[41:50] = 0
    found = units(tmp_path, "F32", x, UnitLayout.along(x.shape, 0).divided(head=10))
    assert (found.heads, found.dead_heads, found.dead_rows) == (6, (2,), 19)


def test_parts_must_fill_the_units() -> None:
    with pytest.raises(ValueError, match="no multiple"):
        UnitLayout.along((10, 4), 0).divided(Part("a", 3))
