"""Casting is measured as torch and ml_dtypes really cast, to the last count."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from gradscope.casts import measure
from gradscope.casts.formats import TARGETS, target
from gradscope.casts.measure import Loss, Subject, losses
from gradscope.checkpoints import open_checkpoint
from gradscope.errors import UsageError
from gradscope.statistics import threads

#: Magnitude beyond which elements are none of the bulk.
LIMIT = 100.0
Cast = Callable[[torch.Tensor], torch.Tensor]

FP8 = {"fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}
WIDE = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp8_e4m3:plain": torch.float8_e4m3fn,
        "fp8_e5m2:plain": torch.float8_e5m2}  # fmt: skip


def plain(dtype: torch.dtype) -> Cast:
    """E4M3 by ml_dtypes: beyond its range is NaN, where torch now clips."""
    if dtype is not torch.float8_e4m3fn:
        return lambda x: x.to(dtype).double()
    as_e4m3 = lambda x: x.float().numpy().astype(ml_dtypes.float8_e4m3fn)  # noqa: E731
    return lambda x: torch.from_numpy(as_e4m3(x).astype(np.float64))


def scaled(dtype: torch.dtype, rows: bool) -> Cast:
    greatest = torch.finfo(dtype).max

    def cast(x: torch.Tensor) -> torch.Tensor:
        peak = x.abs().amax(dim=1, keepdim=True) if rows else x.abs().max()
        scale = torch.where(peak > 0, peak / greatest, 1)
        return (x / scale).to(dtype).double() * scale.double()

    return cast


def integers(rows: bool) -> Cast:
    def cast(x: torch.Tensor) -> torch.Tensor:
        peak = x.abs().amax(dim=1, keepdim=True) if rows else x.abs().max()
        scale = torch.where(peak > 0, peak / 127, 1)
        return (x / scale).round().clamp(-127, 127).double() * scale.double()

    return cast


def blocks(x: torch.Tensor, width: int) -> Iterator[tuple[int, np.ndarray]]:
    for start in range(0, x.shape[1], width):
        yield start, x[:, start : start + width].float().numpy()


def e2m1(values: np.ndarray) -> np.ndarray:
    return values.clip(-6, 6).astype(ml_dtypes.float4_e2m1fn).astype(np.float64)


def mxfp4(x: torch.Tensor) -> torch.Tensor:
    out = np.zeros(x.shape)
    for start, part in blocks(x, 32):
        peak = np.abs(part).max(axis=1, keepdims=True)
        with np.errstate(divide="ignore"):
            scale = np.where(peak > 0, 2.0 ** (np.floor(np.log2(peak)) - 2), 1)
        out[:, start : start + 32] = e2m1((part / scale).astype(np.float32)) * scale
    return torch.from_numpy(out)


def nvfp4(x: torch.Tensor) -> torch.Tensor:
    own = np.float32(float(x.abs().max()) / (6 * 448)) or np.float32(1)
    out = np.zeros(x.shape)
    for start, part in blocks(x, 16):
        peak = np.abs(part).max(axis=1, keepdims=True)
        codes = (peak / np.float32(6) / own).astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
        scale = codes * own
        y = np.divide(part, scale, out=np.zeros_like(part), where=scale > 0)
        out[:, start : start + 16] = e2m1(y) * scale.astype(np.float64)
    return torch.from_numpy(out)


ORACLES: dict[str, Cast] = {
    **{name: plain(dtype) for name, dtype in WIDE.items()},
    **{name: scaled(dtype, rows=False) for name, dtype in FP8.items()},
    **{f"{name}:row": scaled(dtype, rows=True) for name, dtype in FP8.items()},
    "int8": integers(rows=True), "int8:tensor": integers(rows=False),
    "mxfp4": mxfp4, "nvfp4": nvfp4,
}  # fmt: skip


def spread(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """Values of very different sizes: some overflow, some vanish, one row is zero."""
    made = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=made)
    x *= 10 ** torch.linspace(-9, 5.5, rows)[:, None]
    x[rows // 2] = 0
    return x


def expected(x: torch.Tensor, cast: Cast) -> Loss:
    q, exact = cast(x), x.double()
    over = ~torch.isfinite(q)
    d = torch.where(over, 0, q - exact)
    under = (q == 0) & (exact != 0)
    bulk = exact.abs() <= LIMIT
    return Loss(
        int(over.sum()), int(under.sum()), float((d**2).sum()), float((exact**2).sum()),
        float((d[bulk] ** 2).sum()), float((exact[bulk] ** 2).sum()), float(d.abs().max()),
    )  # fmt: skip


def stored(path: Path, x: torch.Tensor, rows: int | None = None) -> Subject:
    save_file({"x": x.contiguous()}, path)
    (ref,) = open_checkpoint(str(path)).tensors
    finite = torch.where(torch.isfinite(x), x, 0)
    count = rows or x.shape[0]
    return Subject(ref, count, x.numel() // count, float(finite.abs().max()), LIMIT)


def measured(subject: Subject, *names: str, jobs: int = 1) -> list[Loss]:
    (found,) = losses([subject], [target(n) for n in names], threads(jobs))
    return list(found)


def same(found: Loss, wanted: Loss) -> None:
    assert (found.overflow, found.underflow) == (wanted.overflow, wanted.underflow)
    assert found.error == pytest.approx(wanted.error, rel=1e-9, abs=0)
    assert found.signal == pytest.approx(wanted.signal, rel=1e-9)
    assert found.bulk_error == pytest.approx(wanted.bulk_error, rel=1e-9, abs=0)
    assert found.bulk_signal == pytest.approx(wanted.bulk_signal, rel=1e-9)
    assert found.worst == pytest.approx(wanted.worst, rel=1e-9)


def test_every_target_has_an_oracle() -> None:
    spellings = {f"{t.name}:{g}" for t in TARGETS.values() for g in t.grains}
    implied = {f"{t.name}:{t.grain}" for t in TARGETS.values()}
    assert {n if ":" in n else f"{n}:{target(n).grain}" for n in ORACLES} == spellings | implied


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ORACLES)
def test_a_cast_costs_what_really_casting_costs(
    name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    x = spread(40, 70)
    x = x.clamp(-65000, 65000).to(dtype) if dtype is torch.float16 else x.to(dtype)

    (found,) = measured(stored(tmp_path / "x.safetensors", x), name)

    same(found, expected(x.float(), ORACLES[name]))


@pytest.mark.parametrize("name", ["fp16", "bf16", "fp8_e4m3:plain"])
def test_ties_and_ends_of_the_range_are_rounded_as_the_type_does(name: str, tmp_path: Path) -> None:
    dtype = WIDE[name]
    info = torch.finfo(dtype)
    step = info.smallest_normal * info.eps
    edges = [info.max, info.max * (1 + info.eps / 4), info.max * (1 + info.eps)]
    ties = [1 + info.eps / 2, 1 + 1.5 * info.eps, step / 2, step * 0.51, step * 1.5, step * 2.5]
    x = torch.tensor([edges + ties + [-v for v in edges + ties]], dtype=torch.float64)
    x = x[torch.isfinite(x.float())][None].float()

    (found,) = measured(stored(tmp_path / "x.safetensors", x), name)

    same(found, expected(x, plain(dtype)))
    assert found.underflow == 2


def test_float64_is_rounded_once(tmp_path: Path) -> None:
    """Through float32 the value would become a tie, and round to the other side."""
    x = torch.tensor([[1 + 2**-11 + 2**-40, 1.0]], dtype=torch.float64)

    (found,) = measured(stored(tmp_path / "x.safetensors", x), "fp16")

    assert found.worst == pytest.approx(2**-11 - 2**-40, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_not_finite_counts_as_nothing(dtype: torch.dtype, tmp_path: Path) -> None:
    x = spread(8, 64, seed=3).clamp(-100, 100).to(dtype)
    spoiled = x.clone()
    x[1, 3] = x[5, 60] = 0
    spoiled[1, 3], spoiled[5, 60] = math.nan, math.inf
    names = list(ORACLES)

    found = measured(stored(tmp_path / "a.safetensors", spoiled), *names)

    assert found == measured(stored(tmp_path / "b.safetensors", x), *names)


@pytest.mark.parametrize("name", ["int8", "fp8_e4m3:row", "nvfp4", "mxfp4", "bf16"])
def test_rows_longer_than_a_piece_are_scaled_as_one(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "PIECE", 64)
    monkeypatch.setattr(measure, "_TASK", 256)
    x = spread(6, 200).clamp(-1e3, 1e3)
    x[2, 199] = 900.0

    (found,) = measured(stored(tmp_path / "x.safetensors", x), name)

    same(found, expected(x, ORACLES[name]))


def test_the_numbers_do_not_depend_on_the_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "PIECE", 128)
    monkeypatch.setattr(measure, "_TASK", 256)
    subject = stored(tmp_path / "x.safetensors", spread(64, 70))

    assert measured(subject, *ORACLES, jobs=1) == measured(subject, *ORACLES, jobs=3)


def test_zeros_lose_nothing_and_have_no_ratio(tmp_path: Path) -> None:
    for found in measured(stored(tmp_path / "x.safetensors", torch.zeros(4, 32)), *ORACLES):
        assert found == Loss()
        assert found.snr_db is None
        assert found.relative is None


def test_what_is_exact_has_an_infinite_ratio(tmp_path: Path) -> None:
    x = torch.randn(4, 32).bfloat16()

    (found,) = measured(stored(tmp_path / "x.safetensors", x), "bf16")

    assert found.snr_db == math.inf


@pytest.mark.parametrize(
    ("name", "rows", "columns", "wanted"),
    [
        ("fp16", 3, 40, 240), ("fp8_e4m3", 3, 40, 124), ("fp8_e4m3:row", 3, 40, 132),
        ("int8", 3, 40, 132), ("nvfp4", 3, 40, 60 + 9 + 4), ("mxfp4", 3, 40, 60 + 6),
    ],
)  # fmt: skip
def test_bytes_count_the_scales(name: str, rows: int, columns: int, wanted: int) -> None:
    assert target(name).nbytes(rows, columns) == wanted


@pytest.mark.parametrize("spelled", ["fp7", "FP16", "int8:block", "nvfp4:row", "", ":row"])
def test_a_type_that_there_is_not_is_refused_with_those_there_are(spelled: str) -> None:
    with pytest.raises(UsageError, match=r"there are .*"):
        target(spelled)


def test_one_great_element_does_not_hide_that_the_others_are_lost(tmp_path: Path) -> None:
    x = torch.randn(32, 64)
    x[3, 4] = 1e5

    whole, rows = measured(stored(tmp_path / "x.safetensors", x), "int8:tensor", "int8")

    assert whole.snr_db is not None
    assert whole.snr_db > 50
    assert whole.bulk_snr_db == 0
    assert rows.bulk_snr_db is not None
    assert 10 < rows.bulk_snr_db < 20
