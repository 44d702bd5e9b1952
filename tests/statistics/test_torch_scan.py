"""The torch scan against the compiled kernels, on every dtype, with torch on the CPU."""

from __future__ import annotations

import math
import pickle
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from gradscope.checkpoints.tensors import DTYPE_BITS, TensorRef
from gradscope.checkpoints.tiles import PIECE, STORED, Tile
from gradscope.errors import UsageError
from gradscope.statistics import codings, profile, threads, torch_scan
from gradscope.statistics.kernels import BLOCK
from gradscope.statistics.records import Statistics, TensorProfile
from gradscope.statistics.scan import scan as cpu_scan
from gradscope.statistics.tally import Piece, Tally, tally
from gradscope.statistics.torch_scan import TorchScan, scan_on

Array = npt.NDArray[Any]

TORCH = TorchScan("cpu")
DTYPES = tuple(DTYPE_BITS)
FLOATS = tuple(d for d in DTYPES if d not in codings.INTEGERS)
SHAPES: tuple[tuple[int, ...], ...] = (
    (),
    (1,),
    (5,),
    (BLOCK + 1,),
    (1, 300),
    (40_000, 7),  # rows within blocks, the last of a piece shared with the next
    (3, 5, BLOCK),  # rows that are whole blocks
    (2, PIECE),  # rows that are whole pieces
    (3, 100_003),  # rows longer than a block, cut by pieces
    (2, 2 * PIECE + 77),  # rows longer than a piece
    (PIECE + 9,),
)

SPECIAL32 = np.array(
    [0x7FC00000, 0xFFC00001, 0x7F800001, 0x7F800000, 0xFF800000, 0, 0x80000000, 1, 0x807FFFFF],
    np.uint32,
).view(np.float32)
SPECIAL64 = np.array(
    [
        0x7FF8000000000000,
        0xFFF8000000000001,
        0x7FF0000000000001,
        0x7FF0000000000000,
        0xFFF0000000000000,
        0,
        0x8000000000000000,
        1,
        0x800FFFFFFFFFFFFF,
    ],
    np.uint64,
).view(np.float64)


# -- tensors in files ------------------------------------------------------------------------------


def write_tensor(path: Path, dtype: str, shape: tuple[int, ...], codes: Array) -> TensorRef:
    """A raw file of codes (or values) and the ref of the tensor they make."""
    bits = DTYPE_BITS[dtype]
    if bits < 8:
        each = np.unpackbits(codes.astype(np.uint8)[:, None], axis=1, bitorder="little")
        raw = np.packbits(each[:, :bits], bitorder="little").tobytes()
    else:
        raw = codes.astype(STORED[dtype], copy=False).tobytes()
    path.write_bytes(raw)
    return TensorRef(path.name, dtype, shape, str(path), offset=0)


def stored_tensor(folder: Path, dtype: str, shape: tuple[int, ...], salt: int = 0) -> TensorRef:
    """A tensor of arbitrary values with a few special ones in some of its blocks."""
    seed = zlib.crc32(f"{dtype}{shape}{salt}".encode())
    values = arbitrary(dtype, math.prod(shape), np.random.default_rng(seed))
    name = f"{dtype}-{'x'.join(map(str, shape))}-{salt}"
    return write_tensor(folder / name, dtype, shape, values)


def arbitrary(dtype: str, n: int, random: np.random.Generator) -> Array:
    if dtype in codings.COMPLEX:
        part = STORED[dtype].type(0).real.dtype
        special = SPECIAL32 if part == np.float32 else SPECIAL64
        pairs = with_specials(random.normal(size=2 * n).astype(part), special, random)
        return pairs.view(STORED[dtype])
    if dtype in ("F32", "F64"):
        special = SPECIAL32 if dtype == "F32" else SPECIAL64
        return with_specials(random.normal(0.01, 0.1, n).astype(STORED[dtype]), special, random)
    bits = DTYPE_BITS[dtype]
    codes = random.integers(0, 1 << bits, n, dtype=np.uint64)
    return codes.astype(f"u{max(bits // 8, 1)}").view(STORED[dtype])


def with_specials(values: Array, special: Array, random: np.random.Generator) -> Array:
    """Special values in the last third, so that there are clean blocks and dirty ones."""
    tail = values[len(values) * 2 // 3 :]
    at = random.integers(0, max(len(tail), 1), len(tail) // 1000 + 1)
    if len(tail):
        tail[at] = random.choice(special, len(at))
    return values


# -- what agreeing means ---------------------------------------------------------------------------


def assert_pieces_agree(ours: Piece, theirs: Piece) -> None:
    """All integers equal, sums to rounding."""
    for name in ("index", "counts", "union", "least", "greatest"):
        assert getattr(ours, name) == getattr(theirs, name), name
    for name in ("hashes", "lows", "highs", "dirty"):
        a, b = getattr(ours, name), getattr(theirs, name)
        assert (a is None) == (b is None)
        if b is not None:
            assert a.dtype == b.dtype, name
            np.testing.assert_array_equal(a, b, err_msg=name)
    if theirs.squares is not None:
        assert ours.squares is not None
        np.testing.assert_allclose(ours.squares, theirs.squares, rtol=1e-12)
    if theirs.moments is not None:
        assert ours.moments is not None
        assert_moments_agree(ours.moments, theirs.moments)


def assert_moments_agree(ours: Array, theirs: Array) -> None:
    """To 1e-12 of the sums of magnitudes: a mean or third moment near zero has cancelled."""
    n, mean, m2, _, m4 = map(float, theirs)
    assert ours[0] == n
    if n:
        scale = np.array([math.hypot(mean, math.sqrt(m2 / n)), m2, math.sqrt(m2 * m4), m4])
        assert (np.abs(ours[1:] - theirs[1:]) <= 1e-12 * scale).all(), (ours, theirs)
    else:
        assert not ours.any()


ROUNDED = ("mean", "std", "rms", "l2_norm", "skewness", "kurtosis", "negentropy_bits")
ROUNDED_NORMS = ("norm_min", "norm_median", "norm_max", "reference")


def assert_profiles_agree(ours: TensorProfile, theirs: TensorProfile) -> None:
    """The same to the bit, but for what comes of float64 sums."""
    assert repr(without_sums(ours)) == repr(without_sums(theirs))  # in repr NaN equals NaN
    assert_statistics_agree(ours.statistics, theirs.statistics)
    if theirs.units is not None:
        for name in ROUNDED_NORMS:
            expected = pytest.approx(getattr(theirs.units, name), rel=1e-12)
            assert getattr(ours.units, name) == expected, name


def assert_statistics_agree(ours: Statistics, theirs: Statistics) -> None:
    tail = (theirs.kurtosis or 0.0) + 4
    scale = {"mean": theirs.rms or 0.0, "skewness": tail, "kurtosis": tail, "negentropy_bits": 1.0}
    for name in ROUNDED:
        a, b = getattr(ours, name), getattr(theirs, name)
        assert (a is None) == (b is None), name
        if b is not None:
            assert a == pytest.approx(b, rel=1e-12, abs=1e-12 * scale.get(name, 0.0)), name


def without_sums(found: TensorProfile) -> TensorProfile:
    no_norms: dict[str, Any] = dict.fromkeys(ROUNDED_NORMS, 0.0)
    no_sums: dict[str, Any] = dict.fromkeys(ROUNDED)
    units = found.units and replace(found.units, **no_norms)
    statistics = replace(found.statistics, **no_sums)
    return replace(found, statistics=statistics, units=units)


def tallies(ref: TensorRef) -> tuple[Tally, Tally]:
    whole = Tile(ref, 0, ref.numel)
    return tally(whole, TORCH), tally(whole, cpu_scan)


# -- the tests -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_pieces_and_histograms_agree(dtype: str, tmp_path: Path) -> None:
    for shape in SHAPES:
        ours, theirs = tallies(stored_tensor(tmp_path, dtype, shape))
        assert (ours.table is None) == (theirs.table is None)
        if ours.table is not None:
            np.testing.assert_array_equal(ours.table.codes, theirs.table.codes)
            np.testing.assert_array_equal(ours.table.counts, theirs.table.counts)
        for a, b in zip(ours.pieces, theirs.pieces, strict=True):
            assert_pieces_agree(a, b)


@pytest.mark.parametrize("dtype", DTYPES)
def test_profiles_agree(dtype: str, tmp_path: Path) -> None:
    refs = [stored_tensor(tmp_path, dtype, shape) for shape in SHAPES]
    for ours, theirs in zip(profile(refs, scan=TORCH).tensors, profile(refs).tensors, strict=True):
        assert_profiles_agree(ours, theirs)


@pytest.mark.parametrize("dtype", FLOATS)
def test_neither_tiles_nor_threads_change_a_bit(dtype: str, tmp_path: Path) -> None:
    ref = stored_tensor(tmp_path, dtype, (3, PIECE + 12_345))
    once = profile([ref], scan=TORCH, engine=threads(1))
    tiled = profile([ref], scan=TORCH, engine=threads(3), tile_elements=PIECE)
    assert repr(once.tensors) == repr(tiled.tensors)


@pytest.mark.parametrize("dtype", ["F32", "F64"])
@pytest.mark.parametrize(
    "fill", [math.nan, math.inf, -math.inf, 0.0, -0.0, 0.5, 2.0**-149, 2.0**-1074]
)
def test_one_value_everywhere(dtype: str, fill: float, tmp_path: Path) -> None:
    values = np.full(2 * BLOCK + 3, fill).astype(STORED[dtype])
    ref = write_tensor(tmp_path / "t", dtype, (len(values),), values)
    ours, theirs = tallies(ref)
    assert_pieces_agree(ours.pieces[0], theirs.pieces[0])
    assert_profiles_agree(profile([ref], scan=TORCH).tensors[0], profile([ref]).tensors[0])


def test_equal_elements_have_no_spread(tmp_path: Path) -> None:
    ref = write_tensor(tmp_path / "t", "F64", (70_001,), np.full(70_001, 0.1))
    found = profile([ref], scan=TORCH).tensors[0].statistics
    assert (found.mean, found.std, found.kurtosis) == (0.1, 0.0, None)


def test_any_float32_bits(tmp_path: Path) -> None:
    bits = np.random.default_rng(5).integers(0, 1 << 32, PIECE + 99, dtype=np.uint32)
    ref = write_tensor(tmp_path / "t", "F32", (3, len(bits) // 3), bits.view(np.float32))
    ours, theirs = tallies(ref)
    for a, b in zip(ours.pieces, theirs.pieces, strict=True):
        assert_pieces_agree(a, b)
    assert_profiles_agree(profile([ref], scan=TORCH).tensors[0], profile([ref]).tensors[0])


@pytest.mark.parametrize(("mask", "payload"), [(0xFFFF0000, "BF16"), (0xFFFFE000, "F16")])
def test_a_narrow_payload_is_seen(mask: int, payload: str, tmp_path: Path) -> None:
    values = np.random.default_rng(2).normal(size=9001).astype(np.float32)
    narrow = (values.view(np.uint32) & np.uint32(mask)).view(np.float32)
    found = profile([write_tensor(tmp_path / "t", "F32", (9001,), narrow)], scan=TORCH)
    numerics = found.tensors[0].numerics
    assert numerics is not None
    assert numerics.payload == payload


def test_repeated_rows_and_equal_tensors_are_seen(tmp_path: Path) -> None:
    values = np.random.default_rng(3).normal(size=(50, 9001)).astype(np.float32)
    values[17] = values[4]
    values[31] = values[4, ::-1]  # the same values in another order
    refs = [write_tensor(tmp_path / n, "F32", values.shape, values.reshape(-1)) for n in "ab"]
    a, b = profile(refs, scan=TORCH).tensors
    assert a.units is not None
    assert a.units.duplicates == ((4, 17),)
    assert a.content_hash == b.content_hash


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F64", "C64"])
def test_strided_and_big_endian_tensors(dtype: str, tmp_path: Path) -> None:
    rows, columns = 301, 77
    stored = stored_tensor(tmp_path, dtype, (rows, columns))
    transposed = replace(stored, shape=(columns, rows), strides=(1, columns))
    start = replace(stored, shape=(rows - 1,), strides=(1,))  # read-only memory, no copy made
    swapped = replace(stored, big_endian=True)
    for ref in (transposed, start) if dtype == "C64" else (transposed, start, swapped):
        if ref is swapped and dtype != "BF16":
            continue  # swapped float bits are any exponent: their sums overflow float64
        assert_profiles_agree(profile([ref], scan=TORCH).tensors[0], profile([ref]).tensors[0])


def test_a_piece_does_not_hold_its_transfer(tmp_path: Path) -> None:
    ref = stored_tensor(tmp_path, "F64", (3, 100))
    for piece in tally(Tile(ref, 0, ref.numel), TORCH).pieces:
        for name in ("moments", "squares", "hashes", "lows", "highs", "dirty"):
            array = getattr(piece, name)
            assert array.base is None or array.base.nbytes <= 64, name


def test_the_scan_can_be_sent_to_another_process() -> None:
    assert pickle.loads(pickle.dumps(TORCH)) == TORCH


# -- which scan a device gets ----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cpu", "auto"])
def test_without_an_accelerator_the_compiled_kernels_do_the_work(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert scan_on(name) is cpu_scan


@pytest.mark.parametrize("name", ["cuda:99", "meta", "hpu"])
def test_an_absent_device_is_never_replaced_by_the_kernels(name: str) -> None:
    with pytest.raises(UsageError, match="Available here: cpu"):
        scan_on(name)


def test_a_device_without_float64_is_refused_by_name_and_passed_over_by_auto(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch_scan, "resolve", lambda _: torch.device("mps"))
    monkeypatch.setattr(torch_scan, "has_float64", lambda _: False)
    assert scan_on("auto") is cpu_scan
    with pytest.raises(UsageError, match="does not support float64"):
        scan_on("mps")


def test_any_other_device_gets_the_torch_scan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_scan, "resolve", lambda _: torch.device("xpu:1"))
    monkeypatch.setattr(torch_scan, "has_float64", lambda _: True)
    assert scan_on("xpu:1") == TorchScan(torch.device("xpu:1"))
