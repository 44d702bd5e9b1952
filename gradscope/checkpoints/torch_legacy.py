"""Torch's legacy files (before 1.6): five pickles, then the storages one after the other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from gradscope.checkpoints.leftover import leftover
from gradscope.checkpoints.statedict import choose_tensors
from gradscope.checkpoints.tensors import DTYPE_BITS
from gradscope.checkpoints.torch_contents import STORAGE_DTYPES, Contents, Region, Source
from gradscope.checkpoints.torch_magic import MAGIC
from gradscope.checkpoints.torch_pickle import StorageRecord, read_torch_pickle, storages_of
from gradscope.checkpoints.torch_zip import budget_for
from gradscope.containers.pickles import Unpickled
from gradscope.errors import InputError
from gradscope.text import quoted

_PROTOCOL = 1001
_OTHER_ITEMSIZES: Mapping[str, int] = {
    "UntypedStorage": 1, "QInt8Storage": 1, "QUInt8Storage": 1, "QInt32Storage": 4,
    "QUInt4x2Storage": 1, "QUInt2x4Storage": 1,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Concatenated:
    """The storages of a legacy file, which follow its pickles one after the other."""

    regions: Mapping[str, Region]
    big_endian: bool = False

    def locate(self, storage: StorageRecord) -> Region:
        """Where a storage's bytes lie. Raises ValueError when it is missing or too short."""
        region = self.regions.get(storage.key)
        if region is None:
            raise ValueError(f"storage {quoted(storage.key)} is missing")
        if storage.view is None:
            return region
        _, offset, numel = storage.view
        item = _storage_itemsize(storage)
        if (offset + numel) * item > region.nbytes:
            raise ValueError(f"a view of storage {quoted(storage.key)} lies outside it")
        return Region(region.offset + offset * item, numel * item)


def read_legacy(source: Source, key: str | None) -> Contents:
    """The tensors of a legacy file. Raises InputError, UsageError, and ValueError."""
    source.file.seek(0)
    if _next(source, "its magic number").value != MAGIC:
        raise ValueError("its magic number is wrong")
    if _next(source, "its protocol number").value != _PROTOCOL:
        raise ValueError("its protocol number is unknown")
    _next(source, "its description of the system")
    pickled = _next(source, "its pickle")
    keys = _next(source, "its list of storages")
    # Storages are always little-endian here: torch swaps bytes on other machines.
    storages = _Concatenated(_regions(source, keys, storages_of(pickled)))
    end = max((r.offset + r.nbytes for r in storages.regions.values()), default=keys.end)
    found = Contents(source.path, "torch-legacy")
    chosen = choose_tensors(pickled.value, key, source.path, budget_for(pickled))
    found.add_state_dict(chosen, storages)
    found.add_names(pickled.names)
    found.failures.extend(leftover(source.file, end, source.size, "the last storage"))
    return found


def _next(source: Source, where: str) -> Unpickled:
    """The pickle at the file's position, which is left after it."""
    pickled = read_torch_pickle(source.file, source.path, where, end=source.size)
    source.file.seek(pickled.end)
    return pickled


def _regions(
    source: Source, keys: Unpickled, storages: Mapping[str, StorageRecord]
) -> dict[str, Region]:
    if not isinstance(keys.value, list):
        raise ValueError("its list of storages is not a list")
    regions: dict[str, Region] = {}
    at = keys.end
    for raw_key in keys.value:
        storage = storages.get(str(raw_key)) if isinstance(raw_key, (str, int)) else None
        if storage is None or storage.key in regions:
            raise ValueError("it lists a storage twice, or one that its pickle does not use")
        region = _next_region(source, at, storage)
        regions[storage.key] = region
        at = region.offset + region.nbytes
    return regions


def _next_region(source: Source, at: int, storage: StorageRecord) -> Region:
    count = source.at(at, 8)
    nbytes = _storage_itemsize(storage) * int.from_bytes(count, "little", signed=True)
    shown = quoted(storage.key)
    if len(count) < 8 or at + 8 + nbytes > source.size:
        raise InputError(
            source.path,
            "truncated",
            f"ends inside storage {shown}: the file is incomplete. Copy or download it again",
        )
    if nbytes < storage.numel * _storage_itemsize(storage):
        raise ValueError(f"storage {shown} is shorter than its pickle declares")
    return Region(at + 8, nbytes)


def _storage_itemsize(storage: StorageRecord) -> int:
    if storage.kind in _OTHER_ITEMSIZES:
        return _OTHER_ITEMSIZES[storage.kind]
    dtype = STORAGE_DTYPES.get(storage.kind)
    if dtype is None:
        raise ValueError(f"it has a storage of unknown type {quoted(storage.kind)}")
    return DTYPE_BITS[dtype] // 8
