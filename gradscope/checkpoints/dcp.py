"""Folders of torch.distributed.checkpoint: ``.metadata`` says where the parts of each tensor lie.

``.metadata`` is a pickle of dataclasses, read as data like any other. Each part is a torch.save
file of its own inside a ``.distcp`` file.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import combinations

from gradscope.checkpoints.choice import DCP_METADATA
from gradscope.checkpoints.statedict import Aside, choose_tensors
from gradscope.checkpoints.tensors import Checkpoint, Failure, Skipped, TensorRef
from gradscope.checkpoints.tensors import Part as PartOf
from gradscope.checkpoints.torch_contents import Contents, Source, address
from gradscope.checkpoints.torch_pickle import (
    StorageRecord,
    TensorRecord,
    extents,
    read_torch_pickle,
)
from gradscope.checkpoints.torch_zip import TorchArchive, budget_for, roots_of
from gradscope.checkpoints.training import is_optimizer_name
from gradscope.checkpoints.tree import text
from gradscope.containers.files import Stamp, stamp, unreadable
from gradscope.containers.pickle_machine import Instance
from gradscope.containers.pickles import Unpickled
from gradscope.containers.zip import read_archive
from gradscope.errors import InputError, UsageError
from gradscope.text import plural, quoted

_MOST_PAIRS = 1 << 16

Offsets = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Part:
    """A block of a tensor, and the bytes of a file that hold it."""

    offsets: Offsets
    sizes: Offsets
    file: str = ""
    start: int = 0
    length: int = 0
    #: Whether the bytes are those that torch.save wrote.
    plain: bool = True

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.sizes)

    def is_within(self, shape: Offsets) -> bool:
        """Whether it is a block of a tensor of this shape."""
        if not len(self.offsets) == len(self.sizes) == len(shape):
            return False
        ends = (start + size for start, size in zip(self.offsets, self.sizes, strict=True))
        return all(end <= whole for end, whole in zip(ends, shape, strict=True))

    def overlaps(self, other: _Part) -> bool:
        """Whether two blocks of one tensor share an element."""
        spans = zip(self.offsets, self.sizes, other.offsets, other.sizes, strict=True)
        return all(a < b + m and b < a + n for a, n, b, m in spans)


@dataclass(frozen=True, slots=True)
class _Sharded:
    """A tensor, in as many parts as there are."""

    shape: Offsets
    parts: tuple[_Part, ...]

    def fault(self) -> str | None:
        """Why the parts are not the whole tensor, each element once."""
        if not all(part.is_within(self.shape) for part in self.parts):
            return "a part lies outside the tensor"
        total, numel = sum(p.numel for p in self.parts), math.prod(self.shape)
        if total < numel:
            return f"parts are missing: they hold {total:,} of {numel:,} elements"
        filled = [p for p in self.parts if p.numel]
        pairs = combinations(filled, 2) if len(filled) ** 2 <= _MOST_PAIRS else ()
        if total > numel or any(a.overlaps(b) for a, b in pairs):
            return "parts overlap"
        return None


def read_dcp(folder: str, key: str | None = None) -> Checkpoint:
    """The tensors of a distributed checkpoint, sharded ones part by part.

    Raises InputError when ``.metadata`` cannot be read, UsageError when there is no such ``key``.
    """
    path = os.path.join(folder, DCP_METADATA)
    found = _Found(folder, Contents(folder, "dcp"), {path: stamp(path)})
    try:
        with open(path, "rb") as file:
            pickled = read_torch_pickle(file, path, DCP_METADATA, end=found.stamps[path][0])
        _read(found, pickled, key)
    except (InputError, UsageError):
        raise
    except OSError as error:
        raise unreadable(path, error) from None
    # Fields of the wrong type surface as these wherever they are first used.
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        message = f"not the metadata of a distributed checkpoint: {type(error).__name__} {error}"
        raise InputError(path, "malformed", message) from None
    contents = found.contents
    return Checkpoint(
        path=folder,
        format="dcp",
        nbytes=sum(size for size, *_ in found.stamps.values()),
        tensors=tuple(contents.tensors),
        skipped=tuple(contents.skipped),
        failures=tuple(contents.failures),
        notes=tuple(contents.notes),
        stamps=found.stamps,
    )


@dataclass(frozen=True, slots=True)
class _Found:
    """What one folder yields, in the making."""

    folder: str
    contents: Contents
    stamps: dict[str, Stamp]


def _read(found: _Found, pickled: Unpickled, key: str | None) -> None:
    metadata = _fields(pickled.value)
    tensors = _tensors(metadata)
    tree = _tree(tensors, metadata.get("planner_data"))
    chosen = choose_tensors(tree, key, found.folder, budget_for(pickled))
    for aside in (Aside("model", chosen.tensors), *chosen.asides):
        for name, record in aside.tensors:
            assert record.storage is not None
            _add(found, name, aside.part, tensors[record.storage.key])
    found.contents.notes.extend((*chosen.notes, *_notes(tensors)))
    found.contents.skipped.extend(chosen.skipped)


def _notes(tensors: Mapping[str, _Sharded]) -> Iterator[str]:
    sharded = sum(len(tensor.parts) > 1 for tensor in tensors.values())
    if sharded:
        yield (
            f"{plural(sharded, 'tensor')} were saved in parts by several processes; each part is "
            "measured by itself, and part0/NAME is the first of NAME"
        )


# --- what .metadata says --------------------------------------------------------------------------


def _fields(node: object) -> Mapping[object, object]:
    """The fields of a dataclass."""
    if not isinstance(node, Instance) or not isinstance(node.state, dict):
        raise ValueError("a record is not one of torch.distributed.checkpoint")
    return node.state


def _tensors(metadata: Mapping[object, object]) -> dict[str, _Sharded]:
    """The tensors by name; other objects are pickles of their own, which hold none."""
    described, stored = metadata["state_dict_metadata"], metadata["storage_data"]
    if not isinstance(described, dict) or not isinstance(stored, dict):
        raise ValueError("its tables are not dictionaries")
    places = {_place(_fields(index)): _fields(info) for index, info in stored.items()}
    return {
        text(name): _tensor(text(name), _fields(storage), places)
        for name, storage in described.items()
        if isinstance(storage, Instance) and storage.name.endswith(".TensorStorageMetadata")
    }


def _place(index: Mapping[object, object]) -> tuple[str, Offsets]:
    return text(index["fqn"]), extents(index.get("offset") or ())


def _tensor(
    name: str,
    storage: Mapping[object, object],
    places: Mapping[tuple[str, Offsets], Mapping[object, object]],
) -> _Sharded:
    chunks = storage["chunks"]
    if not isinstance(chunks, list):
        raise ValueError("a tensor's parts are not a list")
    parts = (_part(name, _fields(chunk), places) for chunk in chunks)
    return _Sharded(extents(storage["size"]), tuple(parts))


def _part(
    name: str,
    chunk: Mapping[object, object],
    places: Mapping[tuple[str, Offsets], Mapping[object, object]],
) -> _Part:
    offsets, sizes = extents(chunk["offsets"]), extents(chunk["sizes"])
    info = places.get((name, offsets))
    if info is None:
        return _Part(offsets, sizes)
    file, start, length = info["relative_path"], info["offset"], info["length"]
    if type(start) is not int or type(length) is not int or min(start, length) < 0:
        raise ValueError("a part has no place in its file")
    plain = not info.get("transform_descriptors")
    return _Part(offsets, sizes, _inside(file), start, length, plain)


def _inside(file: object) -> str:
    """A path that cannot lead out of the folder."""
    if not isinstance(file, str) or os.path.isabs(file) or ".." in file.split("/"):
        raise ValueError("a part lies outside the folder")
    return file


def _tree(tensors: Mapping[str, _Sharded], paths: object) -> dict[object, object]:
    """The nested state dict that was saved, with a record in the place of each tensor.

    Where its paths were not kept, only what is an optimizer's is told apart.
    """
    tree: dict[object, object] = {}
    for name, tensor in tensors.items():
        path = paths.get(name) if isinstance(paths, dict) else None
        if not isinstance(path, tuple) or not path:
            first, _, rest = name.partition(".")
            path = (first, rest) if rest and is_optimizer_name(first) else (name,)
        _put(tree, path, TensorRecord(StorageRecord("", name, 0), 0, tensor.shape, ()))
    return tree


def _put(tree: dict[object, object], path: tuple[object, ...], record: TensorRecord) -> None:
    for part in path[:-1]:
        inner = tree.setdefault(part, {})
        if not isinstance(inner, dict):
            raise ValueError("its names contradict each other")
        tree = inner
    tree[path[-1]] = record


# --- where the parts lie --------------------------------------------------------------------------


def _add(found: _Found, name: str, part: PartOf, tensor: _Sharded) -> None:
    if fault := tensor.fault():
        message = f"tensor {quoted(name)} is not whole: {fault}. Save the checkpoint again"
        found.contents.failures.append(Failure("malformed", message))
    for number, block in enumerate(tensor.parts):
        shown = name if len(tensor.parts) == 1 else f"part{number}/{name}"
        item = _located(found, shown, block)
        found.contents.add(replace(item, part=part) if isinstance(item, TensorRef) else item)


def _located(found: _Found, name: str, block: _Part) -> TensorRef | Skipped:
    """The address of a part, or why there is none."""
    if not block.file:
        return Skipped(name, "its .metadata does not say where it lies")
    if not block.plain:
        return Skipped(name, "saved with a transformation (compressed or quantised)")
    path = os.path.join(found.folder, block.file)
    try:
        found.stamps.setdefault(path, stamp(path))
        if block.start + block.length > found.stamps[path][0]:
            return Skipped(name, f"{block.file} ends before it: the file is incomplete")
        with open(path, "rb") as file:
            return _tensor_in(Source(file, path, found.stamps[path]), name, block)
    except InputError as error:
        return Skipped(name, f"{block.file}: {error.message}")
    except OSError as error:
        return Skipped(name, f"{block.file} cannot be read: {error.strerror}")


def _tensor_in(source: Source, name: str, block: _Part) -> TensorRef | Skipped:
    """The tensor of a torch.save file that is a part of another file."""
    archive = read_archive(source.file, source.path, block.start, block.length)
    saved = TorchArchive(source, archive, roots_of(archive, "data.pkl")[0])
    record = saved.unpickled("data.pkl").value
    if not isinstance(record, TensorRecord):
        return Skipped(name, "its part of the file holds no tensor")
    if record.shape != block.sizes and not record.unreadable:
        return Skipped(name, f"has shape {list(record.shape)} where .metadata says {block.sizes}")
    return address(name, record, source.path, saved.storages("data"))
