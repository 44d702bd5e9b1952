"""Make the checkpoints that the benchmarks read: Llama's names and shapes, Gaussian values.

Every value is drawn afresh, so no two rows or tensors are alike. NumPy only; chunks go straight to
the file, so the process stays below 150 MB. The same seed gives the same file.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

DATA = Path(__file__).resolve().parent / "data"

CHUNK = 1 << 22  # values drawn at once
SIGMA = 0.02

DType = Literal["BF16", "F32"]
WIDTH: dict[DType, int] = {"BF16": 2, "F32": 4}


class Shape(NamedTuple):
    """The sizes of a Llama-like model."""

    vocabulary: int
    hidden: int
    intermediate: int
    key_value: int
    layers: int


class Tensor(NamedTuple):
    name: str
    shape: tuple[int, ...]
    mean: float
    sigma: float

    @property
    def size(self) -> int:
        return math.prod(self.shape)


class Checkpoint(NamedTuple):
    name: str
    dtype: DType
    shape: Shape
    seed: int

    @property
    def path(self) -> Path:
        return DATA / f"{self.name}.safetensors"


BF16 = Checkpoint("llama-2gb-bf16", "BF16", Shape(32_000, 2048, 5632, 256, 20), seed=1)
F32 = Checkpoint("llama-1gb-f32", "F32", Shape(32_000, 1024, 2816, 256, 17), seed=2)
SMALL = Checkpoint("llama-1mb-bf16", "BF16", Shape(2000, 64, 176, 64, 4), seed=3)


def tensors(shape: Shape) -> Iterator[Tensor]:
    """List the tensors of a model in file order, with the distribution of each."""
    vocabulary, hidden, intermediate, key_value, layers = shape
    # The projections that add to the residual stream start smaller, as in GPT-2.
    residual = SIGMA / math.sqrt(2 * layers)
    yield Tensor("model.embed_tokens.weight", (vocabulary, hidden), 0, SIGMA)
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        yield Tensor(f"{prefix}.input_layernorm.weight", (hidden,), 1, 0.05)
        yield Tensor(f"{prefix}.self_attn.q_proj.weight", (hidden, hidden), 0, SIGMA)
        yield Tensor(f"{prefix}.self_attn.k_proj.weight", (key_value, hidden), 0, SIGMA)
        yield Tensor(f"{prefix}.self_attn.v_proj.weight", (key_value, hidden), 0, SIGMA)
        yield Tensor(f"{prefix}.self_attn.o_proj.weight", (hidden, hidden), 0, residual)
        yield Tensor(f"{prefix}.post_attention_layernorm.weight", (hidden,), 1, 0.05)
        yield Tensor(f"{prefix}.mlp.gate_proj.weight", (intermediate, hidden), 0, SIGMA)
        yield Tensor(f"{prefix}.mlp.up_proj.weight", (intermediate, hidden), 0, SIGMA)
        yield Tensor(f"{prefix}.mlp.down_proj.weight", (hidden, intermediate), 0, residual)
    yield Tensor("model.norm.weight", (hidden,), 1, 0.05)
    yield Tensor("lm_head.weight", (vocabulary, hidden), 0, SIGMA)


def header_of(checkpoint: Checkpoint) -> tuple[bytes, int]:
    """Return the safetensors header, its length in front, and the size of the data behind it."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors(checkpoint.shape):
        begin, end = end, end + tensor.size * WIDTH[checkpoint.dtype]
        entries[tensor.name] = {
            "dtype": checkpoint.dtype,
            "shape": tensor.shape,
            "data_offsets": [begin, end],
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, end


def to_bf16(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """Round to bfloat16 (nearest, ties to even) and return the bits."""
    bits = values.view(np.uint32)
    odd = (bits >> 16) & 1
    odd += 0x7FFF
    odd += bits
    odd >>= 16
    return odd.astype("<u2")


def chunks(checkpoint: Checkpoint) -> Iterator[bytes]:
    """Draw the data of every tensor, a chunk at a time."""
    random = np.random.Generator(np.random.SFC64(checkpoint.seed))
    buffer = np.empty(CHUNK, np.float32)
    for tensor in tensors(checkpoint.shape):
        for begin in range(0, tensor.size, CHUNK):
            values = buffer[: min(CHUNK, tensor.size - begin)]
            random.standard_normal(dtype=np.float32, out=values)
            values *= tensor.sigma
            values += tensor.mean
            stored = to_bf16(values) if checkpoint.dtype == "BF16" else values.astype("<f4")
            yield stored.tobytes()


def make(checkpoint: Checkpoint) -> Path:
    """Write the checkpoint unless it is there whole."""
    path = checkpoint.path
    header, data = header_of(checkpoint)
    if path.is_file() and path.stat().st_size == len(header) + data:
        print(f"present  {path.name}", file=sys.stderr)
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    with part.open("wb") as file:
        file.write(header)
        for chunk in chunks(checkpoint):
            file.write(chunk)
    part.replace(path)
    print(f"made     {path.name}  ({path.stat().st_size:,} bytes)", file=sys.stderr)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--small", action="store_true", help="only a file of 1 MB")
    for checkpoint in [SMALL] if parser.parse_args().small else [BF16, F32]:
        make(checkpoint)


if __name__ == "__main__":
    main()
