"""What llama.cpp calls the tensors of other checkpoints, by the table that its converter uses."""

from __future__ import annotations

from collections.abc import Callable

from gradscope.checkpoints.gguf import ARCHITECTURE_KEY
from gradscope.checkpoints.tensors import Checkpoint
from gradscope.quantization.layouts.ggml import library

_SUFFIXES = (".weight", ".bias")


def ggml_names(base: Checkpoint, new: Checkpoint) -> Callable[[str], str] | None:
    """From a tensor's name to that in a GGUF file; None where not just one of the two is such.

    Raises UsageError where the package with the table is not installed.
    """
    files = [c for c in (base, new) if ARCHITECTURE_KEY in c.metadata]
    if len(files) != 1:
        return None
    said = files[0].metadata
    name = said.get(ARCHITECTURE_KEY)
    blocks = said.get(f"{name}.block_count")
    gguf = library("names of tensors")
    arch = next((a for a, known in gguf.MODEL_ARCH_NAMES.items() if known == name), None)
    if arch is None or not isinstance(blocks, int) or not 0 <= blocks <= 10_000:
        return None
    table = gguf.get_tensor_name_map(arch, blocks)

    def named(tensor: str) -> str:
        return str(table.get_name(tensor, _SUFFIXES) or tensor)

    return named
