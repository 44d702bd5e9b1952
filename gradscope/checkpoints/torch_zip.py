"""Torch's zip files: a pickle, and a stored member for each storage.

``torch.save`` writes them, and ``torch.jit.save``, whose archives have ``constants.pkl`` and
``code/`` beside the pickle.
"""

from __future__ import annotations

from dataclasses import dataclass

from gradscope.checkpoints.integrity import checksum_of
from gradscope.checkpoints.statedict import choose_tensors
from gradscope.checkpoints.tensors import DTYPE_BITS
from gradscope.checkpoints.torch_contents import STORAGE_DTYPES, Contents, Region, Source
from gradscope.checkpoints.torch_pickle import StorageRecord, read_torch_pickle
from gradscope.checkpoints.tree import Budget, collect_tensors
from gradscope.containers.pickles import MAX_PICKLE_BYTES, Unpickled
from gradscope.containers.zip import Archive, Member
from gradscope.errors import InputError
from gradscope.text import escaped, quoted

_MAX_TEXT_BYTES = 4096


def read_saved(source: Source, archive: Archive, key: str | None) -> Contents:
    """The tensors of a torch.save or TorchScript archive. Raises InputError and UsageError."""
    roots = roots_of(archive, "data.pkl")
    if len(roots) != 1:
        raise _unknown(source, archive)
    saved = TorchArchive(source, archive, roots[0])
    compiled = saved.has("constants.pkl")
    pickled = saved.unpickled("data.pkl")
    found = Contents(source.path, "torchscript" if compiled else "torch-zip")
    storages = saved.storages("data")
    if compiled and key is None:
        found.add_tensors(collect_tensors(pickled.value, budget_for(pickled)), storages)
        _add_constants(found, saved)
    else:
        chosen = choose_tensors(pickled.value, key, source.path, budget_for(pickled))
        found.add_state_dict(chosen, storages)
        found.add_names(pickled.names)
    return found


def roots_of(archive: Archive, name: str) -> list[str]:
    """The top-level folders (with a slash, or nothing) that have a member of this name."""
    ends = (member[: -len(name)] for member in archive.members if member.endswith(name))
    return [root for root in ends if root.count("/") <= 1 and root[-1:] in ("", "/")]


def _unknown(source: Source, archive: Archive) -> InputError:
    if roots_of(archive, "model.json") and roots_of(archive, "attributes.pkl"):
        what = "is a TorchScript archive of torch before 1.4. Load it with torch.jit.load"
        return InputError(source.path, "unsupported", f"{what} and save its state_dict()")
    what = "is a zip archive, but not one of torch: it has no data.pkl and no exported program"
    return InputError(source.path, "unsupported", what)


def _add_constants(found: Contents, saved: TorchArchive) -> None:
    """Tensors that the compiled code holds: all weights, once a module was frozen."""
    pickled = saved.unpickled("constants.pkl")
    constants = collect_tensors(pickled.value, budget_for(pickled))
    found.add_tensors(constants, saved.storages("constants"), prefix="constants.")
    if constants:
        found.notes.append(
            f"the tensors constants.N ({len(constants):,}) belong to the compiled code, not to the "
            "state dict"
        )


def budget_for(pickled: Unpickled) -> Budget:
    """Enough for looking for a state dict, which lists everything a few times over."""
    return Budget(32 * pickled.steps + 1000)


@dataclass(frozen=True, slots=True)
class TorchArchive:
    """A zip archive whose members lie below ``root``, a folder with its slash, or nothing."""

    source: Source
    archive: Archive
    root: str

    def has(self, name: str) -> bool:
        """Whether there is a member of this name below the root."""
        return self.root + name in self.archive.members

    def read(self, name: str, longest: int) -> bytes:
        """The bytes of a small stored member below the root."""
        return self.archive.read(self.source.file, self.root + name, longest)

    def unpickled(self, name: str) -> Unpickled:
        """A pickled member."""
        data = self.read(name, MAX_PICKLE_BYTES)
        return read_torch_pickle(data, self.source.path, escaped(self.root + name))

    def storages(self, folder: str) -> ZipStorages:
        """The storages in a folder below the root."""
        big_endian = self._byte_order() == b"big"
        return ZipStorages(self.source.path, self.archive, self.root + folder, big_endian)

    def _byte_order(self) -> bytes:
        if not self.has("byteorder"):
            return b"little"
        order = self.read("byteorder", _MAX_TEXT_BYTES).strip()
        if order not in (b"little", b"big"):
            message = f"byteorder says {escaped(repr(order), 120)}, not little or big"
            raise InputError(self.source.path, "malformed", message)
        return order


@dataclass(frozen=True, slots=True)
class ZipStorages:
    """Storages that are members of a zip archive: ``<folder>/<key>``."""

    path: str
    archive: Archive
    folder: str
    big_endian: bool

    def locate(self, storage: StorageRecord) -> Region:
        """Where a storage's bytes lie. Raises InputError when it is missing or too short."""
        member = self.archive.stored(f"{self.folder}/{storage.key}")
        dtype = STORAGE_DTYPES.get(storage.kind)
        declared = storage.numel * (DTYPE_BITS[dtype] // 8 if dtype else 1)
        if declared > member.size:
            raise InputError(
                self.path,
                "malformed",
                f"member {quoted(member.name)} has {member.size:,} bytes where its pickle "
                f"declares {declared:,}. Save the file again",
            )
        return region_of(member, self.path)


def region_of(member: Member, path: str) -> Region:
    """A whole stored member."""
    return Region(member.offset, member.size, checksum_of(member, path))
