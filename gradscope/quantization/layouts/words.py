"""Integers packed into 32-bit words: GPTQ, AWQ, compressed-tensors, MLX."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from gradscope.checkpoints.tensors import TensorRef
from gradscope.checkpoints.tiles import PIECE, read_range
from gradscope.quantization.decoding import (
    Dequantized,
    Factor,
    Grid,
    Lines,
    Stacked,
    Words,
    Zeros,
    transposed,
)
from gradscope.quantization.grids import blocks
from gradscope.quantization.site import Site, activations, companions, misshapen, missing
from gradscope.quantization.weights import Companion, Fault, Kind, QuantizedWeight

#: The order in which AWQ puts eight rows into a word, from the lowest nibble on.
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_LIKELY_BITS = (4, 8, 2, 3, 5, 6, 7, 1)


def _unsigned(bits: int) -> tuple[float, ...]:
    return tuple(map(float, range(1 << bits)))


def _signed(bits: int) -> tuple[float, ...]:
    return tuple(map(float, range(-(1 << bits) // 2, (1 << bits) // 2)))


# -- GPTQ and AWQ ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Parts:
    """``qweight`` and what lies beside it."""

    scales: TensorRef | None
    zeros: TensorRef | None
    index: TensorRef | None


def gptq_or_awq(site: Site) -> QuantizedWeight | None:
    """``qweight`` words: GPTQ packs along the inputs, AWQ along the outputs."""
    ref = site.ref
    if site.leaf != "qweight" or ref.dtype != "I32" or len(ref.shape) != 2 or ref.numel == 0:
        return None
    parts = _Parts(site.beside("scales"), site.beside("qzeros"), site.beside("g_idx"))
    return (_awq if _is_awq(site, parts) else _gptq)(site, parts)


def _is_awq(site: Site, parts: _Parts) -> bool:
    width = site.ref.shape[1]
    for ref, gptq, awq in ((parts.scales, width, 8 * width), (parts.zeros, -1, width)):
        if ref is not None and len(ref.shape) == 2 and ref.shape[1] in (gptq, awq):
            return ref.shape[1] == awq
    return parts.index is None and site.config is not None and site.config.method == "awq"


def _gptq(site: Site, parts: _Parts) -> QuantizedWeight:
    ref = site.ref
    words, out = ref.shape
    bits = _gptq_bits(site, parts)
    columns = words * 32 // bits
    second = site.config is not None and site.config.second_format
    codes = Words(transposed(ref), bits, columns)
    zeros = None if parts.zeros is None else Zeros(parts.zeros, bits, 0 if second else 1)
    return _grouped(site, parts, "gptq", codes, (out, columns), bits, zeros)


def _gptq_bits(site: Site, parts: _Parts) -> int:
    """Bits of a code, as the shapes show them."""
    words, out = site.ref.shape
    found = []
    if parts.index is not None and parts.index.numel:
        found.append(words * 32 / parts.index.numel)
    if parts.zeros is not None and len(parts.zeros.shape) == 2:
        found.append(parts.zeros.shape[1] * 32 / out)
    if site.config is not None and site.config.bits:
        found.append(site.config.bits)
    return int(next((bits for bits in found if bits in (2, 3, 4, 5, 6, 8)), 4))


def _awq(site: Site, parts: _Parts) -> QuantizedWeight:
    columns, words = site.ref.shape
    codes = Stacked(transposed(site.ref), AWQ_ORDER)
    zeros = None if parts.zeros is None else Zeros(parts.zeros, 4, order=AWQ_ORDER)
    return _grouped(site, parts, "awq", codes, (words * 8, columns), 4, zeros)


def _grouped(
    site: Site,
    parts: _Parts,
    scheme: str,
    codes: Words | Stacked,
    shape: tuple[int, int],
    bits: int,
    zeros: Zeros | None,
) -> QuantizedWeight:
    columns, scales = shape[1], parts.scales
    groups = _groups(site, parts, columns)
    width = -(-columns // groups)
    faults = tuple(_group_faults(site, parts, shape, bits, groups))
    decoding = None
    if scales is not None and not faults:
        decoding = Dequantized(
            codes,
            _unsigned(bits),
            columns,
            width,
            (Factor(transposed(scales), Grid(1), groups),),
            zeros,
            index=_order(parts.index),
        )
    return QuantizedWeight(
        f"{site.module}weight",
        scheme,
        shape,
        site.ref,
        (
            *companions(Kind.SCALE, scales),
            *companions(Kind.ANY, parts.zeros),
            *((Companion(parts.index, Kind.INDEX, groups),) if parts.index is not None else ()),
        ),
        faults,
        decoding,
        bits=bits,
        group=width if groups > 1 else None,
    )


def _order(index: TensorRef | None) -> TensorRef | None:
    """The group of each input; None where it was never set, which loaders take for the usual."""
    if index is None or index.numel > PIECE or index.dtype not in ("I32", "I64"):
        return index
    return index if read_range(index, 0, index.numel).any() else None


def _groups(site: Site, parts: _Parts, columns: int) -> int:
    """How many groups of inputs there are: as configured, or as a tensor's lines divide them."""
    group = site.config.group if site.config is not None else None
    lines = [r.shape[0] for r in (parts.scales, parts.zeros) if r is not None and r.shape]
    wanted = [-(-columns // group)] if group else []
    found = [n for n in (*wanted, *lines) if n and (n in lines or not lines)]
    even = [n for n in found if columns % n == 0]
    return next(iter((*even, *found)), 1)


def _group_faults(
    site: Site, parts: _Parts, shape: tuple[int, int], bits: int, groups: int
) -> Iterator[Fault]:
    out, columns = shape
    scales, zeros, index = parts.scales, parts.zeros, parts.index
    if scales is None:
        yield from missing(site, "scales")
    elif scales.shape != (groups, out):
        yield misshapen(scales, shape, f"{[groups, out]} is expected")
    if zeros is None:
        yield from missing(site, "qzeros")
    elif zeros.shape != (groups, -(-out * bits // 32)):
        yield misshapen(zeros, shape, f"{[groups, -(-out * bits // 32)]} is expected")
    if index is not None and index.shape != (columns,):
        yield misshapen(index, shape, f"one for each of {columns:,} inputs")


# -- compressed-tensors ---------------------------------------------------------------------------


def compressed(site: Site) -> QuantizedWeight | None:
    """``X_packed`` words along each row, offset by half the range; ``X_shape`` has the length."""
    ref, stem = site.ref, site.leaf.removesuffix("_packed")
    if ref.dtype != "I32" or stem == site.leaf or len(ref.shape) < 2 or ref.numel == 0:
        return None
    scale = site.beside(f"{stem}_scale")
    zero, index = site.beside(f"{stem}_zero_point"), site.beside(f"{stem}_g_idx")
    told = site.beside(f"{stem}_shape")
    bits, columns, dense = _measures(site, scale, _values(told))
    shape = (*ref.shape[:-1], columns)
    found = None if scale is None else blocks(shape, scale.shape)
    rows = math.prod(shape[:-1])
    faults = (
        *(missing(site, f"{stem}_scale") if scale is None else ()),
        *(_told_faults(told, shape) if told is not None else ()),
        *(
            (misshapen(scale, shape, "one for all, one a row, or one a group of a row"),)
            if scale is not None and found is None
            else ()
        ),
        *(_zero_faults(zero, shape, bits, found.groups) if zero and found else ()),
    )
    decoding = None
    if scale is not None and found is not None and not faults:
        packed = zero is not None and zero.dtype == "I32"
        flat = replace(ref, shape=(rows, ref.shape[-1])) if ref.strides is None else ref
        decoding = Dequantized(
            Words(flat, bits, columns, dense),
            _unsigned(bits) if packed else _signed(bits),
            found.columns,
            found.width,
            (Factor(scale, found.grid, found.groups),),
            None if zero is None else _zeros(zero, bits, dense, found.grid, found.groups),
            index=index,
        )
    return QuantizedWeight(
        site.module + stem,
        f"int{bits}",
        shape,
        ref,
        (
            *companions(Kind.SCALE, scale),
            *companions(Kind.ANY, zero, told),
            *((Companion(index, Kind.INDEX, found.groups if found else 0),) if index else ()),
            *activations(site),
        ),
        faults,
        decoding,
        bits=bits,
        group=found.width if found is not None and found.groups > 1 else None,
    )


def _zeros(zero: TensorRef, bits: int, dense: bool, grid: Grid, groups: int) -> Lines:
    """Packed along the rows, or one a byte."""
    if zero.dtype == "I32":
        return Zeros(transposed(zero), bits, dense=dense)
    return Factor(zero, grid, groups)


def _zero_faults(
    zero: TensorRef, shape: tuple[int, ...], bits: int, groups: int
) -> Iterator[Fault]:
    rows = shape[-2]
    words = {-(-rows * bits // 32), -(-rows // (32 // bits))}
    fits = (
        zero.shape[-1:] == (groups,)
        and zero.shape[-2:-1]
        and (zero.shape[-2] in words if zero.dtype == "I32" else zero.shape[-2] in (rows, 1))
    )
    if not fits and zero.numel != 1:
        yield misshapen(zero, shape, f"one for each row and each of {groups:,} groups")


def _told_faults(told: TensorRef, shape: tuple[int, ...]) -> Iterator[Fault]:
    values = _values(told)
    if values is not None and values != shape:
        yield Fault(
            "shape",
            told.name,
            told.name.rpartition(".")[2],
            f"says {list(values)}, which the packed words of {list(shape)} do not hold",
        )


def _values(ref: TensorRef | None) -> tuple[int, ...] | None:
    """The numbers of a small tensor."""
    if ref is None or not 1 <= ref.numel <= 8 or ref.dtype not in ("I64", "I32"):
        return None
    return tuple(map(int, read_range(ref, 0, ref.numel)))


def _measures(
    site: Site, scale: TensorRef | None, told: tuple[int, ...] | None
) -> tuple[int, int, bool]:
    """Bits of a code, columns, and whether codes may lie across two words."""
    words = site.ref.shape[-1]
    config = site.config
    configured = config.bits if config is not None and config.bits and config.bits <= 8 else None
    columns = told[-1] if told and told[-1] > 0 else None
    if columns is None and config is not None and config.group and scale is not None:
        columns = scale.shape[-1] * config.group
    for bits in (*((configured,) if configured else ()), *_LIKELY_BITS):
        if columns is None:
            return bits, words * (32 // bits), False
        for dense in (True, False):
            if words == (-(-columns * bits // 32) if dense else -(-columns // (32 // bits))):
                return bits, columns, dense
    return 4, words * 8, True


# -- MLX ------------------------------------------------------------------------------------------


def mlx(site: Site) -> QuantizedWeight | None:
    """``weight`` words with ``scales`` and ``biases`` per group: code * scale + bias."""
    ref, scales, biases = site.ref, site.beside("scales"), site.beside("biases")
    if ref.dtype != "U32" or site.leaf != "weight" or len(ref.shape) < 2 or ref.numel == 0:
        return None
    if scales is None and biases is None:
        return None
    grid = scales if scales is not None else biases
    assert grid is not None
    floating = scales is not None and scales.dtype == "U8"
    bits, group = _microscaled(ref, grid) if floating else _affine(site, grid)
    columns = ref.shape[-1] * 32 // bits
    shape = (*ref.shape[:-1], columns)
    found = blocks(shape, grid.shape, width=group)
    faults = (
        *(missing(site, "scales") if scales is None else ()),
        *(missing(site, "biases") if biases is None and not floating else ()),
        *((misshapen(grid, shape, f"one for each {group} elements"),) if found is None else ()),
        *(
            (misshapen(biases, shape, f"scales have {list(grid.shape)}"),)
            if biases is not None and biases.shape != grid.shape
            else ()
        ),
    )
    decoding = None
    if found is not None and not faults:
        stored = replace(grid, dtype="F8_E4M3" if group == 16 else "F8_E8M0") if floating else grid
        flat = replace(ref, shape=(math.prod(ref.shape[:-1]), ref.shape[-1]))
        decoding = Dequantized(
            Words(flat if ref.strides is None else ref, bits, columns),
            {4: "F4", 8: "F8_E4M3"}[bits] if floating else _unsigned(bits),
            found.columns,
            found.width,
            (Factor(stored, found.grid, found.groups),),
            shifts=None if biases is None else Factor(biases, found.grid, found.groups),
        )
    return QuantizedWeight(
        ref.name,
        f"mlx {'fp' if floating else 'int'}{bits}",
        shape,
        ref,
        companions(Kind.ANY if floating else Kind.SIGNED, scales) + companions(Kind.SIGNED, biases),
        faults,
        decoding,
        bits=bits,
        group=group,
    )


def _microscaled(ref: TensorRef, scales: TensorRef) -> tuple[int, int]:
    """MXFP8, NVFP4 or MXFP4, by the number of scales a word."""
    words, groups = ref.shape[-1], scales.shape[-1]
    return (8, 32) if words == groups * 8 else (4, 16) if words == groups * 2 else (4, 32)


def _affine(site: Site, grid: TensorRef) -> tuple[int, int]:
    """Bits and group size that the words and groups of a row allow; the configuration's first."""
    total, groups = site.ref.shape[-1] * 32, max(grid.shape[-1], 1) if grid.shape else 1
    configured = site.config.group if site.config is not None else None
    for size in (*((configured,) if configured else ()), 64, 32, 128):
        bits = total / (groups * size)
        if bits in (2, 3, 4, 5, 6, 8):
            return int(bits), size
    return (site.config.bits if site.config is not None else None) or 4, configured or 64
