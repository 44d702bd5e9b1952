"""One function a layout: from a tensor that may hold codes to the weight, or None.

Listed in the order in which they are asked; the first that knows a tensor takes it.
"""

from __future__ import annotations

from collections.abc import Callable

from gradscope.quantization.layouts import (
    bitsandbytes,
    elements,
    ggml,
    nibbles,
    torchao,
    words,
)
from gradscope.quantization.site import Site
from gradscope.quantization.weights import QuantizedWeight

LAYOUTS: tuple[Callable[[Site], QuantizedWeight | None], ...] = (
    ggml.blocks,
    bitsandbytes.four_bits,
    bitsandbytes.int8,
    torchao.tensors,
    words.gptq_or_awq,
    words.compressed,
    words.mlx,
    nibbles.mxfp4_blocks,
    nibbles.packed,
    elements.scaled,
)
