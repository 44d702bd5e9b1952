"""Quantised weights of which headers alone tell type and shape: the blocks of GGUF files."""

from __future__ import annotations

from gradscope.checkpoints.ggml_types import BLOCKS_KEY
from gradscope.checkpoints.tensors import Checkpoint
from gradscope.quantization.weights import QuantizedWeight


def told_by_headers(checkpoint: Checkpoint) -> dict[str, QuantizedWeight]:
    """Those by the names of their codes; nothing is read."""
    if BLOCKS_KEY not in checkpoint.metadata:
        return {}
    from gradscope.quantization.layouts.ggml import blocks
    from gradscope.quantization.site import Site

    sites = (Site(ref, {}, checkpoint.metadata) for ref in checkpoint.tensors)
    return {site.ref.name: weight for site in sites if (weight := blocks(site)) is not None}
