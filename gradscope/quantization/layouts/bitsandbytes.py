"""bitsandbytes: int8 rows with an absolute maximum each, and 4-bit blocks of a flat weight."""

from __future__ import annotations

import math
from collections.abc import Mapping

from gradscope.checkpoints.tensors import TensorRef
from gradscope.checkpoints.tiles import read_range
from gradscope.containers.strict_json import MalformedError, parse
from gradscope.quantization.decoding import (
    Dequantized,
    Factor,
    Grid,
    Lines,
    Nested,
    Nibbles,
    Plain,
)
from gradscope.quantization.site import Site, companions, misshapen, missing
from gradscope.quantization.weights import Fault, Kind, QuantizedWeight

_STATES = (".quant_state.bitsandbytes__nf4", ".quant_state.bitsandbytes__fp4")
_CAP = 65_536


def int8(site: Site) -> QuantizedWeight | None:
    """LLM.int8(): row-wise absolute maxima in ``SCB``; a code is a 127th of its row's."""
    ref, maxima = site.ref, site.beside("SCB")
    if ref.dtype != "I8" or site.leaf != "weight" or len(ref.shape) != 2 or maxima is None:
        return None
    fits = maxima.numel == ref.shape[0]
    wanted = f"one for each of the {ref.shape[0]:,} rows"
    return QuantizedWeight(
        ref.name,
        "bitsandbytes int8",
        ref.shape,
        ref,
        companions(Kind.SCALE, maxima),
        () if fits else (misshapen(maxima, ref.shape, wanted),),
        Dequantized(
            Plain(ref),
            "I8",
            ref.shape[1],
            ref.shape[1],
            (Factor(maxima, Grid(1), 1, unit=1 / 127),),
        ),
        bits=8,
    )


def four_bits(site: Site) -> QuantizedWeight | None:
    """QLoRA: nf4 or fp4 codes, two a byte, the first in the upper half; ``absmax`` per block."""
    ref = site.ref
    absmax, table, state = site.after(".absmax"), site.after(".quant_map"), site.after(*_STATES)
    flat = site.leaf == "weight" and ref.shape[1:] == (1,) and ref.numel >= 32
    if ref.dtype != "U8" or not (absmax or table or state or flat):
        return None
    said, unreadable = _document(state)
    faults = [
        *(missing(site, "weight.absmax") if absmax is None else ()),
        *(missing(site, "weight.quant_map") if table is None else ()),
        *(missing(site, "weight.quant_state") if state is None else ()),
        *unreadable,
    ]
    shape = _shape(said, ref)
    block, kind = said.get("blocksize"), said.get("quant_type", "4-bit")
    maxima, outer, wrong = _maxima(site, absmax, said, math.prod(shape))
    if state is not None and not unreadable:
        faults += wrong
        if -(-math.prod(shape) // 2) != ref.numel:
            faults.append(misshapen(ref, shape, "its quant_state says so"))
    if table is not None and table.numel != 16:
        faults.append(misshapen(table, shape, "a table has 16 values"))
    sound = not faults and maxima is not None and table is not None and isinstance(block, int)
    return QuantizedWeight(
        ref.name,
        f"bitsandbytes {kind}",
        shape,
        ref,
        (
            *companions(Kind.ANY if outer else Kind.SCALE, absmax),
            *companions(Kind.SIGNED, table, site.after(".nested_quant_map")),
            *companions(Kind.SCALE, site.after(".nested_absmax")),
            *companions(Kind.ANY, state),
        ),
        tuple(faults),
        Dequantized(Nibbles(ref, high_first=True), table, block, block, (maxima,))
        if sound and table is not None and maxima is not None and isinstance(block, int)
        else None,
        bits=4,
    )


def _document(state: TensorRef | None) -> tuple[Mapping[str, object], list[Fault]]:
    """The quant_state, a JSON object in bytes."""
    if state is None:
        return {}, []
    try:
        if state.numel > _CAP:
            raise MalformedError("it is too large")
        said = parse(bytes(read_range(state, 0, state.numel)), state.name, non_finite=True)
        if isinstance(said, dict):
            return said, []
        raise MalformedError("it is not a JSON object")
    except MalformedError as error:
        return {}, [Fault("shape", state.name, "quant_state", f"cannot be read: {error}")]


def _shape(said: Mapping[str, object], ref: TensorRef) -> tuple[int, ...]:
    shape = said.get("shape")
    if isinstance(shape, list) and shape and all(isinstance(n, int) and n > 0 for n in shape):
        return tuple(shape)
    return (ref.numel * 2, 1)


def _maxima(
    site: Site, absmax: TensorRef | None, said: Mapping[str, object], numel: int
) -> tuple[Lines | None, bool, list[Fault]]:
    """The maxima of the blocks, whether they are codes themselves, and what is wrong."""
    block = said.get("blocksize")
    nested_in = said.get("nested_blocksize")
    codes = absmax is not None and absmax.dtype == "U8"
    if absmax is None or not isinstance(block, int) or block < 1:
        return None, codes or nested_in is not None, []
    blocks = -(-numel // block)
    wrong = (
        []
        if absmax.numel == blocks
        else [misshapen(absmax, (numel,), f"{blocks:,} blocks of {block} have one each")]
    )
    if not codes and nested_in is None:
        return Factor(absmax, Grid(1), 1), False, wrong
    table, outer = site.after(".nested_quant_map"), site.after(".nested_absmax")
    wrong += missing(site, "weight.nested_quant_map") if table is None else ()
    wrong += missing(site, "weight.nested_absmax") if outer is None else ()
    offset = said.get("nested_offset")
    size = nested_in if isinstance(nested_in, int) and nested_in > 0 else 256
    if not isinstance(offset, int | float):
        wrong += missing(site, "weight.quant_state's nested_offset")
    if outer is not None and outer.numel != -(-blocks // size):
        wrong.append(misshapen(outer, (numel,), f"one for {size} blocks"))
    if table is None or outer is None or not isinstance(offset, int | float):
        return None, True, wrong
    return Nested(absmax, table, outer, size, float(offset)), True, wrong
