"""Models from files, in whatever form they were saved; content decides, not the name."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from gradscope.checkpoints.integrity import verified
from gradscope.checkpoints.open import open_checkpoint
from gradscope.checkpoints.sniff import DCP, FOLDER, sniff
from gradscope.checkpoints.tensors import Checkpoint
from gradscope.device import resolve
from gradscope.errors import GradscopeError, InputError, UsageError
from gradscope.formats import find, function
from gradscope.models import huggingface
from gradscope.models.architecture import build
from gradscope.models.fit import fit
from gradscope.models.forms import as_model
from gradscope.models.model import Model
from gradscope.models.pickled import unpickled
from gradscope.models.program_check import check_program
from gradscope.models.quiet import first_line, silent
from gradscope.text import escaped, listed, plural

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
    ``architecture.build`` and ``huggingface.load``; ``key`` is the dotted path to it in a larger
    file, or what the names of its tensors begin with. TorchScript and
    ``torch.export`` programs contain their code. Loading a whole pickled module runs code, which
    ``trust`` must allow with "pickle".

    Raises InputError for a file that is missing, damaged, unsafe, or does not fit the
    architecture, and UsageError for a wrong ``arch``.
    """
    place = resolve(device)
    kind, made, notes = _made(path, arch, key, trust)
    model = _seen_into(path, made)
    kind = kind or model.format
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
    # A graph that is damaged, or was written by another version, fails wherever it is first used.
    except Exception as error:
        message = f"its graph cannot be read ({first_line(error)}); save it again"
        raise InputError(path, "malformed", message) from None


#: The format (None: as the model says), what was loaded, and notes.
_Made = tuple[str | None, object, tuple[str, ...]]


def _made(path: str, arch: str | None, key: str | None, trust: Trust) -> _Made:
    found = sniff(path)
    load = None if found in (FOLDER, DCP) else find(found).model
    if load is None:
        return _eager(path, arch, key, trust)
    notes = () if arch is None else ("--arch is ignored: the file contains its own code",)
    return None, function(load)(path, trust), notes


def _moved(model: Model, device: torch.device, kind: str) -> None:
    if device.type == "cpu":
        return
    if kind == "export":
        raise UsageError(
            "an exported program cannot move to another device; use --device cpu, or export it "
            "on that device"
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


def read_torchscript(path: str, _trust: Trust) -> torch.jit.ScriptModule:
    """A TorchScript program, on the CPU, in evaluation mode. Raises InputError."""
    with silent():
        try:
            module: torch.jit.ScriptModule = torch.jit.load(path, map_location="cpu")
        # TorchScript's reader has no error class of its own.
        except Exception as error:
            said = first_line(error)
            if "Unknown builtin op" in str(error) or "Unknown type name" in str(error):
                lost = next((li for li in str(error).splitlines() if "Unknown" in li), said)
                message = f"it needs operators that are not loaded ({lost.strip()}); import them"
                raise InputError(path, "unsupported", message) from None
            message = f"TorchScript cannot read it ({said}); save it again"
            raise InputError(path, "malformed", message) from None
        if hasattr(module, "training"):
            module.eval()
    return module


def read_exported(path: str, trust: Trust) -> torch.export.ExportedProgram:
    """An exported program, checked first unless ``trust`` has "pickle". Raises InputError."""
    if "pickle" not in trust:
        check_program(path)
    with silent():
        try:
            return torch.export.load(path)
        except Exception as error:
            raise InputError(
                path,
                "malformed",
                f"torch.export cannot read it ({first_line(error)}); it may come from another "
                f"version of torch than {torch.__version__}: export it again with this one",
            ) from None


# --- weights, and whole modules -------------------------------------------------------------------


def _eager(path: str, arch: str | None, key: str | None, trust: Trust) -> _Made:
    try:
        checkpoint, prefix = _opened(path, key)
    except InputError as error:
        if error.kind != "unsafe":
            raise
        return unpickled(path, error.message.partition(", which")[0], arch, key, trust)
    if checkpoint.classes and ("pickle" in trust or (checkpoint.module and arch is None)):
        names = (escaped(name, 120) for name in checkpoint.classes)
        needed = f"it names {listed(names, len(checkpoint.classes))}"
        return unpickled(path, needed, arch, key, trust)
    for failure in checkpoint.failures:
        raise InputError(path, failure.kind, failure.message)
    if arch is None:
        raise UsageError(
            f"{path} holds {plural(len(checkpoint.tensors), 'tensor')} and no code: name the "
            f"architecture with --arch {_advised(checkpoint)}"
        )
    if arch.startswith(f"{huggingface.LIBRARY}:"):
        module, notes = huggingface.load(arch, checkpoint, prefix)
    else:
        module = build(arch)
        notes = fit(module, checkpoint, arch, prefix)
    return "state-dict", module.eval(), (*checkpoint.notes, *notes)


def _opened(path: str, key: str | None) -> tuple[Checkpoint, str | None]:
    """The model's checkpoint at a key, and what its names begin with, where the key says so.

    A key is a path of entries, a beginning of names, or the one followed by the other.
    """
    parts = [] if key is None else key.split(".")
    refused: UsageError | None = None
    begins: dict[str, None] = {}
    for cut in range(len(parts), -1, -1):
        try:
            found = open_checkpoint(path, ".".join(parts[:cut]) or None).model()
        except UsageError as error:
            refused = refused or error
            continue
        prefix = "".join(f"{part}." for part in parts[cut:])
        if any(ref.name.startswith(prefix) for ref in found.tensors):
            return verified(found), prefix or None
        if not prefix:
            return verified(found), None
        begins = dict.fromkeys(ref.name.partition(".")[0] for ref in found.tensors)
    there = listed(map(escaped, begins), len(begins), 12)
    raise UsageError(f"{refused}; names of tensors begin with {there}" if begins else str(refused))


_HINTS = (
    ("features.18.0.weight", "mobilenet_v2"), ("layer4.2.conv3.weight", "resnet50"),
    ("layer4.1.conv2.weight", "resnet18 or resnet34"), ("features.28.weight", "vgg16"),
    ("encoder.layers.encoder_layer_11.ln_1.weight", "vit_b_16"),
    ("blocks.0.attn.qkv.weight", "timm vision transformer"),
)  # fmt: skip


def _advised(checkpoint: Checkpoint) -> str:
    config = checkpoint.metadata.get("config")
    if isinstance(config, Mapping) and config.get("architectures"):
        return f"{huggingface.LIBRARY}:{huggingface.AUTO}, as its config.json is of that library"
    return f"package.module:factory{_guess(checkpoint)}"


def _guess(checkpoint: Checkpoint) -> str:
    names = [ref.name for ref in checkpoint.tensors]
    for telling, architecture in _HINTS:
        if any(name.endswith(telling) for name in names):
            return f" (the tensors look like a {architecture})"
    return ""
