"""What a file is, by its content: the extension is never asked.

``sniff`` names a container that gradscope reads, or raises an InputError that names what the file
really is and what to do about it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from gradscope.checkpoints.files import stamp
from gradscope.checkpoints.safetensors import HEADER_CAP, human_size, listed, quoted, read_start
from gradscope.errors import InputError, InputKind

_START = 65_536
#: An index of shards is a few megabytes; more is not searched for its one telling key.
_JSON_CAP = 100_000_000
_FETCH_AGAIN = "fetch the file again and compare its size or SHA-256"
_SUPPORTED = "safetensors (also sharded), PyTorch .pt/.pth/.bin, NPZ and NPY"
_CONVERT = "load it where it was made and save the weights with safetensors"
_TORCH_MAGIC = (b"\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.", b"119547037146038801333356L")
_TABLE_MAGIC = bytes.fromhex("57fb808b247547db")
_CHECKPOINT_SUFFIXES = (".safetensors", ".index.json", ".bin", ".pt", ".pth", ".ckpt", ".npz")
_DCP_REMEDY = "python -m torch.distributed.checkpoint.format_utils dcp_to_torch {} out.pt"


@dataclass(frozen=True, slots=True)
class _File:
    path: str
    size: int
    start: bytes

    def unsupported(self, what: str, remedy: str) -> InputError:
        return InputError(self.path, "unsupported", f"{what}; {remedy}")


#: Says what a file is, raises where it is something that cannot be read, or passes (None).
_Recogniser = Callable[[_File], str | None]


def sniff(path: str) -> str:
    """The format of a checkpoint: a key of the table of readers, or ``folder``.

    Raises InputError for everything else: kind ``unsupported`` for another format, ``truncated``
    for a file that has no content (yet).
    """
    if os.path.isdir(path):
        return _sniff_folder(path)
    file = _File(path, stamp(path)[0], read_start(path, _START))
    for recognise in _RECOGNISERS:
        found = recognise(file)
        if found is not None:
            return found
    raise file.unsupported(
        f"not recognised: it begins with the bytes {file.start[:8].hex(' ')}",
        f"gradscope reads {_SUPPORTED}",
    )


# Files without content.


def _nothing(file: _File) -> str | None:
    if file.size == 0:
        raise InputError(file.path, "truncated", f"is empty (0 bytes); {_FETCH_AGAIN}")
    if not file.start.strip(b"\0"):
        what = "only zero bytes" if file.size <= _START else f"{_START:,} zero bytes at its start"
        message = (
            f"has {what} ({human_size(file.size)}): a download reserved the space and did not "
            f"fill it; {_FETCH_AGAIN}"
        )
        raise InputError(file.path, "truncated", message)
    return None


def _too_short(file: _File) -> str | None:
    if file.size < 8:
        message = f"is {human_size(file.size)}, too short for any checkpoint; {_FETCH_AGAIN}"
        raise InputError(file.path, "truncated", message)
    return None


# Containers that are read.


def _safetensors(file: _File) -> str | None:
    """A length, then JSON; a file with a damaged length or brace is still named by its header."""
    length, header = int.from_bytes(file.start[:8], "little"), file.start[8:].lstrip(b" \t\r\n")
    plausible = 0 < length <= HEADER_CAP and header.startswith(b"{")
    telling = not file.start.lstrip().startswith(b"{") and b'"data_offsets"' in header
    return "safetensors" if plausible or telling else None


def _numpy(file: _File) -> str | None:
    return "npy" if file.start.startswith(b"\x93NUMPY") else None


def _torch_legacy(file: _File) -> str | None:
    """PyTorch before 1.6 wrote several pickles in a row; the first is this number."""
    head = file.start[:64]
    return "torch-legacy" if any(magic in head for magic in _TORCH_MAGIC) else None


def _zip(file: _File) -> str | None:
    if file.start.startswith(b"PK\x05\x06"):
        raise file.unsupported("an empty zip archive", _FETCH_AGAIN)
    if not file.start.startswith((b"PK\x03\x04", b"PK\x07\x08PK\x03\x04")):
        return None
    return _zip_format(file, _member_names(file.path))


def _member_names(path: str) -> list[str]:
    import struct
    import zipfile

    try:
        with zipfile.ZipFile(path) as archive:
            return archive.namelist()
    except (zipfile.BadZipFile, ValueError, struct.error, NotImplementedError, EOFError) as error:
        message = (
            f"a zip archive whose directory, at its end, is missing or damaged ({error}): the "
            f"download or copy did not finish; {_FETCH_AGAIN}"
        )
        raise InputError(path, "truncated", message) from None
    except (OSError, OverflowError, MemoryError) as error:
        raise InputError(path, "malformed", f"a damaged zip archive ({error})") from None


def _zip_format(file: _File, names: list[str]) -> str:
    for found, fits in _ZIP_FORMATS:
        if fits(names):
            return found
    raise file.unsupported(*_foreign_zip(names))


def _is_pt2(names: list[str]) -> bool:
    return any(
        name == "serialized_exported_program.json"
        or name.rpartition("/")[2] == "archive_format"
        or re.fullmatch(r"(.*/)?models/[^/]*\.json", name)
        for name in names
    )


def _is_torchscript(names: list[str]) -> bool:
    return _has(names, "data.pkl") and (
        _has(names, "constants.pkl") or any("/code/" in name for name in names)
    )


def _has(names: Iterable[str], base: str) -> bool:
    return any(name == base or name.endswith("/" + base) for name in names)


_ZIP_FORMATS: tuple[tuple[str, Callable[[list[str]], bool]], ...] = (
    ("pt2", _is_pt2),
    ("torchscript", _is_torchscript),
    ("zip-torch", lambda names: _has(names, "data.pkl")),
    ("npz", lambda names: any(name.endswith(".npy") for name in names)),
)


def _foreign_zip(names: list[str]) -> tuple[str, str]:
    if _has(names, "model.weights.h5"):
        return "a Keras 3 model (.keras)", f"Keras is not read: {_CONVERT}"
    if any(name.endswith(".json") and "MODEL" in name.upper() for name in names) and _has(
        names, "MANIFEST.json"
    ):
        return "a TorchServe model archive (.mar)", "unzip it and give the weights file inside"
    inside = [name for name in names if name.endswith((".safetensors", ".pt", ".pth", ".bin"))]
    if inside:
        found = listed(inside, len(inside))
        return f"a zip archive with {found} inside", "unzip it and give that file"
    return (
        f"a zip archive without a checkpoint in it (members: {listed(names, len(names))})",
        f"gradscope reads {_SUPPORTED}",
    )


# Text: what a failed download leaves, and the index of shards.


def _lfs(file: _File) -> str | None:
    if not file.start.startswith(b"version https://git-lfs"):
        return None
    oid, size = (
        _after(file.start, key) for key in (rb"oid sha256:([0-9a-f]+)", rb"size (\d{1,18})\b")
    )
    promised = f" for {human_size(int(size))} ({int(size):,} bytes)" if size else ""
    digest = f" with SHA-256 {oid}" if oid else ""
    raise file.unsupported(
        f"a Git LFS pointer{promised}{digest}, not the file itself",
        "run `git lfs pull` in the repository (or download the file again)",
    )


def _after(data: bytes, pattern: bytes) -> str:
    match = re.search(pattern, data)
    return match.group(1).decode("ascii", "replace")[:64] if match else ""


def _markup(file: _File) -> str | None:
    text = file.start.removeprefix(b"\xef\xbb\xbf").lstrip()
    head = text[:512].lower()
    if head.startswith((b"<!doctype html", b"<html", b"<head", b"<body")) or b"<html" in head:
        remedy = "the download saved an error or login page: fetch the file again, signed in"
        raise file.unsupported(f"an HTML page{_said(text, b'title')}", remedy)
    if head.startswith((b"<?xml", b"<error")):
        remedy = f"probably the error message of a download: read it, then {_FETCH_AGAIN}"
        raise file.unsupported(f"an XML document{_said(text, b'message')}", remedy)
    return None


def _said(text: bytes, tag: bytes) -> str:
    match = re.search(rb"<%b[^>]*>\s*([^<]{1,100})" % tag, text, re.IGNORECASE)
    return f" ({quoted(_printable(match.group(1)))})" if match else ""


def _printable(data: bytes) -> str:
    text = " ".join(data.decode("utf-8", "replace").split())
    return "".join(char if char.isprintable() else "�" for char in text)


def _json(file: _File) -> str | None:
    if not file.start.removeprefix(b"\xef\xbb\xbf").lstrip().startswith((b"{", b"[")):
        return None
    if not _is_plain_text(file.start):
        return None
    if b'"weight_map"' in _whole(file):
        return "safetensors-index"
    error = _after(file.start, rb'"(?:error|message)"\s*:\s*"([^"]{1,64})').strip()
    if error:
        remedy = f"a server answered this instead of the file: {_FETCH_AGAIN}"
        raise file.unsupported(f"a JSON error message ({quoted(error)})", remedy)
    raise file.unsupported(
        "a JSON file that is no index of shards (it has no weight_map)",
        "give the weights file, its .index.json, or the folder",
    )


def _whole(file: _File) -> bytes:
    if file.size <= len(file.start) or file.size > _JSON_CAP or b'"weight_map"' in file.start:
        return file.start
    return read_start(file.path, _JSON_CAP)


def _is_plain_text(data: bytes) -> bool:
    """UTF-8 without control characters; a last character that was cut is forgiven."""
    try:
        text = data[:4096].decode("utf-8")
    except UnicodeDecodeError as error:
        if error.start < min(len(data), 4096) - 3:
            return False
        text = data[: error.start].decode("utf-8")
    return not any(char < " " and char not in "\t\n\r\f\x1b" for char in text)


def _text(file: _File) -> str | None:
    if not _is_plain_text(file.start):
        return None
    beginning = quoted(_printable(file.start[:200])[:60])
    raise file.unsupported(
        f"a text file that begins with {beginning}", f"gradscope reads {_SUPPORTED}"
    )


# Other formats.

_PACKED = "decompress it and give the file inside"
_GGUF = "quantised GGML models are not read: give the original safetensors"
_H5 = f"HDF5 is not read: {_CONVERT}"

#: Beginnings that name a format by themselves: bytes, what it is, what to do.
_MAGICS: tuple[tuple[bytes, str, str], ...] = (
    (b"GGUF", "a GGUF file (llama.cpp)", _GGUF),
    *((magic, "a GGML file (llama.cpp before GGUF)", _GGUF)
      for magic in (b"lmgg", b"fmgg", b"tjgg", b"algg", b"ggml", b"ggmf", b"ggjt", b"ggla")),
    (b"\x1f\x8b", "a gzip file", _PACKED),
    (b"\xfd7zXZ\0", "an xz file", _PACKED),
    (b"\x28\xb5\x2f\xfd", "a zstd file", _PACKED),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", _PACKED),
    (b"BZh", "a bzip2 file", _PACKED),
    (b"\x04\x22\x4d\x18", "an LZ4 file", _PACKED),
    (b"Rar!\x1a\x07", "a RAR archive", _PACKED),
    (b"PAR1", "a Parquet file", f"gradscope reads {_SUPPORTED}"),
    (b"\x89PNG\r\n", "a PNG image", f"gradscope reads {_SUPPORTED}"),
    (b"\xff\xd8\xff", "a JPEG image", f"gradscope reads {_SUPPORTED}"),
    (b"%PDF-", "a PDF document", f"gradscope reads {_SUPPORTED}"),
    (b"\x7fELF", "a program or compiled library", f"gradscope reads {_SUPPORTED}"),
)  # fmt: skip


def _magic(file: _File) -> str | None:
    for magic, what, remedy in _MAGICS:
        if file.start.startswith(magic):
            raise file.unsupported(what, remedy)
    return None


def _hdf5(file: _File) -> str | None:
    signature = b"\x89HDF\r\n\x1a\n"
    if any(file.start.startswith(signature, at) for at in (0, 512, 1024, 2048)):
        keras = b"keras_version" in file.start or b"model_weights" in file.start
        raise file.unsupported("a Keras model in HDF5" if keras else "an HDF5 file", _H5)
    return None


def _tar(file: _File) -> str | None:
    if file.start[257:262] != b"ustar" and not _is_old_torch_tar(file.start):
        return None
    if _is_old_torch_tar(file.start):
        remedy = "load it with torch.load and save its state dict again"
        raise file.unsupported("a tar checkpoint of PyTorch before 0.2", remedy)
    raise file.unsupported("a tar archive", "extract it and give the checkpoint inside")


def _is_old_torch_tar(start: bytes) -> bool:
    name = start[:100].rstrip(b"\0").removeprefix(b"./").rstrip(b"/")
    return name in (b"sys_info", b"pickle", b"storages", b"tensors") and start[257:262] in (
        b"ustar",
        b"\0\0\0\0\0",
    )


def _pickle(file: _File) -> str | None:
    protocol = file.start[:2] in (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
    if not (protocol or _is_text_pickle(file.start) or _is_zlib_pickle(file.start)):
        return None
    makers = (b"sklearn", b"xgboost", b"lightgbm", b"joblib", b"paddle", b"jax", b"torch", b"numpy")
    maker = next((name.decode() for name in makers if name in file.start), "")
    what = "a Python pickle" + (f" that mentions {maker}" if maker else "")
    raise file.unsupported(
        f"{what}, not made by torch.save",
        "pickles can run code and are not loaded: load it where you trust it and save the "
        "weights with safetensors or torch.save(state_dict)",
    )


def _is_text_pickle(start: bytes) -> bool:
    return bool(re.match(rb"(\(dp0?\n|\(lp0?\n|c[A-Za-z_][\w.]*\n[A-Za-z_]\w*\n)", start))


def _is_zlib_pickle(start: bytes) -> bool:
    """How joblib compresses by default; the two bytes are checked as zlib's own header says."""
    if start[:1] != b"\x78" or int.from_bytes(start[:2], "big") % 31:
        return False
    import zlib

    try:
        return zlib.decompressobj().decompress(start, 2)[:1] == b"\x80"
    except zlib.error:
        return False


def _protobuf(file: _File) -> str | None:
    """Heuristics on the first fields of ONNX' ModelProto, TensorFlow's SavedModel and GraphDef."""
    start = file.start
    if start[:3] == b"\x08\x01\x12" and (b"serve" in start or b"saver" in start):
        raise file.unsupported("a TensorFlow SavedModel", f"TensorFlow is not read: {_CONVERT}")
    if start[:1] == b"\x08" and 0 < start[1] <= 32 and start[2:3] in (b"\x12", b"\x3a", b"\x42"):
        raise file.unsupported("an ONNX model", "ONNX is not read: give the weights it came from")
    if start[:1] == b"\x0a" and re.search(rb"\x12.(Placeholder|Const|VariableV2)", start[:4096]):
        raise file.unsupported("a TensorFlow graph", f"TensorFlow is not read: {_CONVERT}")
    return None


def _tensorflow_table(file: _File) -> str | None:
    """The index of a TensorFlow checkpoint is a table that ends in a number of its own."""
    if file.size < 48 or _end(file) != _TABLE_MAGIC:
        return None
    what = "the index of a TensorFlow checkpoint"
    raise file.unsupported(what, f"TensorFlow is not read: {_CONVERT}")


def _end(file: _File) -> bytes:
    try:
        with open(file.path, "rb") as stream:
            stream.seek(-8, os.SEEK_END)
            return stream.read(8)
    except OSError:
        return b""


def _msgpack(file: _File) -> str | None:
    """Flax writes a map whose first key is a short string, usually ``params``."""
    head = file.start
    at = {0xDE: 3, 0xDF: 5}.get(head[0], 1 if 0x81 <= head[0] <= 0x8F else 0)
    if not at or not 0xA1 <= head[at] <= 0xBF:
        return None
    key = head[at + 1 : at + 1 + (head[at] & 0x1F)]
    if not re.fullmatch(rb"[\w./-]+", key):
        return None
    what = f"a msgpack file with the key {quoted(key.decode())}, as Flax writes it"
    raise file.unsupported(what, f"msgpack is not read: {_CONVERT}")


#: In order of certainty: what names itself first, guesses last.
_RECOGNISERS: tuple[_Recogniser, ...] = (
    _nothing,
    _zip,
    _numpy,
    _torch_legacy,
    _safetensors,
    _magic,
    _hdf5,
    _lfs,
    _markup,
    _json,
    _pickle,
    _too_short,
    _tar,
    _tensorflow_table,
    _protobuf,
    _msgpack,
    _text,
)


# Folders.


def _sniff_folder(path: str) -> str:
    try:
        names = sorted(os.listdir(path))
    except OSError as error:
        reason = error.strerror or str(error)
        raise InputError(path, "missing", f"cannot be listed: {reason}") from None
    if not any(name.endswith(_CHECKPOINT_SUFFIXES) for name in names):
        _refuse_foreign_folder(path, names)
    return "folder"


def _refuse_foreign_folder(path: str, names: list[str]) -> None:
    kind: InputKind = "unsupported"
    if ".metadata" in names or any(name.endswith(".distcp") for name in names):
        remedy = f"convert it: `{_DCP_REMEDY.format(path)}`"
        raise InputError(path, kind, f"a torch.distributed.checkpoint (DCP) folder; {remedy}")
    if "saved_model.pb" in names:
        what = "a TensorFlow SavedModel folder"
        raise InputError(path, kind, f"{what}; TensorFlow is not read: {_CONVERT}")
    if "manifest.ocdbt" in names or "_CHECKPOINT_METADATA" in names:
        raise InputError(path, kind, f"an Orbax (JAX) checkpoint folder; {_CONVERT}")
