"""The table of what can be read: each format's name, how it is recognised, and where its reader is.

A new reader of a checkpoint or a history is one source file and one row here. Sniffing, opening,
the search of a folder, sharded sets, ``--help`` and every text that lists what can be read come
from this table. It imports nothing: a row names functions, which are imported when asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from gradscope.containers.beginning import Beginning

#: What a format holds: tensors alone, a program with its weights, the names of other files, or the
#: history of a training run.
Kind = Literal["tensors", "program", "set", "history"]
#: What is a checkpoint.
CHECKPOINT: tuple[Kind, ...] = ("tensors", "program", "set")


@dataclass(frozen=True, slots=True)
class Format:
    """One row; functions are named as ``module:function``.

    ``recognises`` is asked whether the Beginning of a file is of this format. ``reader`` is called
    with the path, and with the keyword argument that ``takes`` names, where the format needs one
    (the ``key`` of a nested dict, what arrays are read ``as_``). The reader of a ``set`` is called
    with the path and a function that reads one file of the set.
    """

    name: str
    family: str
    suffixes: tuple[str, ...]
    kind: Kind
    recognises: str
    reader: str
    takes: Literal["key", "as_"] | None = None
    #: The loader of a ``program`` as a model that can be run.
    model: str | None = None

    def matches(self, file: Beginning) -> bool:
        """Whether a file is of this format, by its content alone."""
        return bool(function(self.recognises)(file))

    def load(self) -> Callable[..., Any]:
        """The reader."""
        return function(self.reader)


def function(home: str) -> Callable[..., Any]:
    """The function that ``module:function`` names."""
    module, _, name = home.partition(":")
    found: Callable[..., Any] = getattr(import_module(module), name)
    return found


_CHECKPOINTS = (
    Format(
        name="safetensors",
        family="safetensors",
        suffixes=(".safetensors",),
        kind="tensors",
        recognises="gradscope.checkpoints.recognise:is_safetensors",
        reader="gradscope.checkpoints.safetensors:read_safetensors",
    ),
    Format(
        name="safetensors-index",
        family="safetensors",
        suffixes=(".index.json",),
        kind="set",
        recognises="gradscope.checkpoints.recognise:is_index",
        reader="gradscope.checkpoints.sharded:read_index",
        takes="key",
    ),
    Format(
        name="pt2",
        family="PyTorch",
        suffixes=(".pt2",),
        kind="program",
        recognises="gradscope.checkpoints.recognise:is_pt2",
        reader="gradscope.checkpoints.torchfile:read_torch",
        takes="key",
        model="gradscope.models.load:read_exported",
    ),
    Format(
        name="torchscript",
        family="PyTorch",
        suffixes=(".pt",),
        kind="program",
        recognises="gradscope.checkpoints.recognise:is_torchscript",
        reader="gradscope.checkpoints.torchfile:read_torch",
        takes="key",
        model="gradscope.models.load:read_torchscript",
    ),
    Format(
        name="zip-torch",
        family="PyTorch",
        suffixes=(".pt", ".pth", ".bin", ".ckpt"),
        kind="tensors",
        recognises="gradscope.checkpoints.recognise:is_torch_zip",
        reader="gradscope.checkpoints.torchfile:read_torch",
        takes="key",
    ),
    Format(
        name="torch-legacy",
        family="PyTorch",
        suffixes=(".pt", ".pth", ".bin"),
        kind="tensors",
        recognises="gradscope.checkpoints.recognise:is_torch_legacy",
        reader="gradscope.checkpoints.torchfile:read_torch",
        takes="key",
    ),
    Format(
        name="npz",
        family="NumPy",
        suffixes=(".npz",),
        kind="tensors",
        recognises="gradscope.checkpoints.recognise:is_npz",
        reader="gradscope.checkpoints.npz:read_npz",
    ),
    Format(
        name="npy",
        family="NumPy",
        suffixes=(".npy",),
        kind="tensors",
        recognises="gradscope.checkpoints.recognise:is_npy",
        reader="gradscope.checkpoints.npz:read_npz",
    ),
    Format(
        name="gguf",
        family="GGUF",
        suffixes=(".gguf",),
        kind="tensors",
        recognises="gradscope.checkpoints.gguf:recognises",
        reader="gradscope.checkpoints.gguf:read_gguf",
    ),
)

_HISTORIES = (
    Format(
        name="grads",
        family="gradscope.grads",
        suffixes=(".npz",),
        kind="history",
        recognises="gradscope.histories.native:recognises",
        reader="gradscope.histories.joined:read_native",
    ),
    Format(
        name="parquet",
        family="Parquet",
        suffixes=(".parquet",),
        kind="history",
        recognises="gradscope.histories.tables:is_parquet",
        reader="gradscope.histories.tables:read_parquet",
    ),
    Format(
        name="events",
        family="TensorBoard events",
        suffixes=("events.out.tfevents.*",),
        kind="history",
        recognises="gradscope.histories.events:recognises",
        reader="gradscope.histories.events:read_event_file",
    ),
    Format(
        name="log",
        family="training logs",
        suffixes=(".log", ".txt", ".out"),
        kind="history",
        recognises="gradscope.histories.logs:recognises",
        reader="gradscope.histories.logs:read_log",
    ),
    Format(
        name="json",
        family="JSON",
        suffixes=(".json", ".jsonl", "trainer_state.json"),
        kind="history",
        recognises="gradscope.histories.tables:is_json",
        reader="gradscope.histories.tables:read_any_json",
    ),
    Format(
        name="arrays",
        family="arrays of norms or gradients",
        suffixes=tuple(
            dict.fromkeys(s for row in _CHECKPOINTS if row.kind == "tensors" for s in row.suffixes)
        ),
        kind="history",
        recognises="gradscope.histories.arrays:recognises",
        reader="gradscope.histories.arrays:read_arrays",
        takes="as_",
    ),
    Format(
        name="csv",
        family="CSV",
        suffixes=(".csv", ".tsv"),
        kind="history",
        recognises="gradscope.histories.tables:is_csv",
        reader="gradscope.histories.tables:read_csv",
    ),
)

#: In the order in which they are tried; checkpoints and histories are never tried together.
FORMATS: tuple[Format, ...] = (*_CHECKPOINTS, *_HISTORIES)


def rows(*kinds: Kind) -> list[Format]:
    """The rows of some kinds, in the order of the table."""
    return [row for row in FORMATS if row.kind in kinds]


def recognised(file: Beginning, *kinds: Kind) -> Format | None:
    """The row of a file, by its content; None for a file in no format of these kinds."""
    return next((row for row in rows(*kinds) if row.matches(file)), None)


def find(name: str) -> Format:
    """The row of a name."""
    return next(row for row in FORMATS if row.name == name)


def families(*kinds: Kind) -> dict[str, tuple[str, ...]]:
    """The suffixes of each family of some kinds, in the order of the table."""
    found: dict[str, dict[str, None]] = {}
    for row in rows(*kinds):
        found.setdefault(row.family, {}).update(dict.fromkeys(row.suffixes))
    return {family: tuple(suffixes) for family, suffixes in found.items()}


def supported(*kinds: Kind) -> str:
    """What can be read, in words: each family with its suffixes."""
    return ", ".join(f"{name} ({', '.join(found)})" for name, found in families(*kinds).items())


def suffixes(*kinds: Kind) -> tuple[str, ...]:
    """Every suffix of some kinds, once."""
    return tuple(dict.fromkeys(s for found in families(*kinds).values() for s in found))
