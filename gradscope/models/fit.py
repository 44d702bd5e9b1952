"""A state dict fitted into an architecture: which stored tensor becomes which of the module's."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gradscope.checkpoints.tensors import Checkpoint, TensorRef
from gradscope.checkpoints.tiles import tiles
from gradscope.errors import InputError
from gradscope.text import escaped, listed, quoted


def fit(module: nn.Module, checkpoint: Checkpoint, arch: str) -> tuple[str, ...]:
    """Load a checkpoint's tensors into the module that ``arch`` built; notes about it.

    Raises InputError where names or shapes do not match, and for quantized weights.
    """
    tied = checkpoint.metadata.get("tied")
    by_name = {ref.name: ref for ref in checkpoint.tensors}
    same = {**tied} if isinstance(tied, Mapping) else {}
    by_name |= {other: by_name[kept] for other, kept in same.items() if kept in by_name}
    _refuse_quantised(module, checkpoint)
    wanted = _matched(module, {n: r.shape for n, r in by_name.items()}, checkpoint.path, arch)
    state = {name: _tensor(by_name[stored]) for name, stored in wanted.items()}
    return (*_left_out(by_name, wanted), *_assign(module, state))


def _refuse_quantised(module: nn.Module, checkpoint: Checkpoint) -> None:
    """Raise InputError for a tensor of the architecture whose elements could not be read."""
    names = tuple(module.state_dict())
    for item in checkpoint.skipped:
        if item.subject.endswith(names) and not item.deliberate:
            raise InputError(
                checkpoint.path,
                "unsupported",
                f"tensor {quoted(item.subject)} cannot be read: {item.reason}; load the model "
                "where it was made and save its state dict in float32",
            )


def _left_out(stored: Iterable[str], wanted: Mapping[str, str]) -> tuple[str, ...]:
    """A note of what lies beside the model, outside the prefix that its names share."""
    taken = set(wanted.values())
    left = [name for name in stored if name not in taken]
    return (f"not loaded: {_counted('outside the model', left)}",) if left else ()


def fit_tensors(
    module: nn.Module, tensors: Mapping[str, Tensor], path: str, arch: str
) -> tuple[str, ...]:
    """The same for tensors that are in memory already."""
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    wanted = _matched(module, shapes, path, arch)
    state = {name: tensors[stored] for name, stored in wanted.items()}
    return (*_left_out(tensors, wanted), *_assign(module, state))


def _assign(module: nn.Module, state: Mapping[str, Tensor]) -> tuple[str, ...]:
    module.load_state_dict(state, strict=False)
    halves = {str(t.dtype).removeprefix("torch.") for t in state.values()} & {
        "float16", "bfloat16", "float64",
    }  # fmt: skip
    return (f"{', '.join(sorted(halves))} weights are read as float32",) if halves else ()


_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


def _tensor(ref: TensorRef) -> Tensor:
    dtype = _DTYPES.get(ref.dtype)
    if dtype is None:
        raise InputError(
            ref.file,
            "unsupported",
            f"tensor {quoted(ref.name)} is stored as {ref.dtype}: quantized weights cannot be "
            "differentiated; load the model where it was made and save it in float32",
        )
    found = torch.empty(ref.shape, dtype=dtype)
    flat = found.view(-1).view(torch.uint8).numpy()
    at = 0
    for tile in tiles(ref):
        for _, piece in tile.pieces():
            raw = np.ascontiguousarray(piece).view(np.uint8)
            flat[at : at + raw.size] = raw
            at += raw.size
    return found


def _matched(
    module: nn.Module, stored: Mapping[str, tuple[int, ...]], path: str, arch: str
) -> dict[str, str]:
    """The stored tensor of each of the module's. Raises InputError where they do not fit."""
    expected = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    prefix = _prefix(expected, stored)
    pairs = {name: prefix + name for name in expected if prefix + name in stored}
    missing = [n for n in expected if n not in pairs and not n.endswith("num_batches_tracked")]
    taken = set(pairs.values())
    unexpected = [n for n in stored if n not in taken and n.startswith(prefix)]
    reshaped = [n for n, s in pairs.items() if expected[n] != stored[s]]
    parts = [
        _counted("missing from the file", missing),
        _counted("not in the architecture", unexpected),
        _counted("of another shape", [
            f"{n} (file {list(stored[pairs[n]])}, architecture {list(expected[n])})"
            for n in reshaped
        ]),
    ]  # fmt: skip
    if any(parts):
        hint = _classes_hint(reshaped, missing or unexpected, {n: stored[pairs[n]] for n in pairs})
        message = f"its tensors do not fit --arch {arch}: {'; '.join(p for p in parts if p)}{hint}"
        raise InputError(path, "malformed", message)
    return pairs


def _counted(what: str, names: Sequence[str]) -> str:
    return f"{len(names)} {what}: {listed(map(escaped, names), len(names), 5)}" if names else ""


def _classes_hint(
    reshaped: list[str], others: list[str], stored: Mapping[str, tuple[int, ...]]
) -> str:
    last = list(stored)[-2:]
    if others or not reshaped or not set(reshaped) <= set(last):
        return ""
    return f"; only the last layer differs: try the option num_classes={stored[reshaped[0]][0]}"


def _prefix(expected: Mapping[str, Any], stored: Mapping[str, Any]) -> str:
    """What wrappers (DataParallel, compile, Lightning, …) put before every name."""
    first = next(iter(expected), "")
    found = {s[: -len(first)] for s in stored if s.endswith("." + first)}
    # A wrapper holds most of the file; else a part of another model is taken for the whole.
    candidates = ["", *(p for p in found if 2 * sum(s.startswith(p) for s in stored) > len(stored))]
    return max(candidates, key=lambda p: (sum(p + n in stored for n in expected), -len(p)))
