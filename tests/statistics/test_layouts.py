"""Units that are not rows: columns, channels of transposed convolutions, stacks, parts, heads."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from gradscope.checkpoints.tiles import Tile
from gradscope.statistics import profile, threads
from gradscope.statistics.layout import UnitLayout
from gradscope.statistics.records import Units
from gradscope.statistics.scan import scan
from gradscope.statistics.tally import Scan, Tally, tally
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
