"""4-bit floats (E2M1) and integers packed two a byte, with scales per 16, 32 or 128 elements."""

from __future__ import annotations

from collections.abc import Iterator

from gradscope.checkpoints.tensors import TensorRef
from gradscope.quantization.decoding import Dequantized, Factor, Nibbles, Packing, Stacked
from gradscope.quantization.grids import Blocks, blocks
from gradscope.quantization.scales import Second, second_scale, weight_scale
from gradscope.quantization.site import (
    Site,
    activations,
    companions,
    exponents,
    misshapen,
    missing,
)
from gradscope.quantization.weights import Fault, Kind, QuantizedWeight

_FLOATS = ("F16", "BF16", "F32")
#: int4 in two's complement.
_SIGNED = tuple(float(n) for n in (*range(8), *range(-8, 0)))


def mxfp4_blocks(site: Site) -> QuantizedWeight | None:
    """gpt-oss: ``X_blocks`` [experts, rows, blocks, 16], a power of two a block in ``X_scales``."""
    ref, stem = site.ref, site.leaf.removesuffix("_blocks")
    if ref.dtype != "U8" or stem == site.leaf or len(ref.shape) < 3 or ref.numel == 0:
        return None
    scale = site.beside(f"{stem}_scales")
    shape = (*ref.shape[:-2], ref.shape[-2] * ref.shape[-1] * 2)
    faults = [*(missing(site, f"{stem}_scales") if scale is None else ())]
    if scale is not None and scale.shape != ref.shape[:-1]:
        faults.append(misshapen(scale, ref.shape, "one for each block"))
    decoding = None
    if scale is not None and not faults:
        found = blocks(shape, scale.shape, width=2 * ref.shape[-1])
        decoding = _floats(Nibbles(ref), exponents(scale), found)
    return QuantizedWeight(
        site.module + stem,
        "mxfp4",
        shape,
        ref,
        companions(Kind.SCALE, None if scale is None else exponents(scale)),
        tuple(faults),
        decoding,
        bits=4,
        group=2 * ref.shape[-1],
    )


def packed(site: Site) -> QuantizedWeight | None:
    """NVFP4 and MXFP4 of compressed-tensors and ModelOpt, and ModelOpt's int4."""
    ref = site.ref
    if ref.dtype != "U8" or len(ref.shape) < 2 or ref.numel == 0 or ref.shape[-1] == 1:
        return None
    named = site.leaf.endswith("_packed")
    scale, second = weight_scale(site), second_scale(site)
    if scale is None and second is None and not named:
        return None
    if scale is not None and scale.dtype in _FLOATS and not named:
        return _int4(site, scale, second)
    return fp4(site, scale, second, required=True)


def fp4(
    site: Site,
    scale: TensorRef | None,
    second: Second | None,
    *,
    required: bool,
    name: str | None = None,
    understood: bool = True,
) -> QuantizedWeight:
    """E2M1 codes: NVFP4 (E4M3 per 16 and a global scale) or MXFP4 (a power of two per 32)."""
    ref, stem = site.ref, site.leaf.removesuffix("_packed")
    shape = (*ref.shape[:-1], ref.shape[-1] * 2)
    powers = scale is not None and scale.dtype in ("U8", "F8_E8M0") and second is None
    swizzled = site.beside("comfy_quant") is not None or not understood
    scale = exponents(scale) if scale is not None and powers else scale
    width = 32 if powers else 16
    found = None if scale is None else blocks(shape, scale.shape, width=width)
    factor = None if second is None else second.factor(shape)
    faults = tuple(
        _faults(site, stem, shape, scale, found or swizzled, second, factor, powers or not required)
    )
    decoding = None
    if scale is not None and found is not None and not swizzled and not faults:
        decoding = _floats(Nibbles(ref), scale, found, *(() if factor is None else (factor,)))
    kind = "mxfp4" if powers else "nvfp4" if second or scale is not None else "fp4"
    return QuantizedWeight(
        name or site.module + stem,
        kind,
        shape,
        ref,
        (
            *companions(Kind.SCALE, scale),
            *companions(Kind.GLOBAL, None if second is None else second.ref),
            *activations(site),
        ),
        faults,
        decoding,
        bits=4,
        group=width if found is not None else None,
    )


def _faults(
    site: Site,
    stem: str,
    shape: tuple[int, ...],
    scale: TensorRef | None,
    fits: object,
    second: Second | None,
    factor: Factor | None,
    alone: bool,
) -> Iterator[Fault]:
    if scale is None:
        yield from missing(site, f"{stem}_scale")
    elif not fits:
        wanted = "one power of two for each 32" if scale.dtype == "F8_E8M0" else "one for each 16"
        yield misshapen(scale, shape, f"{wanted} elements of a row")
    if second is None and scale is not None and not alone:
        wanted = f"{stem}_global_scale" if site.leaf.endswith("_packed") else f"{stem}_scale_2"
        yield from missing(site, wanted)
    if second is not None and factor is None:
        yield misshapen(second.ref, shape, "one for the tensor, or one for each expert")


def _floats(
    codes: Packing, scale: TensorRef, found: Blocks | None, *factors: Factor
) -> Dequantized | None:
    if found is None:
        return None
    own = Factor(scale, found.grid, found.groups)
    return Dequantized(codes, "F4", found.columns, found.width, (own, *factors))


def _int4(site: Site, scale: TensorRef, second: Second | None) -> QuantizedWeight | None:
    """ModelOpt's int4: byte [r, c] holds rows 2r and 2r + 1, the first in the lower half."""
    ref = site.ref
    shape = (2 * ref.shape[0], *ref.shape[1:])
    if len(shape) != 2 or len(scale.shape) != 2 or scale.shape[0] != shape[0]:
        return None
    found = blocks(shape, scale.shape)
    factor = None if second is None else second.factor(shape)
    own = None if found is None else Factor(scale, found.grid, found.groups)
    return QuantizedWeight(
        ref.name,
        "int4",
        shape,
        ref,
        (
            *companions(Kind.SCALE, scale),
            *companions(Kind.GLOBAL, None if second is None else second.ref),
            *companions(Kind.SIGNED, site.beside("pre_quant_scale")),
            *activations(site),
        ),
        () if found is not None else (misshapen(scale, shape, "one a group of a row"),),
        # A second scale here is that of the activations' type; its part in the weight is not known.
        Dequantized(Stacked(ref, (0, 1)), _SIGNED, found.columns, found.width, (own,))
        if found is not None and own is not None and factor is None
        else None,
        bits=4,
        group=None if found is None else found.width,
    )
