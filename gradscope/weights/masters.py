"""Whether the weights in full precision that an optimizer updates are those of the model.

Mixed precision trains float32 master weights and rounds them to the model's 16 bits after every
step, so each master, rounded, is some tensor of the model bit for bit. They are matched by content:
optimizers number their parameters in orders of their own.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from gradscope.checkpoints.tensors import TensorRef
from gradscope.checkpoints.tiles import tiles
from gradscope.weights.result import Masters

Array = npt.NDArray[Any]
_WIDE = ("F32", "F64")


def compare_masters(refs: Sequence[TensorRef]) -> Masters | None:
    """Look for each master weight among the model's 16-bit tensors; None where there is nothing.

    Reads both. Raises InputError when a file became shorter meanwhile.
    """
    masters = [r for r in refs if r.part == "master" and r.dtype in _WIDE and r.numel > 1]
    sizes = {ref.numel for ref in masters}
    models: dict[tuple[int, str], set[bytes]] = defaultdict(set)
    for ref in refs if sizes else ():
        if ref.part == "model" and ref.dtype in _ROUNDED and ref.numel in sizes:
            models[ref.numel, ref.dtype].add(_digests(ref, {"": _as_stored})[""])
    found = {ref.name: _is_among(ref, models) for ref in masters}
    if not found:
        return None
    compared = {name: same for name, same in found.items() if same is not None}
    return Masters(len(compared), tuple(name for name, same in compared.items() if not same))


def _is_among(master: TensorRef, models: Mapping[tuple[int, str], set[bytes]]) -> bool | None:
    """Whether a master is a model tensor, rounded; None where none has its size."""
    dtypes = [dtype for numel, dtype in models if numel == master.numel]
    if not dtypes:
        return None
    digests = _digests(master, {dtype: _ROUNDED[dtype] for dtype in dtypes})
    return any(digest in models[master.numel, dtype] for dtype, digest in digests.items())


def _digests(ref: TensorRef, codes: Mapping[str, Callable[[Array], Array]]) -> dict[str, bytes]:
    """A digest of a tensor's elements in each coding, in one pass."""
    digests = {name: hashlib.blake2b(digest_size=16) for name in codes}
    for piece in _pieces(ref):
        for name, coded in codes.items():
            digests[name].update(np.ascontiguousarray(coded(piece)).data)
    return {name: digest.digest() for name, digest in digests.items()}


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
