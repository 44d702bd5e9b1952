"""A state dict fitted into an architecture: which stored tensor becomes which of the module's."""

from __future__ import annotations

import re
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from gradscope.checkpoints.statedict import below
from gradscope.checkpoints.tensors import Checkpoint, TensorRef
from gradscope.checkpoints.tiles import tiles
from gradscope.checkpoints.training import is_average
from gradscope.errors import InputError
from gradscope.text import escaped, listed, quoted


def fit(
    module: nn.Module, checkpoint: Checkpoint, arch: str, prefix: str | None = None
) -> tuple[str, ...]:
    """Load a checkpoint's tensors into the module that ``arch`` built; notes about it.

    ``prefix`` is what the names of the model's tensors begin with; None looks for what wrappers
    (DataParallel, compile, Lightning, a student and its teacher) put there. Names go through the
    module's own hooks for older versions of its code. Raises InputError where names or shapes do
    not match, and for quantized weights.
    """
    by_name = refs_of(checkpoint)
    _refuse_quantised(module, checkpoint)
    return _fitted(
        module, tuple(by_name), lambda name: read_tensor(by_name[name]), checkpoint.versions,
        checkpoint.path, arch, prefix,
    )  # fmt: skip


def fit_tensors(
    module: nn.Module, tensors: Mapping[str, Tensor], path: str, arch: str,
    prefix: str | None = None,
) -> tuple[str, ...]:  # fmt: skip
    """The same for a state dict that is in memory already."""
    noted = getattr(tensors, "_metadata", {})
    versions = {name: entry["version"] for name, entry in noted.items() if "version" in entry}
    return _fitted(module, tuple(tensors), tensors.__getitem__, versions, path, arch, prefix)


def refs_of(checkpoint: Checkpoint) -> dict[str, TensorRef]:
    """A checkpoint's tensors by name, each tied one under all of its names."""
    tied = checkpoint.metadata.get("tied")
    by_name = {ref.name: ref for ref in checkpoint.tensors}
    same = {**tied} if isinstance(tied, Mapping) else {}
    return by_name | {other: by_name[kept] for other, kept in same.items() if kept in by_name}


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


def _fitted(
    module: nn.Module,
    stored: Sequence[str],
    read: Callable[[str], Tensor],
    versions: Mapping[str, int],
    path: str,
    arch: str,
    prefix: str | None,
) -> tuple[str, ...]:
    expected = list(module.state_dict())
    found = [prefix] if prefix is not None else _prefixes(expected, stored)
    inside = {name.removeprefix(found[0]): name for name in stored if name.startswith(found[0])}
    state = {short: read(name) for short, name in inside.items()}
    parts, hint = _misfits(module, state, below(found[0], versions))
    if parts:
        message = f"its tensors do not fit --arch {arch}: {'; '.join(parts)}{hint}"
        raise InputError(path, "malformed", message)
    left = [name for name in stored if not name.startswith(found[0])]
    return (*_others(found), *left_out(left), *widened(state.values()))


def _misfits(
    module: nn.Module, state: Mapping[str, Tensor], versions: Mapping[str, int]
) -> tuple[list[str], str]:
    """What keeps a state dict from being the module's, in words, and a hint; none once loaded."""
    described = OrderedDict(state)
    # Without a note of versions it was most likely saved by today's code, as the module is.
    noted = {name: {"version": version} for name, version in versions.items()}
    described._metadata = noted or getattr(module.state_dict(), "_metadata", {})  # type: ignore[attr-defined]
    try:
        missing, unexpected = module.load_state_dict(described, strict=False)
    # Besides torch's RuntimeError about shapes, hooks of the module raise what they like.
    except Exception as error:
        return _shapes(module, state, error)
    kept = module.state_dict()
    there = {_place(kept[name]) for name in state if name in kept}
    missing = [n for n in missing if not _is_counter(n) and _place(kept[n]) not in there]
    return counted(missing, unexpected), ""


def _place(tensor: Tensor) -> tuple[int, tuple[int, ...]]:
    """Equal for tied weights, of which some files hold one."""
    return tensor.data_ptr(), tuple(tensor.shape)


def _is_counter(name: str) -> bool:
    return name.endswith("num_batches_tracked")


def counted(missing: Sequence[str], unexpected: Sequence[str]) -> list[str]:
    """The names that a file lacks, and those that the architecture lacks, by what they share."""
    parts = ((missing, "missing from the file"), (unexpected, "not in the architecture"))
    return [f"{len(names)} {what}: {alike(names)}" for names, what in parts if names]


def _shapes(
    module: nn.Module, state: Mapping[str, Tensor], error: Exception
) -> tuple[list[str], str]:
    expected = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    reshaped = [n for n in expected if n in state and tuple(state[n].shape) != expected[n]]
    if not reshaped:
        said = (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()
        return [f"the architecture refuses them ({escaped(said, 300)})"], ""
    missing = [n for n in expected if n not in state and not _is_counter(n)]
    unexpected = [n for n in state if n not in expected]
    others = (
        f"{escaped(n)} (file {list(state[n].shape)}, architecture {list(expected[n])})"
        for n in reshaped
    )
    shapes = f"{len(reshaped)} of another shape: {listed(others, len(reshaped), 5)}"
    hint = "" if missing or unexpected else _classes_hint(reshaped, state)
    return [*counted(missing, unexpected), shapes], hint


def _classes_hint(reshaped: Sequence[str], state: Mapping[str, Tensor]) -> str:
    if not set(reshaped) <= set(list(state)[-2:]):
        return ""
    classes = state[reshaped[0]].shape[0]
    return f"; only the last layer differs: try the option num_classes={classes}"


def alike(names: Sequence[str], most: int = 5) -> str:
    """Names by what they share: ``blocks.*.attn.qkv.weight (12), cls_token``."""
    groups = Counter(re.sub(r"(?<![^.])\d+(?![^.])", "*", name) for name in names)
    if len(groups) > most:
        groups = _merged(groups, lambda name: re.sub(r"\d+(?=\.)", "*", name))
    for depth in range(max((name.count(".") for name in groups), default=0), 0, -1):
        if len(groups) > most:
            shorter = _merged(groups, lambda name, depth=depth: _cut(name, depth))  # type: ignore[misc]
            groups = shorter if len(shorter) < len(groups) else groups
    shown = (escaped(n) if count == 1 else f"{escaped(n)} ({count})" for n, count in groups.items())
    return listed(shown, len(groups), most)


def _merged(groups: Counter[str], change: Callable[[str], str]) -> Counter[str]:
    found: Counter[str] = Counter()
    for name, count in groups.items():
        found[change(name)] += count
    return found


def _cut(name: str, depth: int) -> str:
    """The first parts of a name."""
    parts = name.split(".")
    return name if len(parts) <= depth else ".".join((*parts[:depth], "…"))


def left_out(names: Sequence[str]) -> Iterator[str]:
    """A note of what lies beside the model, outside the prefix that its names share."""
    if names:
        yield f"not loaded: {len(names)} outside the model: {alike(names)}"


def widened(tensors: Iterable[Tensor]) -> Iterator[str]:
    """A note of the types that are computed in float32."""
    types = {str(t.dtype).removeprefix("torch.") for t in tensors}
    if found := sorted(types & {"float16", "bfloat16", "float64"}):
        yield f"{', '.join(found)} weights are read as float32"


def _others(prefixes: Sequence[str]) -> Iterator[str]:
    """A note of other tensors in the file that would fit as well."""
    if len(prefixes) > 1:
        taken = prefixes[0].removesuffix(".") or "the names without a prefix"
        others = [escaped(p.removesuffix(".")) for p in prefixes[1:] if p]
        first = others[0] if others else ""
        yield (
            f"took {escaped(taken)}; {listed(others, len(others))} would fit too "
            f"(--key {first} reads it)"
        )


def _prefixes(expected: Sequence[str], stored: Sequence[str]) -> list[str]:
    """What wrappers put before every name, the best guess first, then what fits as well.

    Of a student and its teacher, the average that is kept of it and evaluated, the teacher is
    taken; of a model and its average otherwise the model.
    """
    telling = {*expected[:1], max(expected, key=len, default="")}
    found = {s[: -len(n)] for n in telling for s in stored if n and s.endswith("." + n)}
    names = set(stored)
    hits = {p: sum(p + n in names for n in expected) for p in ("", *sorted(found))}
    # A wrapper holds most of the file, or all of the model; else a part of another model is taken
    # for the whole.
    most = [
        p for p, count in hits.items()
        if not p or count == len(expected) or 2 * sum(s.startswith(p) for s in stored) > len(stored)
    ]  # fmt: skip
    ranked = sorted(
        most, key=lambda p: (hits[p], "teacher" in p, not is_average(p), -len(p)), reverse=True
    )
    return [p for p in ranked if hits[p] == hits[ranked[0]] and (p or ranked[0] == "")]


_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


def read_tensor(ref: TensorRef) -> Tensor:
    """A stored tensor's elements. Raises InputError for types of quantised weights."""
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
