"""Blocks of ggml's types in GGUF files; what they stand for is computed by llama.cpp's package."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from gradscope.checkpoints.ggml_types import BLOCKS_KEY, BY_NAME, BlockType
from gradscope.checkpoints.tensors import TensorRef
from gradscope.checkpoints.tiles import read_range
from gradscope.errors import InputError, UsageError
from gradscope.quantization.site import Site
from gradscope.quantization.weights import QuantizedWeight
from gradscope.text import quoted

INSTALL = "pip install 'gradscope-diagnostics[gguf]'"


def blocks(site: Site) -> QuantizedWeight | None:
    """A tensor of a GGUF file that lies in blocks."""
    types = site.metadata.get(BLOCKS_KEY)
    name = types.get(site.ref.name) if isinstance(types, dict) else None
    if name is None:
        return None
    block, ref = BY_NAME[name], site.ref
    shape = (*ref.shape[:-1], ref.shape[-1] // block.nbytes * block.elements)
    return QuantizedWeight(
        ref.name,
        f"gguf {name}",
        shape,
        ref,
        decoding=BlockValues(ref, block),
        bits=block.bits,
        group=block.shared or None,
    )


@dataclass(frozen=True, slots=True)
class BlockValues:
    """The values of a tensor in blocks: a ``Decoding``."""

    ref: TensorRef
    block: BlockType

    @property
    def nbytes(self) -> int:
        """Bytes of the blocks."""
        return self.ref.nbytes

    @property
    def refs(self) -> tuple[TensorRef, ...]:
        """The tensor that the values depend on."""
        return (self.ref,)

    def read(self, start: int, stop: int) -> npt.NDArray[np.float32]:
        """Float32 values ``start`` to ``stop`` in row-major order."""
        many, size = self.block.elements, self.block.nbytes
        first, last = start // many, -(-stop // many)
        stored = read_range(self.ref, first * size, last * size).reshape(-1, size)
        values = _decoded(self.ref, stored, self.block.name).reshape(-1)
        return np.asarray(values[start - first * many : stop - first * many], np.float32)


def _decoded(ref: TensorRef, stored: npt.NDArray[Any], name: str) -> npt.NDArray[Any]:
    gguf = library(f"blocks of {name}")
    try:
        with np.errstate(all="ignore"):
            found: npt.NDArray[Any] = gguf.quants.dequantize(
                stored, gguf.GGMLQuantizationType[name]
            )
    except (KeyError, NotImplementedError):
        message = f"tensor {quoted(ref.name)}: blocks of {name} are not decoded by the package gguf"
        raise InputError(ref.file, "unsupported", f"{message} that is installed") from None
    return found


def library(what: str) -> Any:
    """The package gguf. Raises UsageError where it is not installed, saying what needs it."""
    try:
        import gguf
    except ImportError:
        raise UsageError(f"{what} in a GGUF file need the package gguf: {INSTALL}") from None
    return gguf
