"""Small safetensors checkpoints written byte by byte, and healthy models to spoil."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

DTYPES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "complex64": "C64", "bool": "BOOL",
    "int8": "I8", "int16": "I16", "int32": "I32", "int64": "I64",
    "uint8": "U8", "uint16": "U16", "uint32": "U32", "uint64": "U64",
}  # fmt: skip


class Codes(NamedTuple):
    """Stored codes of a type that NumPy does not have: its safetensors name and its codes.

    ``shape`` is that of the elements where they are not bytes.
    """

    dtype: str
    codes: Array
    shape: tuple[int, ...] | None = None


Tensor = Array | Codes
Tensors = Mapping[str, Tensor]


def bf16(values: Array) -> Codes:
    """Round to bfloat16, to nearest and ties to even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = bits + 0x7FFF + ((bits >> 16) & 1)
    return Codes("BF16", (rounded >> 16).astype(np.uint16))


def fp8(values: Array) -> Codes:
    """Round to float8 E4M3 by torch, which is no part of what is tested."""
    import torch

    cast = torch.from_numpy(np.ascontiguousarray(values, np.float32)).to(torch.float8_e4m3fn)
    return Codes("F8_E4M3", cast.view(torch.uint8).numpy())


def serialized(tensors: Iterable[tuple[str, Tensor]], metadata: Mapping[str, str] | None) -> bytes:
    """A safetensors file of some tensors in their order; a name may stand twice."""
    entries, data = [], b""
    for name, tensor in tensors:
        stored = tensor.codes if isinstance(tensor, Codes) else np.asarray(tensor)
        dtype = tensor.dtype if isinstance(tensor, Codes) else DTYPES[stored.dtype.name]
        raw = stored.tobytes()
        entry = {
            "dtype": dtype,
            "shape": (tensor.shape if isinstance(tensor, Codes) else None) or stored.shape,
            "data_offsets": [len(data), len(data) + len(raw)],
        }
        entries.append(f"{json.dumps(name)}:{json.dumps(entry)}")
        data += raw
    if metadata is not None:
        entries.insert(0, f'"__metadata__":{json.dumps(dict(metadata))}')
    header = ("{" + ",".join(entries) + "}").encode()
    return len(header).to_bytes(8, "little") + header + data


def write(path: Path, tensors: Tensors, **metadata: str) -> Path:
    """Write one safetensors file; returns its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(serialized(tensors.items(), metadata or None))
    return path


def write_sharded(folder: Path, tensors: Tensors, shards: int = 3) -> Path:
    """Write a folder of shards of about as many tensors each, with their index."""
    names = list(tensors)
    weight_map: dict[str, str] = {}
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        held = names[len(names) * number // shards : len(names) * (number + 1) // shards]
        write(folder / file, {name: tensors[name] for name in held}, format="pt")
        weight_map |= dict.fromkeys(held, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def gaussian(*shape: int, seed: int = 0, scale: float = 0.05) -> Array:
    """Gaussian float32 values, the same for the same arguments."""
    rng = np.random.default_rng([seed, *shape])
    return (rng.standard_normal(shape) * scale).astype(np.float32)


def transformer(layers: int = 4, width: int = 32, vocabulary: int = 256) -> dict[str, Array]:
    """A healthy model with the names of a Llama."""
    made = {"model.embed_tokens.weight": gaussian(vocabulary, width, seed=1)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        for place, part in enumerate(("q_proj", "k_proj", "v_proj", "o_proj")):
            seed = 10 * layer + place + 10
            made[f"{prefix}.self_attn.{part}.weight"] = gaussian(width, width, seed=seed)
        made[f"{prefix}.mlp.up_proj.weight"] = gaussian(4 * width, width, seed=10 * layer + 15)
        made[f"{prefix}.mlp.down_proj.weight"] = gaussian(width, 4 * width, seed=10 * layer + 16)
        made[f"{prefix}.input_layernorm.weight"] = 1 + gaussian(width, seed=10 * layer + 17)
    made["model.norm.weight"] = 1 + gaussian(width, seed=2)
    made["lm_head.weight"] = gaussian(vocabulary, width, seed=3)
    return made


def conv_net(blocks: int = 3, width: int = 16) -> dict[str, Array]:
    """A healthy model of convolutions and batch norms in an nn.Sequential, and a classifier."""
    made: dict[str, Array] = {}
    for block in range(blocks):
        incoming = 3 if block == 0 else width
        conv, norm = f"features.{3 * block}", f"features.{3 * block + 1}"
        made[f"{conv}.weight"] = gaussian(width, incoming, 3, 3, seed=block)
        made[f"{norm}.weight"] = 1 + gaussian(width, seed=10 + block)
        made[f"{norm}.bias"] = gaussian(width, seed=20 + block)
        made[f"{norm}.running_mean"] = gaussian(width, seed=30 + block)
        made[f"{norm}.running_var"] = 1 + np.abs(gaussian(width, seed=40 + block))
        made[f"{norm}.num_batches_tracked"] = np.array(1000)
    made["classifier.weight"] = gaussian(10, width, seed=50)
    made["classifier.bias"] = gaussian(10, seed=51)
    return made


def lora(
    layers: int = 4, rank: int = 8, width: int = 64, trained: int | None = None
) -> dict[str, Array]:
    """An adapter as PEFT saves it, for one module a layer; B is zero in all but ``trained``."""
    made: dict[str, Array] = {}
    for layer in range(layers):
        module = f"base_model.model.layers.{layer}.q_proj"
        made[f"{module}.lora_A.weight"] = gaussian(rank, width, seed=layer)
        b = gaussian(width, rank, seed=90 + layer)
        zero = trained is not None and layer >= trained
        made[f"{module}.lora_B.weight"] = np.zeros_like(b) if zero else b
    return made


def healthy() -> dict[str, dict[str, Array]]:
    """Both healthy models by name."""
    return {"transformer": transformer(), "conv_net": conv_net()}
