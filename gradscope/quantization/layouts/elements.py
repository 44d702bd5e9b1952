"""Codes that are elements: 8-bit floats and integers, and 4- and 6-bit floats of their own type."""

from __future__ import annotations

from collections.abc import Iterator

from gradscope.checkpoints.tensors import TensorRef
from gradscope.quantization.decoding import Dequantized, Factor, Plain
from gradscope.quantization.grids import Blocks, blocks
from gradscope.quantization.scales import owns_names, second_scale, weight_scale
from gradscope.quantization.site import (
    Site,
    activations,
    companions,
    exponents,
    misshapen,
    missing,
)
from gradscope.quantization.weights import Companion, Fault, Kind, QuantizedWeight
from gradscope.statistics.dtypes import is_narrow

#: What shows that a weight was quantised, its scale aside.
_TRACES = ("input_scale", "scale_input", "weight_format", "weight_zero_point", "comfy_quant")


def is_codes(ref: TensorRef) -> bool:
    """Whether a tensor's elements could be codes of a weight's."""
    return len(ref.shape) >= 2 and ref.numel > 0 and (is_narrow(ref.dtype) or ref.dtype == "I8")


def scaled(site: Site) -> QuantizedWeight | None:
    """8-bit weights with a scale for the tensor, each row, group or block; microscaled floats."""
    if not is_codes(site.ref) or site.ref.dtype == "F8_E8M0":
        return None
    scale = weight_scale(site) or _quanto(site)
    if scale is None:
        traces = owns_names(site) and site.beside(*_TRACES) is not None
        return _without(site) if traces else None
    return with_scale(site, scale, site.beside("weight_zero_point"), site.beside("weight_g_idx"))


def _quanto(site: Site) -> TensorRef | None:
    """quanto keeps ``weight._data`` and ``weight._scale``."""
    return site.beside("_scale") if site.leaf == "_data" else None


def _without(site: Site) -> QuantizedWeight:
    wanted = "scale_weight" if site.beside("scale_input") is not None else "weight_scale"
    wanted = "SCB" if site.beside("weight_format") is not None else wanted
    return QuantizedWeight(
        site.ref.name,
        scheme(site.ref, None),
        site.ref.shape,
        site.ref,
        activations(site),
        tuple(missing(site, wanted)),
        bits=8,
    )


def scheme(ref: TensorRef, scale: TensorRef | None) -> str:
    """The common name of a layout."""
    if scale is not None and scale.dtype in ("U8", "F8_E8M0") and is_narrow(ref.dtype):
        return f"mx{ref.dtype.lower().replace('f8_', 'fp8 ').replace('f6_', 'fp6 ')}".replace(
            "mxf4", "mxfp4"
        )
    if ref.dtype == "F4":
        return "nvfp4"
    return "int8" if ref.dtype == "I8" else f"fp8 {ref.dtype[3:].lower()}"


def with_scale(
    site: Site,
    scale: TensorRef,
    zero: TensorRef | None = None,
    index: TensorRef | None = None,
    name: str | None = None,
) -> QuantizedWeight:
    """A weight of element codes with this grid of scales."""
    ref = site.ref
    powers = scale.dtype in ("U8", "F8_E8M0") and is_narrow(ref.dtype)
    scale = exponents(scale) if powers else scale
    found = _blocks(site, scale, powers)
    over = _second(site) if ref.dtype == "F4" else ()
    faults = tuple(_faults(site, scale, found, zero, powers))
    decoding = None
    if found is not None and not faults:
        groups = found.groups
        decoding = Dequantized(
            Plain(ref),
            ref.dtype,
            found.columns,
            found.width,
            (Factor(scale, found.grid, groups), *over),
            None if zero is None else Factor(zero, found.grid, groups),
            index=index,
        )
    grouped = found is not None and found.groups > 1
    return QuantizedWeight(
        name or ref.name,
        scheme(ref, scale),
        ref.shape,
        ref,
        (
            *companions(Kind.SCALE, scale),
            *companions(Kind.ANY, zero),
            *(Companion(f.ref, Kind.GLOBAL) for f in over),
            *((Companion(index, Kind.INDEX, found.groups if found else 0),) if index else ()),
            *activations(site),
        ),
        faults,
        decoding,
        bits={"F4": 4}.get(ref.dtype, 8),
        group=found.width if grouped and found is not None and found.height == 1 else None,
    )


def _blocks(site: Site, scale: TensorRef, powers: bool) -> Blocks | None:
    shape, config = site.ref.shape, site.config
    if powers:
        return blocks(shape, scale.shape, width=32)
    if site.ref.dtype == "F4":
        return blocks(shape, scale.shape, width=16)
    a_row = scale.shape[-1:] == (1,) and scale.numel == shape[0] != 1
    if config is not None and config.block and scale.numel > 1 and not a_row:
        return blocks(shape, scale.shape, block=config.block)
    return blocks(shape, scale.shape)


def _second(site: Site) -> tuple[Factor, ...]:
    found = second_scale(site)
    return () if found is None else tuple(f for f in (found.factor(site.ref.shape),) if f)


def _faults(
    site: Site, scale: TensorRef, found: Blocks | None, zero: TensorRef | None, powers: bool
) -> Iterator[Fault]:
    if found is None:
        config = site.config
        block = config.block if config is not None else None
        wanted = (
            "one power of two for each 32 elements of a row"
            if powers
            else f"blocks of {block[0]} × {block[1]}, says {config.source}"
            if block and config is not None
            else "one for all, one a row, or a grid of equal blocks"
        )
        yield misshapen(scale, site.ref.shape, wanted)
    if zero is not None and zero.numel != scale.numel:
        yield misshapen(zero, site.ref.shape, f"{scale.name} has {list(scale.shape)}")
