"""What a folder's names are: candidates for a checkpoint, indexes, what training leaves beside."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from gradscope.checkpoints.tensors import Failure
from gradscope.errors import InputError
from gradscope.formats import Kind, suffixes
from gradscope.text import listed, quoted

#: What may be a checkpoint by itself in a folder; content decides once it is opened.
FILE: tuple[Kind, ...] = ("tensors", "program")
#: Diffusers also writes ``model.safetensors.index.fp16.json``.
_INDEX = re.compile(r".+\.index(\.[\w-]+)?\.json")
#: What trainers leave beside the model under a checkpoint's suffix.
_BESIDE = re.compile(
    r"(training_args|optimizer|scheduler|scaler|rng_state\w*|random_states\w*|evaluations)"
    r"(_\d+)?\.(bin|pt|pth|npz)"
)
#: What says where the tensors of a distributed checkpoint lie, and the files they lie in.
DCP_METADATA, _DCP_FILE = ".metadata", ".distcp"
_OPTIMIZER = re.compile(r"optimizer(_\d+)?\.(bin|pt|pth)")


@dataclass(frozen=True, slots=True)
class Part:
    """A file, an index or a folder, relative to the folder of which it is a part."""

    name: str
    #: Put before its tensors' names where they would be those of another part.
    prefix: str = ""


@dataclass(frozen=True, slots=True)
class Choice:
    """Which parts of a folder are the checkpoint; an index stands for the shards it names."""

    parts: tuple[Part, ...]
    notes: tuple[str, ...] = ()
    #: Parts that the folder's own documents promise and that are not there.
    failures: tuple[Failure, ...] = ()
    #: Whether every name gets its part's prefix, or only where parts share names.
    prefixed: bool = False


def is_dcp(names: Iterable[str]) -> bool:
    """Whether a folder that holds these names is a distributed checkpoint."""
    held = list(names)
    return DCP_METADATA in held and any(name.endswith(_DCP_FILE) for name in held)


def names_in(folder: str, folders: bool = False) -> list[str]:
    """The files of a folder, and its ``folders`` where asked, sorted. Raises InputError."""
    try:
        with os.scandir(folder) as entries:
            return sorted(entry.name for entry in entries if folders or not entry.is_dir())
    except OSError as error:
        reason = error.strerror or str(error)
        raise InputError(folder, "missing", f"cannot be listed: {reason}") from None


def is_index_name(name: str) -> bool:
    """Whether a name is that of an index of shards."""
    return _INDEX.fullmatch(name) is not None


def candidates(names: Iterable[str]) -> list[str]:
    """The names that may be a checkpoint by themselves."""
    return [
        name for name in names if name.endswith(suffixes(*FILE)) and not _BESIDE.fullmatch(name)
    ]


def holds_checkpoints(names: Iterable[str]) -> bool:
    """Whether any of the names is that of a checkpoint or an index."""
    found = list(names)
    return any(map(is_index_name, found)) or bool(candidates(found))


def left_by_training(names: Iterable[str]) -> list[str]:
    """The names of files that training leaves beside a model."""
    return [name for name in names if _BESIDE.fullmatch(name)]


def training_state(folder: str, names: Iterable[str]) -> Iterator[str]:
    """A note on the optimizer's state beside a model, and how to read it."""
    found = [name for name in names if _OPTIMIZER.fullmatch(name)]
    if found:
        command = f"gradscope weights {os.path.join(folder, found[0])}"
        yield (
            f"{listed(map(quoted, found), len(found))} beside the model is the state of its "
            f"training and was not read; `{command}` reads it"
        )
