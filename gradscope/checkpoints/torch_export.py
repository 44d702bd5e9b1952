"""Exported programs (``torch.export.save``): weights as raw members, or a state dict inside."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from gradscope.checkpoints.tensors import Failure, Skipped, TensorRef
from gradscope.checkpoints.torch_contents import Contents, Source, Strided, placed
from gradscope.checkpoints.torch_zip import TorchArchive, budget_for, region_of, roots_of
from gradscope.checkpoints.tree import collect_tensors
from gradscope.containers.strict_json import MalformedError, parse_once
from gradscope.containers.zip import Archive, read_archive
from gradscope.errors import InputError, UsageError
from gradscope.text import escaped, quoted

_MAX_JSON_BYTES = 256 << 20
_OLD_PROGRAM = "serialized_exported_program.json"
#: torch._export.serde.schema.ScalarType
_EXPORT_DTYPES: Mapping[int, str] = {
    1: "U8", 2: "I8", 3: "I16", 4: "I32", 5: "I64", 6: "F16", 7: "F32", 8: "F64", 10: "C64",
    11: "C128", 12: "BOOL", 13: "BF16", 28: "U16", 29: "F8_E4M3", 30: "F8_E5M2",
    31: "F8_E4M3FNUZ", 32: "F8_E5M2FNUZ", 33: "F8_E8M0", 34: "U32", 35: "U64",
}  # fmt: skip


def is_export(archive: Archive) -> bool:
    """Whether an archive is an exported program."""
    return _is_of_folders(archive) or _OLD_PROGRAM in archive.members


def read_export(source: Source, archive: Archive, key: str | None) -> Contents:
    """The weights and constants of an exported program. Raises InputError and UsageError."""
    if key is not None:
        raise UsageError(
            f"--key {escaped(key)}: {source.path} is an exported program, which has no entries"
        )
    found = Contents(source.path, "pt2")
    if _is_of_folders(archive):
        roots = roots_of(archive, "archive_format") or [""]
        _read_folders(found, TorchArchive(source, archive, roots[0]))
    else:
        _read_old(found, TorchArchive(source, archive, ""))
    return found


def _is_of_folders(archive: Archive) -> bool:
    return bool(roots_of(archive, "archive_format") or roots_of(archive, "models/model.json"))


def _read_folders(found: Contents, program: TorchArchive) -> None:
    """``data/weights/*_weights_config.json`` and raw bytes, or one pickled state dict per model."""
    models = _models(program)
    for kind in ("weights", "constants"):
        for model in models:
            prefix = f"{model}." if len(models) > 1 else ""
            folder = f"data/{kind}/"
            _add_payloads(found, program, folder, f"{model}_{kind}_config.json", prefix)
            _add_nested(found, program, f"{folder}{model}.pt", prefix)
    if not models:
        raise InputError(
            found.path,
            "unsupported",
            "is a .pt2 archive without torch.export weights (compiled code only?). Save the "
            "program with torch.export.save",
        )


def _models(program: TorchArchive) -> list[str]:
    folder, ends = f"{program.root}data/weights/", ("_weights_config.json", ".pt")
    members = program.archive.members
    names = [m.removeprefix(folder) for m in members if m.startswith(folder)]
    return sorted({n.removesuffix(end) for n in names for end in ends if n.endswith(end)})


def _add_payloads(
    found: Contents, program: TorchArchive, folder: str, config: str, prefix: str
) -> None:
    if not program.has(folder + config):
        return
    big_endian = program.storages("data").big_endian
    for name, payload in _payloads(program, folder + config):
        shown = prefix + name.encode("utf-8", "backslashreplace").decode()
        found.add(_payload(shown, payload, program, folder, big_endian))


def _payloads(program: TorchArchive, name: str) -> Iterator[tuple[str, object]]:
    try:
        document = parse_once(program.read(name, _MAX_JSON_BYTES), escaped(program.root + name))
    except MalformedError as error:
        raise InputError(program.source.path, "malformed", f"{error}; export it again") from None
    config = document.get("config") if isinstance(document, dict) else None
    if not isinstance(config, dict):
        raise ValueError(f"{escaped(name)} has no table of tensors")
    yield from config.items()


def _payload(
    name: str, payload: object, program: TorchArchive, folder: str, big_endian: bool
) -> TensorRef | Skipped:
    if not isinstance(payload, dict):
        raise ValueError(f"tensor {quoted(name)} has no description")
    if payload.get("use_pickle") or payload.get("tensor_meta") is None:
        return Skipped(name, "saved as a pickled Python object, which gradscope never executes")
    meta = payload["tensor_meta"]
    dtype = _EXPORT_DTYPES.get(meta["dtype"])
    if dtype is None:
        return Skipped(name, f"dtype code {escaped(repr(meta['dtype']), 120)} is not supported")
    if not all("as_int" in extent for extent in (*meta["sizes"], *meta["strides"])):
        return Skipped(name, "its shape is symbolic")
    sizes, strides = (tuple(_whole(n) for n in meta[part]) for part in ("sizes", "strides"))
    view = Strided(dtype, sizes, strides, _whole(meta["storage_offset"]))
    member = program.archive.stored(f"{program.root}{folder}{payload['path_name']}")
    if view.numel and not member.size:
        return Skipped(name, "saved without values")
    path = program.source.path
    return placed(name, view, region_of(member, path), path, big_endian)


def _whole(number: Mapping[str, object]) -> int:
    value = number["as_int"]
    if type(value) is not int or not 0 <= value < 1 << 63:
        raise ValueError("a tensor's size, stride or offset is not a whole number")
    return value


def _read_old(found: Contents, program: TorchArchive) -> None:
    """torch.export.save before 2.8: the state dict is a torch.save file inside the archive."""
    for name in ("serialized_state_dict.pt", "serialized_constants.pt"):
        _add_nested(found, program, name, "")
    if program.has("serialized_state_dict.json"):
        message = "is an exported program of torch before 2.2; export it again with a newer torch"
        raise InputError(found.path, "unsupported", message)


def _add_nested(found: Contents, program: TorchArchive, name: str, prefix: str) -> None:
    """The tensors of a torch.save file that is itself a stored member."""
    if not program.has(name) or not program.archive.members[program.root + name].size:
        return
    source, member = program.source, program.archive.stored(program.root + name)
    try:
        inner = read_archive(source.file, source.path, member.offset, member.size)
        saved = TorchArchive(source, inner, roots_of(inner, "data.pkl")[0])
        pickled = saved.unpickled("data.pkl")
    except InputError as error:
        message = f"{escaped(member.name)} inside the archive: {error.message}"
        found.failures.append(Failure(error.kind, message))
        return
    tensors = collect_tensors(pickled.value, budget_for(pickled))
    found.add_tensors(tensors, saved.storages("data"), prefix)
