"""The measures of two tensors, against loops in float64 and casts of other libraries."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from gradscope.checkpoints.open import open_checkpoint
from gradscope.checkpoints.tiles import PIECE
from gradscope.drift import code_kernels, kernels
from gradscope.drift.comparing import Pair, compare
from gradscope.drift.measures import Measures
from gradscope.drift.sums import Rounding
from gradscope.statistics.engine import threads

TYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn,
         torch.float8_e5m2, torch.int8, torch.int32, torch.bool]  # fmt: skip


def measured(folder: Path, base: torch.Tensor, new: torch.Tensor, **options: Any) -> Measures:
    refs: list[Any] = []
    for name, tensor in (("base", base), ("new", new)):
        path = folder / f"{name}.safetensors"
        save_file({"t": tensor.contiguous()}, path)
        refs += open_checkpoint(str(path)).tensors
    (result,) = compare([Pair(*refs)], threads(1), **options)
    return result


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def cast(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return (values > 0) if dtype is torch.bool else (values * 3).to(dtype)


@pytest.mark.parametrize("one", TYPES, ids=str)
@pytest.mark.parametrize("two", [torch.float32, torch.bfloat16, torch.int8], ids=str)
def test_sums_and_counts_are_those_of_a_float64_loop(
    tmp_path: Path, one: torch.dtype, two: torch.dtype
) -> None:
    base, new = cast(drawn(37, 211), one), cast(drawn(37, 211) + 0.1 * drawn(37, 211, seed=1), two)

    m = measured(tmp_path, base, new)

    a, b = base.to(torch.float64).numpy(), new.to(torch.float64).numpy()
    d = b - a
    assert m.changed == int((a != b).sum()) if one != two else m.changed
    assert m.counts[kernels.FLIPPED] == int((a * b < 0).sum())
    assert m.relative_drift == pytest.approx(np.linalg.norm(d) / np.linalg.norm(a), rel=1e-12)
    assert m.cosine == pytest.approx(
        float((a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b)), abs=1e-12
    )
    assert m.norm_ratio == pytest.approx(np.linalg.norm(b) / np.linalg.norm(a), rel=1e-12)
    assert m.sums[kernels.CHANGES] == pytest.approx(d.sum(), abs=1e-9)
    np.testing.assert_allclose(m.row_changes, np.linalg.norm(d, axis=1), rtol=1e-12)
    np.testing.assert_allclose(m.row_norms, np.linalg.norm(a, axis=1), rtol=1e-12)
    np.testing.assert_array_equal(m.row_changed, (a != b).sum(axis=1))


def test_the_largest_changes_are_those_of_sorting_all(tmp_path: Path) -> None:
    base = drawn(600, 9)
    new = base + 0.01 * drawn(600, 9, seed=1)
    new[7, 3] -= 5

    m = measured(tmp_path, base, new)

    d = np.abs(new.double().numpy() - base.double().numpy()).reshape(-1)
    wanted = np.argsort(-d, kind="stable")[:10]
    assert [c.place for c in m.largest] == wanted.tolist()
    assert m.largest[0].place == 7 * 9 + 3
    assert m.largest[0].base == base[7, 3].item()
    assert m.largest[0].new == new[7, 3].item()


@pytest.mark.parametrize(
    ("dtype", "numpy"),
    [
        (torch.float32, np.float32), (torch.float64, np.float64), (torch.float16, np.float16),
        (torch.bfloat16, ml_dtypes.bfloat16), (torch.float8_e4m3fn, ml_dtypes.float8_e4m3fn),
        (torch.float8_e5m2, ml_dtypes.float8_e5m2),
    ],
    ids=str,
)  # fmt: skip
def test_distances_are_those_of_stepping_from_value_to_value(
    tmp_path: Path, dtype: torch.dtype, numpy: Any
) -> None:
    base = drawn(2000).to(dtype)
    steps = torch.arange(2000) % 5
    view = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[base.element_size()]
    new = (base.view(view) + steps.to(view)).view(dtype)  # away from zero, step by step

    m = measured(tmp_path, base, new)

    assert m.ulps == (4, (400, 400, 800, 400))
    stepped = base.view(view).numpy().view(numpy)
    for _ in range(4):
        stepped = np.nextafter(stepped, numpy(np.inf) * np.sign(stepped).astype(numpy))
    four = (base.view(view) + 4).numpy().view(numpy)
    if dtype is not torch.float8_e4m3fn:  # its codes end without an infinity to step to
        np.testing.assert_array_equal(stepped, four)


def test_distances_go_through_zero(tmp_path: Path) -> None:
    tiny = 2.0**-133  # the smallest subnormal of bfloat16
    base = torch.tensor([tiny, -tiny, 0.0, 1.0], dtype=torch.bfloat16)
    new = torch.tensor([-tiny, tiny, -0.0, 1.0], dtype=torch.bfloat16)

    m = measured(tmp_path, base, new)

    assert m.changed == 3  # a zero of another sign is another code, at no distance
    assert m.ulps == (2, (2, 0, 2))


def test_relative_changes_are_counted_by_octave(tmp_path: Path) -> None:
    base = drawn(50, 50)
    base[0, :10] = 0
    new = base * (1 + 0.01 * drawn(50, 50, seed=1))
    new[1] = base[1]
    new[0, :3] = 1

    m = measured(tmp_path, base, new)

    a, b = base.double().numpy(), new.double().numpy()
    ratio = np.abs(b - a)[(a != b) & (a != 0)] / np.abs(a)[(a != b) & (a != 0)]
    places = np.clip(np.floor(np.log2(ratio)) - kernels.LEAST_OCTAVE, 0, kernels.OCTAVES - 1)
    wanted = np.bincount(places.astype(int), minlength=kernels.OCTAVES)
    assert list(m.octaves[:-1]) == wanted.tolist()
    assert m.octaves[-1] == 3


def test_elements_that_are_not_finite_are_counted_and_leave_the_sums(tmp_path: Path) -> None:
    base, new = drawn(40, 40), drawn(40, 40, seed=1)
    base[0, 0], base[1, 1] = math.nan, math.inf
    new[0, 0], new[2, 2] = math.nan, -math.inf
    kept = torch.isfinite(base) & torch.isfinite(new)

    m = measured(tmp_path, base, new)

    a, b = base[kept].double(), new[kept].double()
    assert m.relative_drift == pytest.approx(float((b - a).norm() / a.norm()), rel=1e-12)
    assert (m.counts[kernels.ODD_BASE], m.counts[kernels.ODD_NEW]) == (2, 2)
    assert m.counts[kernels.ODD_ONE] == 2
    assert m.changed == 1599  # the NaN of both has the same bits


def test_measures_do_not_depend_on_threads_or_tiles(tmp_path: Path) -> None:
    base = drawn(3 * PIECE // 1000 + 17, 1000)
    new = base + 1e-3 * drawn(*base.shape, seed=1)

    one = measured(tmp_path, base, new)
    cut = measured(tmp_path, base, new, tile_elements=PIECE)

    assert (one.sums, one.counts, one.octaves, one.ulps, one.largest) == (
        cut.sums, cut.counts, cut.octaves, cut.ulps, cut.largest
    )  # fmt: skip
    np.testing.assert_array_equal(one.row_changes, cut.row_changes)


def test_rows_that_pieces_share_are_whole(tmp_path: Path) -> None:
    base = drawn(3, PIECE // 2 + 1)
    new = base + 1e-3 * drawn(*base.shape, seed=1)

    m = measured(tmp_path, base, new)

    wanted = np.linalg.norm(new.double().numpy() - base.double().numpy(), axis=1)
    np.testing.assert_allclose(m.row_changes, wanted, rtol=1e-12)


def test_nothing_is_undefined_as_a_number_when_there_is_nothing(tmp_path: Path) -> None:
    m = measured(tmp_path, torch.zeros(0, 4), torch.zeros(0, 4))

    assert (m.relative_drift, m.cosine, m.changed_fraction) == (None, None, None)


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F8_E4M3", "F8_E5M2"])
@pytest.mark.parametrize("scale", [1e-9, 1e-4, 1.0, 1e4])
def test_every_value_that_torch_rounds_counts_as_rounded(dtype: str, scale: float) -> None:
    types = {"F16": torch.float16, "BF16": torch.bfloat16, "F8_E4M3": torch.float8_e4m3fn,
             "F8_E5M2": torch.float8_e5m2}  # fmt: skip
    exact = drawn(20_000) * scale
    rounded = exact.to(types[dtype]).float()
    counts = _roundings(exact, rounded, dtype)

    assert counts[code_kernels.NEAREST] == 20_000
    off = rounded.clone()
    off[:7] = exact[:7] * 1.5 + 1
    assert _roundings(exact, off, dtype)[code_kernels.NEAREST] < 20_000


def _roundings(exact: torch.Tensor, rounded: torch.Tensor, dtype: str) -> Any:
    from gradscope.drift.sums import roundings_of as measure

    return measure(exact.numpy(), rounded.numpy(), Rounding(dtype))


def test_truncation_and_stochastic_rounding_are_told_from_rounding_to_nearest() -> None:
    exact = drawn(5000)
    low = (exact.view(torch.int32) & -65536).view(torch.float32)  # bfloat16 towards zero
    high = ((exact.view(torch.int32) & -65536) + 65536).view(torch.float32)
    either = torch.where(drawn(5000, seed=3) > 0, low, high)

    truncated, stochastic = _roundings(exact, low, "BF16"), _roundings(exact, either, "BF16")

    assert truncated[code_kernels.TOWARDS_ZERO] == 5000 > truncated[code_kernels.NEAREST]
    assert stochastic[code_kernels.NEIGHBOUR] == 5000 > stochastic[code_kernels.TOWARDS_ZERO]
    assert _roundings(exact, exact, "BF16")[code_kernels.NEIGHBOUR] < 50
