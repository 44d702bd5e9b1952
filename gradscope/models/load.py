"""Models from files, whatever form they were saved in; told apart by content."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gradscope.checkpoints.integrity import verified
from gradscope.checkpoints.open import open_checkpoint
from gradscope.checkpoints.sniff import sniff
from gradscope.checkpoints.statedict import KNOWN_NAMES
from gradscope.checkpoints.tensors import Checkpoint, TensorRef
from gradscope.checkpoints.tiles import tiles
from gradscope.device import resolve
from gradscope.errors import GradscopeError, InputError, UsageError
from gradscope.models.architecture import build, importable
from gradscope.models.model import Model, as_model
from gradscope.models.program_check import check_program

#: ``--trust``: formats that may run code of their own while they are loaded.
Trust = frozenset[str]


@dataclass(frozen=True, eq=False, slots=True)
class Loaded:
    """A model and where it came from."""

    model: Model
    path: str
    #: "state-dict", "torchscript", "export" or "module".
    format: str
    sha256: str
    #: What ``--arch`` said; None where the file holds the code.
    architecture: str | None
    notes: tuple[str, ...] = ()


def load_model(
    path: str,
    *,
    arch: str | None = None,
    key: str | None = None,
    trust: Trust = frozenset(),
    device: str = "cpu",
) -> Loaded:
    """The model in a file, in evaluation mode, on a device.

    A state dict (torch, safetensors, sharded, or a folder of these) needs ``arch``, see
    ``architecture.build``; ``key`` is the dotted path to it in a larger file. TorchScript and
    ``torch.export`` programs bring their code along. A whole pickled module runs code while it is
    loaded, which ``trust`` must allow with "pickle".

    Raises InputError for a file that is missing, damaged, unsafe, or does not fit the
    architecture, and UsageError for a wrong ``arch``.
    """
    place = resolve(device)
    kind, made, notes = _made(path, arch, key, trust)
    model = _seen_into(path, made)
    _moved(model, place, kind)
    return Loaded(
        model, path, kind, _digest(path), arch if kind == "state-dict" else None,
        (*notes, *model.notes),
    )  # fmt: skip


def _seen_into(path: str, made: object) -> Model:
    try:
        return as_model(made)
    except GradscopeError:
        raise
    # A graph that was damaged, or written by another version, fails wherever it is first used.
    except Exception as error:
        message = f"its program cannot be taken apart ({_first_line(error)}); save it again"
        raise InputError(path, "malformed", message) from None


#: The format, what was loaded, and notes.
_Made = tuple[str, object, tuple[str, ...]]


def _made(path: str, arch: str | None, key: str | None, trust: Trust) -> _Made:
    found = sniff(path)
    if found not in ("torchscript", "pt2"):
        return _eager(path, arch, key, trust)
    notes = () if arch is None else ("--arch is not needed: the file holds its own code",)
    if found == "pt2":
        return "export", _exported(path, trust), notes
    return "torchscript", _script(path), notes


def _moved(model: Model, device: torch.device, kind: str) -> None:
    if device.type == "cpu":
        return
    if kind == "export":
        raise UsageError(
            "an exported program stays on the device that it was exported for; run it with "
            "--device cpu, or export it there"
        )
    model.module.to(device)


def _digest(path: str) -> str:
    """SHA-256 of a file, or of a folder's weights in order."""
    digest = hashlib.sha256()
    for file in _files(path):
        with open(file, "rb") as stream:
            while piece := stream.read(1 << 22):
                digest.update(piece)
    return digest.hexdigest()


def _files(path: str) -> list[str]:
    try:
        with open(path, "rb"):
            return [path]
    except IsADirectoryError:
        return sorted({ref.file for ref in open_checkpoint(path).tensors})


# --- programs -------------------------------------------------------------------------------------


def _script(path: str) -> torch.jit.ScriptModule:
    with _silent():
        try:
            module: torch.jit.ScriptModule = torch.jit.load(path, map_location="cpu")
        # TorchScript's reader has no error class of its own.
        except Exception as error:
            said = _first_line(error)
            if "Unknown builtin op" in str(error) or "Unknown type name" in str(error):
                lost = next((li for li in str(error).splitlines() if "Unknown" in li), said)
                message = f"it needs operators that are not installed ({lost.strip()}); import them"
                raise InputError(path, "unsupported", message) from None
            message = f"TorchScript cannot read it ({said}); save it again"
            raise InputError(path, "malformed", message) from None
        if hasattr(module, "training"):
            module.eval()
    return module


def _exported(path: str, trust: Trust) -> torch.export.ExportedProgram:
    if "pickle" not in trust:
        check_program(path)
    with _silent():
        try:
            return torch.export.load(path)
        except Exception as error:
            raise InputError(
                path,
                "malformed",
                f"torch.export cannot read it ({_first_line(error)}); it may be of another "
                f"version of torch than {torch.__version__}: export it again with this one",
            ) from None


class _silent(warnings.catch_warnings):  # noqa: N801  reads as what it does
    """Torch's loaders warn of deprecations that the user of a file cannot help."""

    def __enter__(self) -> Any:
        entered = super().__enter__()
        warnings.simplefilter("ignore")
        return entered


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__


# --- weights, and whole modules -------------------------------------------------------------------


def _eager(path: str, arch: str | None, key: str | None, trust: Trust) -> _Made:
    try:
        checkpoint = verified(open_checkpoint(path, key))
    except InputError as error:
        if error.kind != "unsafe":
            raise
        return _pickled(error, arch, key, trust)
    for failure in checkpoint.failures:
        raise InputError(path, failure.kind, failure.message)
    if arch is None:
        raise UsageError(
            f"{path} holds {len(checkpoint.tensors)} tensors and no code: name the architecture "
            f"with --arch package.module:factory{_guess(checkpoint)}"
        )
    module = build(arch)
    notes = _fit(module, checkpoint, arch)
    return "state-dict", module.eval(), (*checkpoint.notes, *notes)


def _pickled(refusal: InputError, arch: str | None, key: str | None, trust: Trust) -> _Made:
    path = refusal.path
    if "pickle" not in trust:
        needed = refusal.message.partition(", which only")[0]
        raise InputError(
            path,
            "unsafe",
            f"a pickled module: loading it runs whatever code the file names ({needed}). If you "
            "trust where it comes from, say --trust pickle; better, save its state dict, or the "
            "model with torch.export.save",
        ) from None
    with _silent(), importable(str(Path.cwd())):
        try:
            found = torch.load(path, map_location="cpu", weights_only=False)
        # Its code may raise anything.
        except Exception as error:
            advice = "its classes must be importable, from the working directory or installed"
            message = f"unpickling failed ({type(error).__name__}: {_first_line(error)}); {advice}"
            raise InputError(path, "malformed", message) from None
    found = _entry(found, key, path)
    inner = next((v for v in _values(found) if isinstance(v, nn.Module)), None)
    if inner is not None:
        return "module", inner.eval(), ()
    if arch is None:
        raise UsageError(f"{path} holds a {type(found).__name__}, no module; name it with --arch")
    module = build(arch)
    notes = _fit_tensors(module, _tensors_in(found), path, arch)
    return "state-dict", module.eval(), notes


def _entry(found: object, key: str | None, path: str) -> object:
    """What lies at a dotted path of keys."""
    for part in () if key is None else key.split("."):
        if not isinstance(found, Mapping) or part not in found:
            names = ", ".join(map(str, found)) if isinstance(found, Mapping) else "no entries"
            raise UsageError(f"--key {key}: no {part} in {path}; there it holds {names[:300]}")
        found = found[part]
    return found


def _values(found: object) -> Iterator[object]:
    yield found
    if isinstance(found, Mapping):
        for name in (*KNOWN_NAMES, *found):
            if name in found:
                yield found[name]


def _tensors_in(found: object) -> dict[str, Tensor]:
    for value in _values(found):
        if isinstance(value, Mapping):
            tensors = {str(k): v for k, v in value.items() if isinstance(v, Tensor)}
            if tensors:
                return tensors
    return {}


_HINTS = (
    ("features.18.0.weight", "mobilenet_v2"), ("layer4.2.conv3.weight", "resnet50"),
    ("layer4.1.conv2.weight", "resnet18 or resnet34"), ("features.28.weight", "vgg16"),
    ("encoder.layers.encoder_layer_11.ln_1.weight", "vit_b_16"),
    ("blocks.0.attn.qkv.weight", "timm vision transformer"),
)  # fmt: skip


def _guess(checkpoint: Checkpoint) -> str:
    names = [ref.name for ref in checkpoint.tensors]
    for telling, architecture in _HINTS:
        if any(name.endswith(telling) for name in names):
            return f" (the tensors look like a {architecture})"
    return ""


def _fit(module: nn.Module, checkpoint: Checkpoint, arch: str) -> tuple[str, ...]:
    tied = checkpoint.metadata.get("tied")
    by_name = {ref.name: ref for ref in checkpoint.tensors}
    same = {**tied} if isinstance(tied, Mapping) else {}
    by_name |= {other: by_name[kept] for other, kept in same.items() if kept in by_name}
    _refuse_quantised(module, checkpoint)
    wanted = _matched(module, {n: r.shape for n, r in by_name.items()}, checkpoint.path, arch)
    state = {name: _tensor(by_name[stored]) for name, stored in wanted.items()}
    return (*_left_out(by_name, wanted), *_assign(module, state))


def _refuse_quantised(module: nn.Module, checkpoint: Checkpoint) -> None:
    """Raise InputError for a tensor that the architecture has and that has no plain elements."""
    names = tuple(module.state_dict())
    for item in checkpoint.skipped:
        if item.subject.endswith(names) and not item.deliberate:
            raise InputError(
                checkpoint.path,
                "unsupported",
                f"tensor {item.subject} cannot be read: {item.reason}; load the model where it was "
                "made and save its state dict in float32",
            )


def _left_out(stored: Iterable[str], wanted: Mapping[str, str]) -> tuple[str, ...]:
    """A note of what lies beside the model, outside the prefix that its names share."""
    taken = set(wanted.values())
    left = [name for name in stored if name not in taken]
    return (f"not loaded: {_named('outside the model', left)}",) if left else ()


def _fit_tensors(
    module: nn.Module, tensors: Mapping[str, Tensor], path: str, arch: str
) -> tuple[str, ...]:
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    wanted = _matched(module, shapes, path, arch)
    state = {name: tensors[stored] for name, stored in wanted.items()}
    return (*_left_out(tensors, wanted), *_assign(module, state))


def _assign(module: nn.Module, state: Mapping[str, Tensor]) -> tuple[str, ...]:
    module.load_state_dict(state, strict=False)
    halves = {str(t.dtype).removeprefix("torch.") for t in state.values()} & {
        "float16", "bfloat16", "float64",
    }  # fmt: skip
    return (f"weights of {', '.join(sorted(halves))} are read as float32",) if halves else ()


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
            f"tensor {ref.name} is stored as {ref.dtype}: quantised weights cannot be "
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
    """Which stored tensor each of the module's takes. Raises InputError where they do not fit."""
    expected = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    prefix = _prefix(expected, stored)
    pairs = {name: prefix + name for name in expected if prefix + name in stored}
    missing = [n for n in expected if n not in pairs and not n.endswith("num_batches_tracked")]
    taken = set(pairs.values())
    unexpected = [n for n in stored if n not in taken and n.startswith(prefix)]
    reshaped = [n for n, s in pairs.items() if expected[n] != stored[s]]
    parts = [
        _named("missing from the file", missing),
        _named("not in the architecture", unexpected),
        _named("of another shape", [
            f"{n} (file {list(stored[pairs[n]])}, architecture {list(expected[n])})"
            for n in reshaped
        ]),
    ]  # fmt: skip
    if any(parts):
        hint = _classes_hint(reshaped, missing or unexpected, {n: stored[pairs[n]] for n in pairs})
        message = f"its tensors do not fit --arch {arch}: {'; '.join(p for p in parts if p)}{hint}"
        raise InputError(path, "malformed", message)
    return pairs


def _named(what: str, names: list[str]) -> str:
    if not names:
        return ""
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return f"{len(names)} {what}: {', '.join(names[:5])}{more}"


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
