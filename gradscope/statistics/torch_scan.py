"""One piece measured on a torch device: the numbers of ``scan``, as operations on whole pieces.

Everything that is an integer (counts, histograms, hashes, extremes) equals what the CPU kernels
give; float64 sums run in another order and agree to rounding. They run in the same order each
time, so a device repeats itself to the bit: rows are summed by reshaping, never by atomic adds.

The shapes depend on the tensor's shape alone, so that nothing waits for the device before the one
transfer of the results: no boolean indexing, and counting by ``scatter_add_``, because
``bincount`` asks for its greatest code first. A piece takes about 160 MB of the device's memory.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gradscope.checkpoints.tensors import TensorRef
from gradscope.checkpoints.tiles import PIECE
from gradscope.device import AUTO, CPU, has_float64, resolve
from gradscope.errors import UsageError
from gradscope.statistics import codings, kernels
from gradscope.statistics.kernels import BLOCK
from gradscope.statistics.layout import UnitLayout
from gradscope.statistics.scan import scan as cpu_scan
from gradscope.statistics.scan import scan_integers
from gradscope.statistics.tally import SHIFT, Piece, Scan, row_numel
from gradscope.statistics.unit_sums import UnitSums

Array = npt.NDArray[Any]

_FLOATS = {"F32": torch.float32, "F64": torch.float64}
_UNSIGNED = {torch.float32: np.uint32, torch.float64: np.uint64}
#: How each type that results have on the device is read on the host.
_HOST = {torch.float64: np.float64, torch.int64: np.int64, torch.int32: np.int32}


def scan_on(device: str) -> Scan:
    """The scan of a device: the compiled kernels on the CPU, torch on any other.

    ``auto`` takes an accelerator only if it computes in float64. Raises UsageError for a device
    that is absent or, if named explicitly, does not compute in float64.
    """
    found = resolve(device)
    if found.type == CPU:
        return cpu_scan
    if has_float64(found):
        return TorchScan(found)
    if device == AUTO:
        return cpu_scan
    raise UsageError(
        f"device {device!r} does not support float64, which moments and norms need; "
        f"use --device {CPU}"
    )


@dataclass(frozen=True, slots=True)
class TorchScan:
    """A ``Scan`` on a torch device that computes in float64."""

    device: torch.device | str

    def __call__(
        self,
        ref: TensorRef,
        first: int,
        stored: Array,
        table: Array | None,
        layout: UnitLayout | None = None,
    ) -> Piece:
        """Measure one piece; adds to ``table``."""
        if ref.dtype in codings.INTEGERS:
            # On the host: they are few in a checkpoint, and their few statistics cost less than
            # the way to the device, which for U16, U32 and U64 also lacks most operations.
            return scan_integers(ref, first, stored, table)
        assert table is not None
        if ref.dtype in codings.COMPLEX:
            # On the host: hypot differs by an ulp between libraries, and these magnitudes must be
            # the ones that are found again when single elements are read.
            stored = codings.magnitude(stored)
        coded = ref.dtype in codings.CODED
        measure = self._scan_codes if coded else self._scan_floats
        piece = measure(ref, first, stored, table, row_numel(ref, layout))
        if layout is None or layout.contiguous:
            return piece
        return replace(piece, units=self._units(ref, first, stored, layout))

    def _scan_codes(
        self, ref: TensorRef, first: int, stored: Array, table: Array, length: int
    ) -> Piece:
        device = torch.device(self.device)
        codes = _sent(stored, device).long() & (len(table) - 1)
        x = _values(ref.dtype, device)[codes]
        finite = torch.isfinite(x)
        squares, hashes = _rows(length, first, torch.where(finite, x, 0.0).double(), codes)
        blocks = _blocks(x, finite)
        histogram = _histogram(codes, torch.ones_like(codes, dtype=torch.int32), len(table))
        host = _fetched(squares, hashes, *blocks, histogram)
        _add(table, host.pop())
        return Piece(first // PIECE, None, (0, 0, 0, 0), 0, *_for_piece(np.uint32, *host))

    def _scan_floats(
        self, ref: TensorRef, first: int, stored: Array, table: Array, length: int
    ) -> Piece:
        kind = codings.MAGNITUDE.get(ref.dtype, ref.dtype)
        bits = _sent(stored, torch.device(self.device))
        x = bits.view(_FLOATS[kind])
        finite = torch.isfinite(x)
        zeroed = torch.where(finite, x, 0.0).double()
        codes = bits.long() if kind == "F64" else bits.long() & 0xFFFFFFFF
        squares, hashes = _rows(length, first, zeroed, codes)
        blocks = _blocks(x, finite)
        buckets = (codes >> SHIFT[kind]) & (len(table) - 1)
        host = _fetched(
            _moments(zeroed, finite), _counts(x), squares, hashes, *blocks,
            _union(torch.where(finite, bits, 0)), _histogram(buckets, finite.int(), len(table)),
        )  # fmt: skip
        moments, counts, *results, union, histogram = host
        _add(table, histogram)
        zero, nan, posinf, neginf = map(int, counts)
        unsigned = _UNSIGNED[x.dtype]
        return Piece(
            first // PIECE,
            moments.copy() if moments[0] else np.zeros(5),  # the mean of nothing came as NaN
            (zero, nan, posinf, neginf),
            int(union.view(unsigned)[0]),
            *_for_piece(unsigned, *results),
        )

    def _units(self, ref: TensorRef, first: int, stored: Array, layout: UnitLayout) -> UnitSums:
        device = torch.device(self.device)
        bits = _sent(stored, device)
        if ref.dtype in codings.CODED:
            values = _values(ref.dtype, device)
            codes = bits.long() & (len(values) - 1)
            x = values[codes]
        else:
            kind = codings.MAGNITUDE.get(ref.dtype, ref.dtype)
            codes = bits.long() if kind == "F64" else bits.long() & 0xFFFFFFFF
            x = bits.view(_FLOATS[kind])
        zeroed = torch.where(torch.isfinite(x), x, 0.0).double()
        mixed = _mixed(codes, _places(layout, first, codes))
        sums = (_unit_sums(part, first, layout) for part in (zeroed * zeroed, mixed))
        squares, hashes = _fetched(*sums)
        return UnitSums(layout.first_unit(first), squares.copy(), hashes.view(np.uint64).copy())


# -- there and back --------------------------------------------------------------------------------


def _sent(stored: Array, device: torch.device) -> Tensor:
    """The stored bits on the device, as signed integers (bytes excepted) of their width."""
    bits = stored if stored.itemsize == 1 else stored.view(f"i{stored.itemsize}")
    return torch.from_numpy(np.require(bits, requirements=["C", "A", "W"])).to(device)


def _fetched(*results: Tensor) -> list[Array]:
    """One-dimensional results of 4 or 8 bytes an element, in one transfer; wide types first."""
    words = [result.view(torch.int32) for result in results]
    host = torch.cat(words).cpu().numpy()
    parts = np.split(host, np.cumsum([len(word) for word in words])[:-1])
    return [part.view(_HOST[result.dtype]) for part, result in zip(parts, results, strict=True)]


def _add(table: Array, histogram: Array) -> None:
    table += histogram.view(np.uint32)


def _for_piece(
    unsigned: Any, squares: Array, hashes: Array, lows: Array, highs: Array, dirty: Array
) -> tuple[Array, Array, Array, Array, Array]:
    """Rows and blocks as ``Piece`` has them: copies, lest each keeps its whole transfer alive."""
    sign = kernels.ORDER64[0] if unsigned is np.uint64 else kernels.ORDER32[0]
    return (
        squares.copy(),
        hashes.view(np.uint64).copy(),
        lows.view(unsigned) ^ sign,
        highs.view(unsigned) ^ sign,
        dirty.astype(np.bool_),
    )


# -- what is measured ------------------------------------------------------------------------------


def _histogram(codes: Tensor, weights: Tensor, size: int) -> Tensor:
    """How often each code occurs, in the 32 bits that a piece cannot overflow."""
    return torch.zeros(size, dtype=torch.int32, device=codes.device).scatter_add_(0, codes, weights)


def _moments(zeroed: Tensor, finite: Tensor) -> Tensor:
    """[n, mean, M2, M3, M4] of the finite elements, in two passes.

    The mean is kept between the extremes, so that equal elements have no spread by rounding.
    """
    n = finite.sum()
    low = torch.where(finite, zeroed, math.inf).amin()
    high = torch.where(finite, zeroed, -math.inf).amax()
    mean = (zeroed.sum() / n).clamp(low, high)
    d = torch.where(finite, zeroed - mean, 0.0)
    square = d * d
    return torch.stack([n.double(), mean, square.sum(), (square * d).sum(), (square**2).sum()])


def _counts(x: Tensor) -> Tensor:
    """How many elements are zero, NaN, +Inf, -Inf."""
    tests = (x == 0, torch.isnan(x), x == math.inf, x == -math.inf)
    return torch.stack([test.sum() for test in tests])


def _union(bits: Tensor) -> Tensor:
    """All bit patterns or-ed by folding; the halves of an odd run share an element, harmlessly."""
    while len(bits) > 1:
        half = (len(bits) + 1) // 2
        bits = bits[:half] | bits[-half:]
    return bits


def _blocks(x: Tensor, finite: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Each block's least and greatest finite value, and whether it holds another (1 or 0).

    The extremes are signed integers that ascend with the values: those of ``kernels._extremes``
    but for the sign bit, since torch has no order on unsigned ones.
    """
    integer = torch.int64 if x.dtype == torch.float64 else torch.int32
    limits = torch.iinfo(integer)
    bits = x.view(integer)
    ordered = bits ^ ((bits >> (limits.bits - 1)) & limits.max)
    lows = _by_block(torch.where(finite, ordered, limits.max), limits.max).amin(1)
    highs = _by_block(torch.where(finite, ordered, limits.min), limits.min).amax(1)
    return lows, highs, _by_block((~finite).int(), 0).amax(1)


def _by_block(values: Tensor, fill: int) -> Tensor:
    """A run as rows of a block each, the last one filled up."""
    missing = -len(values) % BLOCK
    if missing:
        values = torch.cat([values, torch.full_like(values[:1], fill).expand(missing)])
    return values.view(-1, BLOCK)


def _rows(length: int, first: int, zeroed: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of squares and content hash of each row's share of the piece."""
    positions = torch.arange(len(codes), dtype=torch.int64, device=codes.device)
    mixed = _mixed(codes, (positions + first % length) % length)
    return _row_sums(zeroed * zeroed, first, length), _row_sums(mixed, first, length)


def _row_sums(values: Tensor, first: int, length: int) -> Tensor:
    """Add up what lies in one row: the rest of a row, whole rows, the start of one."""
    start = min(-first % length, len(values))
    stop = start + (len(values) - start) // length * length
    parts = [values[:start].view(1, -1)] if start else []
    parts += [values[start:stop].view(-1, length)] if start < stop else []
    parts += [values[stop:].view(1, -1)] if stop < len(values) else []
    return torch.cat([part.sum(1) for part in parts])


def _places(layout: UnitLayout, first: int, codes: Tensor) -> Tensor:
    """Where in its unit each element is."""
    flat = first + torch.arange(len(codes), dtype=torch.int64, device=codes.device)
    row = flat // (layout.width * layout.inner)
    return row % layout.depth * layout.inner + flat % layout.inner


def _unit_sums(values: Tensor, first: int, layout: UnitLayout) -> Tensor:
    """Add up what lies in one unit, for all units of the groups that the piece touches."""
    length = layout.width * layout.inner
    before = first % length
    filled = torch.nn.functional.pad(values, (before, -(before + len(values)) % length))
    lines = filled.view(-1, layout.width, layout.inner).sum(2)
    start = min(-(first // length) % layout.depth, len(lines))
    stop = start + (len(lines) - start) // layout.depth * layout.depth
    parts = (lines[:start], lines[start:stop], lines[stop:])
    shapes = ((1, -1), (-1, layout.depth), (1, -1))
    return torch.cat(
        [
            part.view(*shape, layout.width).sum(1).view(-1)
            for part, shape in zip(parts, shapes, strict=True)
            if len(part)
        ]
    )


def _mixed(codes: Tensor, places: Tensor) -> Tensor:
    """The term of each element, at a place in its row: ``kernels._hash`` times ``kernels._salt``.

    In int64, whose products and sums keep the same low 64 bits as those of uint64.
    """
    product = ((codes ^ _shifted(codes, 32)) + 1) * _keys(codes.device)[places % BLOCK]
    salt = (places // BLOCK + 1) * _signed(kernels._SALT)
    salt = (salt ^ _shifted(salt, 29)) | 1
    return (product ^ _shifted(product, 32)) * _signed(kernels._MIX) * salt


def _shifted(words: Tensor, by: int) -> Tensor:
    """A right shift that brings in zeros; that of a signed type brings in the sign."""
    return (words >> by) & ((1 << (64 - by)) - 1)


def _signed(word: np.uint64) -> int:
    return int(word.view(np.int64))


@cache
def _keys(device: torch.device) -> Tensor:
    return torch.from_numpy(kernels.HASH_KEYS[:BLOCK].view(np.int64)).to(device)


@cache
def _values(dtype: str, device: torch.device) -> Tensor:
    """The float32 value of each code of a type; all of them are exact."""
    return torch.from_numpy(codings.code_values(dtype).astype(np.float32)).to(device)
