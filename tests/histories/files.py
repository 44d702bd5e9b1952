"""Files that other tools write, made by hand."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np

from gradscope.histories.format import KEYS, write
from gradscope.histories.history import History


def crc32c(data: bytes) -> int:
    """Bit by bit, from the definition of CRC-32C."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 * (crc & 1))
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def varint(value: int) -> bytes:
    out = b""
    while value > 127:
        out, value = out + bytes([value & 127 | 128]), value >> 7
    return out + bytes([value])


def message(number: int, data: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(data)) + data


def double(number: int, value: float) -> bytes:
    return varint(number << 3 | 1) + struct.pack("<d", value)


def event(step: int, tag: str, value: float | np.ndarray[Any, Any]) -> bytes:
    """A scalar, or torch's histogram of an array."""
    if isinstance(value, np.ndarray):
        v = value.astype(np.float64)
        body = message(
            5,
            double(1, v.min())
            + double(2, v.max())
            + double(3, v.size)
            + double(4, v.sum())
            + double(5, (v * v).sum()),
        )
    else:
        body = varint(2 << 3 | 5) + struct.pack("<f", value)
    summary = message(1, message(1, tag.encode()) + body)
    return varint(2 << 3) + varint(step) + message(5, summary)


def tfrecords(events: list[bytes]) -> bytes:
    out = b""
    for data in events:
        head = struct.pack("<Q", len(data))
        out += head + struct.pack("<I", crc32c(head)) + data + struct.pack("<I", crc32c(data))
    return out


def native(path: Path, records: int = 6, layers: int = 3, first: int = 0, **more: Any) -> Path:
    """A small file of the native format."""
    rng = np.random.default_rng(first)
    arrays: dict[str, Any] = {
        "steps": np.arange(first, first + records),
        "layer/name": np.array([f"l{i}.weight" for i in range(layers)]),
        "layer/numel": np.full(layers, 10),
        "grad/l2": rng.random((records, layers), dtype=np.float32),
    } | more
    write(path, arrays, {"run_id": "test"})
    return path


RECORDS, LAYERS = 9, 3
SIZES = {
    "T": RECORDS,
    "L": LAYERS,
    "L+1": LAYERS + 1,
    "E": 4,
    "2": 2,
    "S": 3,
    "k": 5,
    "G": 2,
    "O": 2,
    "N": 6,
}
GIVEN: dict[str, np.ndarray[Any, Any]] = {
    "steps": np.arange(RECORDS) * 10,
    "layer/name": np.array(["a", "b", "c"]),
    "layer/kind": np.array(["conv", "norm", "other"]),
    "layer/order": np.arange(LAYERS),
    "layer/tied_to": np.array([-1, -1, 0]),
    "graph/edges": np.array([[-1, 0], [0, 1], [1, 2], [2, 3]]),
    "grad/sketch_index": np.array([0, 4, 8]),
    "unit/offset": np.array([0, 2, 4, 6]),
}


def every_key() -> dict[str, np.ndarray[Any, Any]]:
    """An array for each key of the format, by its own declaration."""
    rng = np.random.default_rng(7)
    arrays = {}
    for name, key in KEYS.items():
        shape = [SIZES[size] for size in key.shape]
        drawn = {
            "f": rng.random(shape, np.float32),
            "U": np.full(shape, "m"),
        }.get(key.kinds[0], rng.integers(0, 2, shape))
        arrays[name] = GIVEN.get(name, drawn)
    return arrays


def fields(history: History) -> dict[str, Any]:
    """Everything a history knows of a run, in a form that can be compared."""
    known = {
        name: getattr(history, name)
        for name in ("steps", "l2", "status", "edges", *(k.field for k in KEYS.values() if k.field))
    }
    assert history.sketches is not None
    assert history.exact is not None
    return known | {
        "sketches": history.sketches.values,
        "sketched": history.sketches.index,
        "cosine": history.exact.cosine,
        "lag": history.exact.lag,
    }
