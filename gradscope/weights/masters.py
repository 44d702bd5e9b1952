"""Whether the weights in full precision that an optimizer updates are those of the model.

Mixed precision trains float32 master weights and rounds them to the model's 16 bits after every
step, so each master, rounded, is some tensor of the model bit for bit. They are matched by content:
optimizers number their parameters in orders of their own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from gradscope.checkpoints.tensors import TensorRef
from gradscope.checkpoints.tiles import tiles
from gradscope.weights.result import Masters

Array = npt.NDArray[Any]
_WIDE = ("F32", "F64")


#: Of a tensor's elements in each 16-bit type that they are compared in.
Digests = Mapping[str, str]


def digests(refs: Sequence[TensorRef], own: Collection[str] | None = None) -> dict[str, Digests]:
    """What master weights and the model's 16-bit tensors of their sizes are compared by.

    By name, of those that are ``own`` (None: all). Raises InputError when a file became shorter.
    """
    masters, models = _sides(refs)
    types = {numel: {m.dtype for m in models if m.numel == numel} for numel in _sizes(masters)}
    mine = [ref for ref in (*models, *masters) if own is None or ref.name in own]
    return {
        ref.name: _digests(ref, {dtype: _ROUNDED[dtype] for dtype in types[ref.numel]})
        if ref.part == "master"
        else _digests(ref, {ref.dtype: _as_stored})
        for ref in mine
    }


def compared(refs: Sequence[TensorRef], found: Mapping[str, Digests]) -> Masters | None:
    """Look for each master weight among the model's 16-bit tensors; None where there is nothing."""
    masters, models = _sides(refs)
    if not masters:
        return None
    sizes = {ref.numel for ref in models}
    held = {(ref.numel, *item) for ref in models for item in found[ref.name].items()}
    both = [ref for ref in masters if ref.numel in sizes]
    astray = (
        ref for ref in both if held.isdisjoint((ref.numel, *i) for i in found[ref.name].items())
    )
    return Masters(len(both), tuple(ref.name for ref in astray))


def compared_names(refs: Sequence[TensorRef]) -> frozenset[str]:
    """The tensors whose digests it takes."""
    return frozenset(ref.name for side in _sides(refs) for ref in side)


def _sides(refs: Sequence[TensorRef]) -> tuple[list[TensorRef], list[TensorRef]]:
    """The master weights, and the tensors of the model that one of them may be."""
    masters = [r for r in refs if r.part == "master" and r.dtype in _WIDE and r.numel > 1]
    sizes = _sizes(masters)
    models = (r for r in refs if r.part == "model" and r.dtype in _ROUNDED) if sizes else ()
    return masters, [ref for ref in models if ref.numel in sizes]


def _sizes(refs: Iterable[TensorRef]) -> set[int]:
    return {ref.numel for ref in refs}


def _digests(ref: TensorRef, codes: Mapping[str, Callable[[Array], Array]]) -> Digests:
    """A digest of a tensor's elements in each coding, in one pass."""
    made = {name: hashlib.blake2b(digest_size=16) for name in codes}
    for piece in _pieces(ref):
        for name, coded in codes.items():
            made[name].update(np.ascontiguousarray(coded(piece)).data)
    return {name: digest.hexdigest() for name, digest in made.items()}


def _pieces(ref: TensorRef) -> Iterable[Array]:
    return (values for tile in tiles(ref) for _, values in tile.pieces())


def _as_stored(codes: Array) -> Array:
    return codes


def _to_bfloat16(values: Array) -> Array:
    """To nearest, ties to even; NaN stays NaN of one kind."""
    single = values.astype(np.float32, copy=False)
    bits = single.view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(single), np.uint16(0x7FC0), rounded)


def _to_float16(values: Array) -> Array:
    with np.errstate(over="ignore"):
        return values.astype(np.float16).view(np.uint16)


_ROUNDED: Mapping[str, Callable[[Array], Array]] = {"BF16": _to_bfloat16, "F16": _to_float16}
