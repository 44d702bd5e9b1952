"""Listing the tensors of torch's containers without torch and without executing their pickles."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import BinaryIO, Protocol

from gradscope.checkpoints.archive import Archive, read_archive
from gradscope.checkpoints.files import Stamp, stamp
from gradscope.checkpoints.statedict import (
    Budget,
    Choice,
    NamedTensors,
    choose_tensors,
    collect_tensors,
)
from gradscope.checkpoints.tensors import (
    DTYPE_BITS,
    Checkpoint,
    Failure,
    Problem,
    Skipped,
    TensorRef,
)
from gradscope.checkpoints.unpickle import (
    MAX_PICKLE_BYTES,
    StorageRecord,
    TensorRecord,
    Unpickled,
    printable,
    read_pickle,
)
from gradscope.errors import InputError, UsageError

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_START = b"\x8a\x0a" + _LEGACY_MAGIC.to_bytes(10, "little") + b"."
_LEGACY_PROTOCOL = 1001
_MAX_JSON_BYTES = 256 << 20
_MAX_TEXT_BYTES = 4096
#: An expanded view repeats its elements; beyond this many, analysing them all is pointless.
_MAX_REPEATED = 1 << 24

_STORAGE_DTYPES: Mapping[str, str] = {
    "BoolStorage": "BOOL", "ByteStorage": "U8", "CharStorage": "I8", "ShortStorage": "I16",
    "IntStorage": "I32", "LongStorage": "I64", "HalfStorage": "F16", "BFloat16Storage": "BF16",
    "FloatStorage": "F32", "DoubleStorage": "F64", "ComplexFloatStorage": "C64",
    "ComplexDoubleStorage": "C128",
}  # fmt: skip
_DTYPES: Mapping[str, str] = {
    "bool": "BOOL", "uint8": "U8", "int8": "I8", "uint16": "U16", "int16": "I16", "uint32": "U32",
    "int32": "I32", "uint64": "U64", "int64": "I64", "float16": "F16", "bfloat16": "BF16",
    "float32": "F32", "float64": "F64", "complex64": "C64", "complex128": "C128",
    "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "float8_e4m3fnuz": "F8_E4M3FNUZ",
    "float8_e5m2fnuz": "F8_E5M2FNUZ", "float8_e8m0fnu": "F8_E8M0",
}  # fmt: skip
_OTHER_ITEMSIZES: Mapping[str, int] = {
    "UntypedStorage": 1, "QInt8Storage": 1, "QUInt8Storage": 1, "QInt32Storage": 4,
    "QUInt4x2Storage": 1, "QUInt2x4Storage": 1,
}  # fmt: skip
#: torch._export.serde.schema.ScalarType
_EXPORT_DTYPES: Mapping[int, str] = {
    1: "U8", 2: "I8", 3: "I16", 4: "I32", 5: "I64", 6: "F16", 7: "F32", 8: "F64", 10: "C64",
    11: "C128", 12: "BOOL", 13: "BF16", 28: "U16", 29: "F8_E4M3", 30: "F8_E5M2",
    31: "F8_E4M3FNUZ", 32: "F8_E5M2FNUZ", 33: "F8_E8M0", 34: "U32", 35: "U64",
}  # fmt: skip


def read_torch(path: str, key: str | None = None) -> Checkpoint:
    """The tensors of a file made by torch.save, torch.jit.save or torch.export.save.

    ``key`` is the dotted path of the entry to read; without it, the model's state dict is looked
    for and ``notes`` says what was taken. Identical views of the same bytes (tied weights) are
    listed once; ``metadata["tied"]`` maps each other name to the one kept. Raises InputError when
    the file cannot be read as data alone, UsageError when there is no such ``key``.
    """
    before = stamp(path)
    try:
        with open(path, "rb") as file:
            return _checkpoint(_Source(file, path, before), key)
    except (InputError, UsageError):
        raise
    except OSError as error:
        raise InputError(path, "missing", f"cannot be read: {error.strerror or error}") from None
    # Fields of the wrong type or size surface as these wherever they are first used.
    except (ValueError, TypeError, LookupError, ArithmeticError, AttributeError) as error:
        raise InputError(path, "malformed", f"not a valid torch file: {_said(error)}") from None
    except (MemoryError, RecursionError) as error:
        reason = f"not a valid torch file: it is nested or sized beyond reason ({_said(error)})"
        raise InputError(path, "malformed", reason) from None
    except struct.error as error:
        raise InputError(path, "malformed", f"not a valid torch file: {error}") from None


def _said(error: Exception) -> str:
    if isinstance(error, KeyError):
        return f"it has no entry {printable(str(error))}"
    return printable(str(error)) or type(error).__name__


@dataclass(frozen=True, slots=True)
class _Source:
    """An open file and what is known about it."""

    file: BinaryIO
    path: str
    stamp: Stamp

    @property
    def size(self) -> int:
        return self.stamp[0]

    def at(self, offset: int, count: int) -> bytes:
        self.file.seek(offset)
        return self.file.read(count)


@dataclass(frozen=True, slots=True)
class _Region:
    """Where a storage's bytes lie in the file."""

    offset: int
    nbytes: int


class _Storages(Protocol):
    """Finds the bytes of a storage."""

    @property
    def big_endian(self) -> bool: ...

    def locate(self, storage: StorageRecord) -> _Region: ...


@dataclass(slots=True)
class _Found:
    """What one container yields, in the making."""

    format: str
    tensors: list[TensorRef] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    metadata: dict[str, object] = field(default_factory=dict)


def _checkpoint(source: _Source, key: str | None) -> Checkpoint:
    found = _read_container(source, key)
    tensors, tied = _untied(found.tensors)
    if tied:
        found.metadata["tied"] = tied
        found.notes.append(_tied_note(tied))
    return Checkpoint(
        path=source.path,
        format=found.format,
        nbytes=source.size,
        tensors=tensors,
        problems=tuple(found.problems),
        skipped=tuple(found.skipped),
        failures=tuple(found.failures),
        notes=tuple(found.notes),
        metadata=found.metadata,
        stamps={source.path: source.stamp},
    )


def _read_container(source: _Source, key: str | None) -> _Found:
    start = source.at(0, 512)
    if start.startswith(b"PK"):
        return _read_zip(source, key)
    # Protocol 4 and up put a frame in front; 0 and 1 spell the number in decimal.
    if _LEGACY_START in start[:32] or start.startswith(b"L%dL" % _LEGACY_MAGIC):
        return _read_legacy(source, key)
    raise _unrecognised(source, start)


def _unrecognised(source: _Source, start: bytes) -> InputError:
    """Why a file that is neither a zip nor a legacy torch file is refused."""
    if not start:
        return InputError(source.path, "truncated", "is empty. Copy or download it again")
    if start[:1] == b"\x80" and len(start) < 2 + len(_LEGACY_START):
        return InputError(source.path, "truncated", "ends inside its first bytes")
    if start[257:262] == b"ustar" or start.startswith((b"storages\0", b"tensors\0", b"pickle\0")):
        return InputError(
            source.path,
            "unsupported",
            "is a tar file, as torch before 0.1.10 saved. Load it with torch "
            "(torch.load(path, weights_only=False), if you trust it) and save the state dict again",
        )
    if start[:1] == b"\x80":
        return InputError(
            source.path,
            "unsupported",
            "is a bare pickle, not a file that torch.save made. In the environment that made it, "
            "save its tensors with torch.save or safetensors",
        )
    return InputError(source.path, "malformed", "is no torch file: neither a zip nor a pickle")


# --- tensors over storages ------------------------------------------------------------------------


def _add_choice(
    found: _Found, source: _Source, choice: Choice, storages: _Storages, prefix: str = ""
) -> None:
    found.notes.extend(choice.notes)
    found.skipped.extend(choice.skipped)
    found.metadata.update(choice.scalars)
    _add_tensors(found, source, choice.tensors, storages, prefix)


def _add_tensors(
    found: _Found, source: _Source, tensors: NamedTensors, storages: _Storages, prefix: str = ""
) -> None:
    taken = dict.fromkeys((ref.name for ref in found.tensors), 1)
    for inner, record in tensors:
        name = _unique(prefix + inner, taken, found)
        _add(found, _address(name, record, source, storages))


def _add(found: _Found, item: TensorRef | Skipped) -> None:
    if isinstance(item, TensorRef):
        found.tensors.append(item)
    else:
        found.skipped.append(item)


def _unique(name: str, taken: dict[str, int], found: _Found) -> str:
    """Nested names can collide with dotted ones: ``{"a.b": …, "a": {"b": …}}``."""
    if name not in taken:
        taken[name] = 1
        return name
    if taken[name] == 1:
        found.problems.append(_collision(name))
    free = name
    while free in taken:
        taken[name] += 1
        free = f"{name}#{taken[name]}"
    taken[free] = 1
    return free


def _collision(name: str) -> Problem:
    message = f"several entries of the file lead to the tensor name {printable(name)}"
    return Problem("duplicate-tensor-name", name, message, "save a flat state dict")


def _address(
    name: str, record: TensorRecord, source: _Source, storages: _Storages
) -> TensorRef | Skipped:
    """Where a tensor's elements lie, or why it is not analysed."""
    if record.unreadable or record.storage is None:
        return Skipped(name, record.unreadable or "tensor without a storage")
    dtype = _dtype(record, record.storage)
    if dtype is None:
        spelled = (record.dtype or record.storage.kind).removeprefix("torch.")
        return Skipped(name, f"dtype {printable(spelled)} is not supported")
    region = storages.locate(record.storage)
    view = _Strided(dtype, record.shape, record.strides, record.offset)
    return _placed(name, view, region, source.path, storages.big_endian)


def _dtype(record: TensorRecord, storage: StorageRecord) -> str | None:
    if record.dtype is not None:
        return _DTYPES.get(record.dtype.removeprefix("torch."))
    return _STORAGE_DTYPES.get(storage.kind)


@dataclass(frozen=True, slots=True)
class _Strided:
    """A view of a storage, in elements."""

    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int

    @property
    def itemsize(self) -> int:
        return DTYPE_BITS[self.dtype] // 8

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def end(self) -> int:
        """One more than the largest element index reached; 0 when there are no elements."""
        if self.numel == 0:
            return 0
        steps = zip(self.shape, self.strides, strict=True)
        return self.offset + sum((size - 1) * stride for size, stride in steps) + 1

    def needed_strides(self) -> tuple[int, ...] | None:
        """None when elements follow each other in row-major order."""
        expected = 1
        for size, stride in zip(reversed(self.shape), reversed(self.strides), strict=True):
            if size != 1 and stride != expected:
                return self.strides if self.numel else None
            expected *= size
        return None


def _placed(
    name: str, view: _Strided, region: _Region, path: str, big_endian: bool
) -> TensorRef | Skipped:
    if view.numel >= 1 << 63:
        raise InputError(path, "malformed", f"tensor {printable(name)} has an impossible shape")
    end = view.end() * view.itemsize
    if end > region.nbytes:
        raise InputError(
            path,
            "malformed",
            f"tensor {printable(name)} reaches byte {end} of a storage that has only "
            f"{region.nbytes}. Save the file again",
        )
    if view.numel > max(_MAX_REPEATED, region.nbytes // view.itemsize):
        return Skipped(name, f"an expanded view: {view.numel} elements that repeat a few bytes")
    offset = region.offset + (view.offset * view.itemsize if view.numel else 0)
    return TensorRef(
        name=name,
        dtype=view.dtype,
        shape=view.shape,
        file=path,
        offset=offset,
        strides=view.needed_strides(),
        big_endian=big_endian,
    )


def _untied(tensors: Iterable[TensorRef]) -> tuple[tuple[TensorRef, ...], dict[str, str]]:
    """The tensors without exact aliases, and alias -> kept name."""
    kept: dict[object, TensorRef] = {}
    tied: dict[str, str] = {}
    for ref in tensors:
        # Tensors without elements share nothing, wherever they point.
        where = (ref.offset, ref.shape, ref.strides, ref.dtype) if ref.numel else ref.name
        first = kept.setdefault(where, ref)
        if first is not ref:
            tied[ref.name] = first.name
    return tuple(kept.values()), tied


def _tied_note(tied: Mapping[str, str]) -> str:
    pairs = [f"{printable(a)} is tied to {printable(b)}" for a, b in list(tied.items())[:5]]
    more = f" and {len(tied) - 5} more" if len(tied) > 5 else ""
    return f"counted once: {', '.join(pairs)}{more}"


# --- zip containers -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Members:
    """Storages that are members of a zip archive: ``<folder>/<key>``."""

    source: _Source
    archive: Archive
    folder: str

    big_endian: bool

    def locate(self, storage: StorageRecord) -> _Region:
        member = self.archive.stored(f"{self.folder}/{storage.key}")
        dtype = _STORAGE_DTYPES.get(storage.kind)
        declared = storage.numel * (DTYPE_BITS[dtype] // 8 if dtype else 1)
        if declared > member.size:
            raise InputError(
                self.source.path,
                "malformed",
                f"member {printable(member.name)} has {member.size} bytes where its pickle "
                f"declares {declared}. Save the file again",
            )
        return _Region(member.offset, member.size)


def _read_zip(source: _Source, key: str | None) -> _Found:
    archive = read_archive(source.file, source.path, 0, source.size)
    if _roots(archive, "archive_format") or _roots(archive, "models/model.json"):
        return _read_export(source, archive, key)
    if "serialized_exported_program.json" in archive.members:
        return _read_old_export(source, archive, key)
    roots = _roots(archive, "data.pkl")
    if len(roots) == 1:
        return _read_saved(source, archive, roots[0], key)
    raise _unknown_archive(source, archive)


def _roots(archive: Archive, name: str) -> list[str]:
    """The top-level folders (with a slash, or nothing) that have a member of this name."""
    ends = (member[: -len(name)] for member in archive.members if member.endswith(name))
    return [root for root in ends if root.count("/") <= 1 and root[-1:] in ("", "/")]


def _unknown_archive(source: _Source, archive: Archive) -> InputError:
    if _roots(archive, "model.json") and _roots(archive, "attributes.pkl"):
        what = "is a TorchScript archive of torch before 1.4. Load it with torch.jit.load"
        return InputError(source.path, "unsupported", f"{what} and save its state_dict()")
    what = "is a zip archive, but not one of torch: it has no data.pkl and no exported program"
    return InputError(source.path, "unsupported", what)


def _read_saved(source: _Source, archive: Archive, root: str, key: str | None) -> _Found:
    """A torch.save archive, or a TorchScript one: that has ``code/`` beside ``data.pkl``."""
    compiled = f"{root}constants.pkl" in archive.members
    pickled = _pickle_member(source, archive, f"{root}data.pkl", compiled)
    storages = _members(source, archive, root, "data")
    budget = _budget(pickled)
    if not compiled:
        found = _Found("torch-zip")
        _add_choice(
            found, source, choose_tensors(pickled.value, key, source.path, budget), storages
        )
        return found
    found = _Found("torchscript")
    if key is not None:
        _add_choice(
            found, source, choose_tensors(pickled.value, key, source.path, budget), storages
        )
        return found
    _add_tensors(found, source, collect_tensors(pickled.value, budget), storages)
    _add_constants(found, source, archive, root)
    return found


def _add_constants(found: _Found, source: _Source, archive: Archive, root: str) -> None:
    """Tensors that the compiled code holds: all weights, once a module was frozen."""
    pickled = _pickle_member(source, archive, f"{root}constants.pkl", compiled=True)
    constants = collect_tensors(pickled.value, _budget(pickled))
    storages = _members(source, archive, root, "constants")
    _add_tensors(found, source, constants, storages, prefix="constants.")
    if constants:
        found.notes.append(
            f"the tensors constants.N ({len(constants)}) belong to the compiled code, not to the "
            "state dict"
        )


def _pickle_member(source: _Source, archive: Archive, name: str, compiled: bool) -> Unpickled:
    data = archive.read(source.file, name, MAX_PICKLE_BYTES)
    allow = _is_compiled_class if compiled else _is_nothing
    return read_pickle(data, source.path, printable(name), allow=allow)


def _is_compiled_class(name: str) -> bool:
    return name.startswith("__torch__.")


def _is_nothing(_name: str) -> bool:
    return False


def _members(source: _Source, archive: Archive, root: str, folder: str) -> _Members:
    order = f"{root}byteorder"
    text = b"little"
    if order in archive.members:
        text = archive.read(source.file, order, _MAX_TEXT_BYTES).strip()
    if text not in (b"little", b"big"):
        raise InputError(source.path, "malformed", f"byteorder says {printable(repr(text))}")
    return _Members(source, archive, f"{root}{folder}", text == b"big")


def _budget(pickled: Unpickled) -> Budget:
    # Looking for the state dict lists everything a few times over.
    return Budget(32 * pickled.steps + 1000)


# --- torch.export archives ------------------------------------------------------------------------


def _read_export(source: _Source, archive: Archive, key: str | None) -> _Found:
    """``data/weights/*_weights_config.json`` and raw bytes, or one pickled state dict per model."""
    found = _Found("pt2")
    root = _roots(archive, "archive_format")[0] if _roots(archive, "archive_format") else ""
    _refuse_key(key, source)
    models = _models(archive, f"{root}data/weights/")
    for kind, folder in (("weights", "weights"), ("constants", "constants")):
        for model in models:
            prefix = f"{model}." if len(models) > 1 else ""
            base = f"{root}data/{folder}/"
            _add_payloads(found, source, archive, base, f"{model}_{kind}_config.json", prefix)
            _add_nested(found, source, archive, f"{base}{model}.pt", prefix)
    if not models:
        raise InputError(
            source.path,
            "unsupported",
            "is a .pt2 archive without torch.export weights (compiled code only?). Save the "
            "program with torch.export.save",
        )
    return found


def _refuse_key(key: str | None, source: _Source) -> None:
    if key is not None:
        raise UsageError(
            f"--key {printable(key)}: {source.path} is an exported program; it has none"
        )


def _models(archive: Archive, folder: str) -> list[str]:
    ends = ("_weights_config.json", ".pt")
    names = [m.removeprefix(folder) for m in archive.members if m.startswith(folder)]
    return sorted({n.removesuffix(end) for n in names for end in ends if n.endswith(end)})


def _add_payloads(
    found: _Found, source: _Source, archive: Archive, base: str, config: str, prefix: str
) -> None:
    if base + config not in archive.members:
        return
    storages = _members(source, archive, base.split("data/")[0], "data")
    for name, payload in _payloads(source, archive, base + config):
        shown = prefix + name.encode("utf-8", "backslashreplace").decode()
        item = _payload(shown, payload, source, archive, base, storages.big_endian)
        _add(found, item)


def _payloads(source: _Source, archive: Archive, name: str) -> Iterator[tuple[str, object]]:
    document = json.loads(archive.read(source.file, name, _MAX_JSON_BYTES))
    config = document["config"]
    if not isinstance(config, dict):
        raise ValueError(f"{name} has no table of tensors")
    yield from config.items()


def _payload(
    name: str, payload: object, source: _Source, archive: Archive, base: str, big_endian: bool
) -> TensorRef | Skipped:
    if not isinstance(payload, dict):
        raise ValueError(f"tensor {printable(name)} has no description")
    if payload.get("use_pickle") or payload.get("tensor_meta") is None:
        return Skipped(name, "saved as a pickled Python object, which gradscope never executes")
    meta = payload["tensor_meta"]
    dtype = _EXPORT_DTYPES.get(meta["dtype"])
    if dtype is None:
        return Skipped(name, f"dtype code {meta['dtype']!r} is not supported")
    if not all("as_int" in size for size in (*meta["sizes"], *meta["strides"])):
        return Skipped(name, "its shape is symbolic")
    sizes, strides = (tuple(_count(n) for n in meta[part]) for part in ("sizes", "strides"))
    view = _Strided(dtype, sizes, strides, _count(meta["storage_offset"]))
    member = archive.stored(f"{base}{payload['path_name']}")
    if view.numel and not member.size:
        return Skipped(name, "saved without values")
    region = _Region(member.offset, member.size)
    return _placed(name, view, region, source.path, big_endian)


def _count(number: Mapping[str, object]) -> int:
    value = number["as_int"]
    if type(value) is not int or not 0 <= value < 1 << 63:
        raise ValueError("a tensor's size, stride or offset is not a whole number")
    return value


def _read_old_export(source: _Source, archive: Archive, key: str | None) -> _Found:
    """torch.export.save before 2.8: the state dict is a torch.save file inside the archive."""
    _refuse_key(key, source)
    found = _Found("pt2")
    for name, prefix in (("serialized_state_dict.pt", ""), ("serialized_constants.pt", "")):
        _add_nested(found, source, archive, name, prefix)
    if "serialized_state_dict.json" in archive.members:
        message = "is an exported program of torch before 2.2; export it again with a newer torch"
        raise InputError(source.path, "unsupported", message)
    return found


def _add_nested(found: _Found, source: _Source, archive: Archive, name: str, prefix: str) -> None:
    """The tensors of a torch.save file that is itself a stored member."""
    if name not in archive.members or not archive.members[name].size:
        return
    member = archive.stored(name)
    try:
        inner = read_archive(source.file, source.path, member.offset, member.size)
        root = _roots(inner, "data.pkl")[0]
        pickled = _pickle_member(source, inner, f"{root}data.pkl", compiled=False)
    except InputError as error:
        message = f"{printable(name)} inside the archive: {error.message}"
        found.failures.append(Failure(error.kind, message))
        return
    storages = _members(source, inner, root, "data")
    _add_tensors(found, source, collect_tensors(pickled.value, _budget(pickled)), storages, prefix)


# --- legacy files ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Sequence:
    """The storages of a legacy file, which follow its pickles one after the other."""

    regions: Mapping[str, _Region]
    big_endian: bool = False

    def locate(self, storage: StorageRecord) -> _Region:
        region = self.regions.get(storage.key)
        if region is None:
            raise ValueError(f"storage {printable(storage.key)} is missing")
        if storage.view is None:
            return region
        _, offset, numel = storage.view
        item = _storage_itemsize(storage)
        if (offset + numel) * item > region.nbytes:
            raise ValueError(f"a view of storage {printable(storage.key)} lies outside it")
        return _Region(region.offset + offset * item, numel * item)


def _read_legacy(source: _Source, key: str | None) -> _Found:
    source.file.seek(0)
    if _next(source, "its magic number").value != _LEGACY_MAGIC:
        raise ValueError("its magic number is wrong")
    if _next(source, "its protocol number").value != _LEGACY_PROTOCOL:
        raise ValueError("its protocol number is unknown")
    _next(source, "its description of the system")
    pickled = _next(source, "its pickle")
    keys = _next(source, "its list of storages")
    # Storages are always little-endian here: torch swaps bytes on other machines.
    storages = _Sequence(_sequence(source, keys, pickled.storages))
    found = _Found("torch-legacy")
    choice = choose_tensors(pickled.value, key, source.path, _budget(pickled))
    _add_choice(found, source, choice, storages)
    return found


def _next(source: _Source, where: str) -> Unpickled:
    """The pickle at the file's position, which is left after it."""
    pickled = read_pickle(source.file, source.path, where, end=source.size)
    source.file.seek(pickled.end)
    return pickled


def _sequence(
    source: _Source, keys: Unpickled, storages: Mapping[str, StorageRecord]
) -> dict[str, _Region]:
    if not isinstance(keys.value, list):
        raise ValueError("its list of storages is none")
    regions: dict[str, _Region] = {}
    at = keys.end
    for raw_key in keys.value:
        storage = storages.get(str(raw_key)) if isinstance(raw_key, (str, int)) else None
        if storage is None or storage.key in regions:
            raise ValueError("it lists a storage twice, or one that its pickle does not use")
        region = _next_region(source, at, storage)
        regions[storage.key] = region
        at = region.offset + region.nbytes
    return regions


def _next_region(source: _Source, at: int, storage: StorageRecord) -> _Region:
    count = source.at(at, 8)
    nbytes = _storage_itemsize(storage) * int.from_bytes(count, "little", signed=True)
    shown = printable(storage.key)
    if len(count) < 8 or at + 8 + nbytes > source.size:
        raise InputError(
            source.path,
            "truncated",
            f"ends inside storage {shown}: the file is incomplete. Copy or download it again",
        )
    if nbytes < storage.numel * _storage_itemsize(storage):
        raise ValueError(f"storage {shown} is shorter than its pickle declares")
    return _Region(at + 8, nbytes)


def _storage_itemsize(storage: StorageRecord) -> int:
    if storage.kind in _OTHER_ITEMSIZES:
        return _OTHER_ITEMSIZES[storage.kind]
    dtype = _STORAGE_DTYPES.get(storage.kind)
    if dtype is None:
        raise ValueError(f"it has a storage of unknown type {printable(storage.kind)}")
    return DTYPE_BITS[dtype] // 8
