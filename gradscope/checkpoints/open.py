"""Opening a checkpoint, whatever its container: one table from sniffed format to reader."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from gradscope.checkpoints.sniff import sniff
from gradscope.checkpoints.tensors import Checkpoint
from gradscope.errors import InputError, UsageError
from gradscope.plugins import loaded

_Reader = Callable[[str, str | None], Checkpoint]


def open_checkpoint(path: str, key: str | None = None) -> Checkpoint:
    """Describe the checkpoint at a path: a file, an index of shards, or a folder.

    Only headers are read. ``key`` is the dotted path of the state dict inside a torch file.
    Raises InputError when it cannot be read, UsageError when the request is ambiguous.
    """
    try:
        found = sniff(path)
    except InputError as error:
        if error.kind != "unsupported":
            raise
        return _third_party(path, error)
    return {**_FILES, **_SETS}[found](path, key)


def _read_file(path: str, key: str | None) -> Checkpoint:
    """One file that holds tensors itself: what a shard must be."""
    found = sniff(path)
    if found not in _FILES:
        raise InputError(path, "unsupported", f"a shard must hold tensors; this is a {found}")
    return _FILES[found](path, key)


def _read_safetensors(path: str, key: str | None) -> Checkpoint:
    from gradscope.checkpoints.safetensors import read_safetensors

    _refuse_key(key, "safetensors")
    return read_safetensors(path)


def _read_torch(path: str, key: str | None) -> Checkpoint:
    from gradscope.checkpoints.torchfile import read_torch

    return read_torch(path, key)


def _read_npz(path: str, key: str | None) -> Checkpoint:
    from gradscope.checkpoints.npz import read_npz

    _refuse_key(key, "NumPy")
    return read_npz(path)


def _refuse_key(key: str | None, container: str) -> None:
    if key is not None:
        raise UsageError(f"--key {key}: {container} files hold tensors only, no nested dicts")


def _read_index(path: str, key: str | None) -> Checkpoint:
    from gradscope.checkpoints.sharded import read_index

    return read_index(path, lambda shard: _read_file(shard, key))


def _read_folder(path: str, key: str | None) -> Checkpoint:
    from gradscope.checkpoints.sharded import read_folder

    return read_folder(path, lambda file: _read_file(file, key))


_FILES: Mapping[str, _Reader] = {
    "safetensors": _read_safetensors,
    "zip-torch": _read_torch,
    "torchscript": _read_torch,
    "pt2": _read_torch,
    "torch-legacy": _read_torch,
    "npz": _read_npz,
    "npy": _read_npz,
}
_SETS: Mapping[str, _Reader] = {"safetensors-index": _read_index, "folder": _read_folder}


def _third_party(path: str, refusal: InputError) -> Checkpoint:
    """Ask plugins, callables from path to Checkpoint or None, in the order of their names.

    The refusal stands when none takes it.
    """
    for _, read in loaded("checkpoints"):
        checkpoint: Checkpoint | None = read(path)
        if checkpoint is not None:
            return checkpoint
    raise refusal
