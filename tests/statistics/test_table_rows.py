"""Rows of a table by their ids, against whole tables computed in float64."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from gradscope.checkpoints.open import open_checkpoint
from gradscope.checkpoints.tensors import TensorRef
from gradscope.statistics.engine import threads
from gradscope.statistics.table_rows import centre_of_cluster, rows_by_id, sampled

from ..weights.checkpoints import Tensor, bf16, write

Array = npt.NDArray[Any]
FIXTURES = Path(__file__).resolve().parents[2] / "fixtures"


def tokens(rows: int, width: int, common: float = 1.0, seed: int = 0) -> Array:
    """Trained rows: unlike directions, norms that differ, a part that all share."""
    rng = np.random.default_rng([seed, rows, width])
    values = rng.standard_normal((rows, width)) * (1 + np.arange(width)) ** -0.25
    values *= np.exp(0.3 * rng.standard_normal((rows, 1)))
    return values + common * rng.standard_normal(width)


def untold(values: Array, ids: Array, cosine: float, seed: int = 1) -> Array:
    """The same with some rows where training left those that it never saw: one place, and noise.

    ``cosine`` is that of such a row to their mean, the rows' mean taken out.
    """
    rng = np.random.default_rng(seed)
    mean, width = values.mean(axis=0), values.shape[1]
    place = rng.standard_normal(width)
    place *= np.median(np.linalg.norm(values - mean, axis=1)) / np.linalg.norm(place)
    noise = rng.standard_normal((len(ids), width)) * np.linalg.norm(place) / np.sqrt(width)
    made = values.copy()
    made[ids] = mean + place + noise * np.sqrt(1 / cosine**2 - 1)
    return made


def stored(folder: Path, tensor: Tensor) -> TensorRef:
    return open_checkpoint(str(write(folder / "t.safetensors", {"t": tensor}))).tensors[0]


def together(ref: TensorRef) -> list[int]:
    centre = centre_of_cluster(sampled(ref))
    return [] if centre is None else list(rows_by_id(ref, centre, 0, threads(2)).together)


CASTS: dict[str, Callable[[Array], Tensor]] = {
    "F64": lambda values: values,
    "F32": lambda values: values.astype(np.float32),
    "BF16": bf16,
    "F16": lambda values: values.astype(np.float16),
}


@pytest.mark.parametrize("dtype", CASTS)
@pytest.mark.parametrize(
    ("share", "cosine", "common"),
    [(0.005, 0.999, 1.0), (0.02, 0.97, 0.0), (0.1, 0.95, 3.0), (0.3, 0.9999, 1.0)],
)
def test_rows_that_were_never_told_apart_are_named_and_no_others(
    dtype: str, share: float, cosine: float, common: float, tmp_path: Path
) -> None:
    values = tokens(8000, 128, common)
    ids = np.sort(np.random.default_rng(2).choice(8000, int(share * 8000), replace=False))

    assert together(stored(tmp_path, CASTS[dtype](untold(values, ids, cosine)))) == list(ids)
    assert together(stored(tmp_path, CASTS[dtype](values))) == []


@pytest.mark.parametrize(
    ("place", "hinted", "found"),
    [(0, False, True), (39960, False, True), (20001, False, False), (20001, True, True)],
)
def test_a_block_of_forty_rows_is_found_at_either_end_or_where_a_tokenizer_points(
    place: int, hinted: bool, found: bool, tmp_path: Path
) -> None:
    ids = range(place, place + 40)
    ref = stored(tmp_path, bf16(untold(tokens(40000, 32), np.array(ids), 0.99)))

    centre = centre_of_cluster(sampled(ref, ids if hinted else ()))

    assert (centre is not None) is found
    if centre is not None:
        assert rows_by_id(ref, centre, 0, threads(1)).together == tuple(ids)


def test_the_distances_behind_it_are_those_of_float64(tmp_path: Path) -> None:
    values = untold(tokens(4000, 64), np.arange(200), 0.98).astype(np.float32)
    ref = stored(tmp_path, values)
    centre = centre_of_cluster(sampled(ref))
    assert centre is not None

    rows = rows_by_id(ref, centre, 0, threads(1))

    exact = np.linalg.norm(values.astype(np.float64) - centre.point, axis=1)
    np.testing.assert_allclose(centre.distances(values), exact, rtol=1e-5)
    assert rows.together == tuple(np.flatnonzero(exact < centre.reach).tolist())
    assert rows.spread == pytest.approx(np.median(exact[:200]) / np.median(exact[200:]), rel=0.05)
    near = values[:200].astype(np.float64).mean(axis=0)
    assert np.linalg.norm(centre.point - near) < 0.1 * np.linalg.norm(near)


def smooth(rows: int, width: int) -> Array:
    """Sinusoidal positions."""
    angles = np.arange(rows)[:, None] / 10000 ** (np.arange(width // 2) * 2 / width)
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)


HEALTHY = {
    "isotropic": tokens(4000, 64, 0.0),
    "mostly one direction": tokens(4000, 64, 0.0) + 20 * tokens(4000, 1, 0.0) * np.ones(64) / 8,
    "far from zero": tokens(4000, 64, 30.0),
    "positions": smooth(2048, 128),
    "wide norms": tokens(4000, 64) * np.exp(np.random.default_rng(3).standard_normal((4000, 1))),
    "two scales": tokens(4000, 64, 0.0) * np.where(np.arange(4000) < 2000, 1, 0.1)[:, None],
    "sixteen wide": tokens(4000, 16, 0.5),
}


@pytest.mark.parametrize("kind", HEALTHY)
def test_a_table_without_such_rows_has_none(kind: str, tmp_path: Path) -> None:
    assert together(stored(tmp_path, HEALTHY[kind].astype(np.float32))) == []


@pytest.mark.parametrize("shape", [(511, 64), (4000, 15)])
def test_a_small_table_is_not_judged(shape: tuple[int, int], tmp_path: Path) -> None:
    values = untold(tokens(*shape), np.arange(100), 0.999).astype(np.float32)

    assert together(stored(tmp_path, values)) == []


def test_rows_of_each_kind_are_named_once(tmp_path: Path) -> None:
    values = untold(tokens(3000, 64), np.arange(100, 200), 0.99).astype(np.float32)
    values[[5, 7]] = 0
    values[[1500, 1700]] = values[1200]
    values[150] = values[120]
    ref = stored(tmp_path, values)

    rows = rows_by_id(ref, centre_of_cluster(sampled(ref)), 2, threads(2))

    assert rows.near_zero == (5, 7)
    assert rows.repeated == (1500, 1700)
    assert rows.together == tuple(range(100, 200))
    assert rows.all == (5, 7, *range(100, 200), 1500, 1700)


def test_a_row_that_is_not_finite_is_in_no_cluster(tmp_path: Path) -> None:
    values = untold(tokens(3000, 64), np.arange(100), 0.99).astype(np.float32)
    values[[50, 60, 2000]] = np.nan
    values[70, 3] = np.inf

    found = together(stored(tmp_path, values))

    assert found == [i for i in range(100) if i not in (50, 60, 70)]


@pytest.mark.fetched
def test_bytes_that_utf8_never_has_are_the_untold_tokens_of_a_released_table() -> None:
    path = FIXTURES / "fetched" / "l2_supercat_256.safetensors"
    if not path.is_file():
        pytest.skip(f"{path.name} not found: run `make fixtures`")

    found = together(open_checkpoint(str(path)).tensors[0])

    ascii_bytes = set(range(0x20 + 3, 0x7F + 3))  # a Llama's byte b is id b + 3
    never = {byte + 3 for byte in (0xC0, 0xC1, *range(0xF5, 0x100))}
    assert ascii_bytes | never <= set(found)
    assert set(found) <= set(range(3, 259))


@pytest.mark.parametrize("scale", [1e18, 1e30, 1e-30])
def test_values_at_the_ends_of_float32_are_no_error(scale: float, tmp_path: Path) -> None:
    values = (untold(tokens(3000, 64), np.arange(100), 0.99) * scale).astype(np.float32)
    values[3, 4] = np.float32(3e38)

    assert set(together(stored(tmp_path, values))) <= set(range(100))
