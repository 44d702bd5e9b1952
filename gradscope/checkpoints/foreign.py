"""What a file is that cannot be read as a checkpoint, and what to do about it.

Each recogniser raises InputError for what it knows, or passes. What names itself comes first,
guesses last.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable

from gradscope.checkpoints.safetensors import FETCH_AGAIN
from gradscope.containers.beginning import Beginning, is_plain_text
from gradscope.containers.zip_bounds import bytes_before
from gradscope.errors import InputError, InputKind
from gradscope.formats import CHECKPOINT, supported
from gradscope.text import listed, plural, quoted, size

_CONVERT = "load it where it was made and save the weights with safetensors"
_TABLE_MAGIC = bytes.fromhex("57fb808b247547db")

#: Raises where a file is something that cannot be read.
_Recogniser = Callable[[Beginning], None]


def refuse_empty(file: Beginning) -> None:
    """Raise InputError (``truncated``) for a file that has no content, yet."""
    _refuse_lock(file)
    if file.size == 0:
        raise InputError(file.path, "truncated", f"is empty (0 bytes); {FETCH_AGAIN}")
    if not file.start.strip(b"\0"):
        read = len(file.start)
        what = "only zero bytes" if file.size <= read else f"{read:,} zero bytes at its start"
        message = (
            f"has {what} ({size(file.size)}): a download reserved the space and did not "
            f"fill it; {FETCH_AGAIN}"
        )
        raise InputError(file.path, "truncated", message)


def refuse_part(file: Beginning) -> None:
    """Raise InputError for one file of a distributed checkpoint: parts of tensors without names."""
    if not file.path.endswith(".distcp"):
        return
    folder = os.path.dirname(file.path) or "."
    whole = os.path.exists(os.path.join(folder, ".metadata"))
    raise _unsupported(
        file,
        "one file of a distributed checkpoint (torch.distributed.checkpoint), which holds parts of "
        "tensors without their names",
        f"give its folder, {folder}" if whole else "give its folder, which must have .metadata",
    )


def _refuse_lock(file: Beginning) -> None:
    """What huggingface_hub and other downloads leave beside the file itself."""
    stem, ending = os.path.splitext(file.path)
    if ending == ".lock" and file.size < 100:
        there = os.path.exists(stem)
        remedy = f"give {quoted(stem)}" if there else "the file itself is not beside it yet"
        raise _unsupported(file, "a lock of a download or a writer, not the file itself", remedy)
    if ending in (".incomplete", ".part", ".crdownload", ".aria2", ".partial"):
        what = f"an unfinished download ({ending}, {size(file.size)} so far)"
        raise InputError(file.path, "truncated", f"{what}; let it finish, or fetch it again")


def refusal(file: Beginning) -> InputError:
    """The error that says what a file is that is in no format of the table."""
    for recognise in _RECOGNISERS:
        recognise(file)
    return _unsupported(
        file,
        f"not recognised: it begins with the bytes {file.start[:8].hex(' ')}",
        f"gradscope reads {supported(*CHECKPOINT)}",
    )


def _too_short(file: Beginning) -> None:
    if file.size < 8:
        message = f"is {size(file.size)}, too short for any checkpoint; {FETCH_AGAIN}"
        raise InputError(file.path, "truncated", message)


def _unsupported(file: Beginning, what: str, remedy: str) -> InputError:
    return InputError(file.path, "unsupported", f"{what}; {remedy}")


# Zip archives.


def _empty_zip(file: Beginning) -> None:
    if file.start.startswith(b"PK\x05\x06"):
        raise _unsupported(file, "an empty zip archive", FETCH_AGAIN)


def _zip(file: Beginning) -> None:
    if file.members is not None:
        raise _unsupported(file, *_foreign_zip(file, file.members))


def _zip_behind(file: Beginning) -> None:
    """An archive is found from its end, so that some programs open a file that begins otherwise."""
    with open(file.path, "rb") as stream:
        before = bytes_before(stream, file.path, file.size)
    if before:
        message = (
            f"{plural(before, 'byte')} that belong to no archive stand before a zip archive: "
            f"`tail -c +{before + 1}` gives the archive alone"
        )
        raise InputError(file.path, "malformed", message)


def _foreign_zip(file: Beginning, names: list[str]) -> tuple[str, str]:
    if file.has("model.weights.h5"):
        return "a Keras 3 model (.keras)", f"Keras is not read: {_CONVERT}"
    if is_stable_baselines(file):
        return "a Stable-Baselines3 model", unzip_policy(file.path)
    manifest = file.has("MANIFEST.json")
    if manifest and any(n.endswith(".json") and "MODEL" in n.upper() for n in names):
        return "a TorchServe model archive (.mar)", "unzip it and give the weights file inside"
    inside = [name for name in names if name.endswith((".safetensors", ".pt", ".pth", ".bin"))]
    if inside:
        found = listed(map(quoted, inside), len(inside))
        return f"a zip archive with {found} inside", "unzip it and give that file"
    return (
        f"a zip archive without a checkpoint (members: {listed(map(quoted, names), len(names))})",
        f"gradscope reads {supported(*CHECKPOINT)}",
    )


def is_stable_baselines(file: Beginning) -> bool:
    """A zip archive of a policy's state dict, its optimizer's and the algorithm's settings."""
    return file.has("policy.pth") and file.has("data")


def unzip_policy(path: str) -> str:
    """How to get at the weights of a Stable-Baselines3 model."""
    folder = os.path.splitext(path)[0]
    return f"`unzip {path} policy.pth -d {folder}`, then `gradscope weights {folder}/policy.pth`"


# Text: what a failed download leaves.


def _lfs(file: Beginning) -> None:
    if not file.start.startswith(b"version https://git-lfs"):
        return
    oid, promised = (
        _after(file.start, key) for key in (rb"oid sha256:([0-9a-f]+)", rb"size (\d{1,18})\b")
    )
    nbytes = f" for {size(int(promised))} ({int(promised):,} bytes)" if promised else ""
    digest = f" with SHA-256 {oid}" if oid else ""
    raise _unsupported(
        file,
        f"a Git LFS pointer{nbytes}{digest}, not the file itself",
        "run `git lfs pull` in the repository (or download the file again)",
    )


def _after(data: bytes, pattern: bytes) -> str:
    match = re.search(pattern, data)
    return match.group(1).decode("ascii", "replace")[:64] if match else ""


def _markup(file: Beginning) -> None:
    text = file.start.removeprefix(b"\xef\xbb\xbf").lstrip()
    head = text[:512].lower()
    if head.startswith((b"<!doctype html", b"<html", b"<head", b"<body")) or b"<html" in head:
        remedy = "the download saved an error or login page: fetch the file again, signed in"
        raise _unsupported(file, f"an HTML page{_said(text, b'title')}", remedy)
    if re.search(rb"<net\s[^>]*>\s*<layers", text[:4096]):
        raise _unsupported(
            file, "an OpenVINO model", "it is not read: give the weights it came from"
        )
    if head.startswith((b"<?xml", b"<error")):
        remedy = f"probably the error message of a download: read it, then {FETCH_AGAIN}"
        raise _unsupported(file, f"an XML document{_said(text, b'message')}", remedy)


def _said(text: bytes, tag: bytes) -> str:
    match = re.search(rb"<%b[^>]*>\s*([^<]{1,100})" % tag, text, re.IGNORECASE)
    return f" ({quoted(_one_line(match.group(1)))})" if match else ""


def _one_line(data: bytes) -> str:
    return " ".join(data.decode("utf-8", "replace").split())


def _json(file: Beginning) -> None:
    if not file.json:
        return
    error = _after(file.start, rb'"(?:error|message)"\s*:\s*"([^"]{1,64})').strip()
    if error:
        remedy = f"a server answered this instead of the file: {FETCH_AGAIN}"
        raise _unsupported(file, f"a JSON error message ({quoted(error)})", remedy)
    raise _unsupported(
        file,
        "a JSON file that is not an index of shards (it has no weight_map)",
        "give the weights file, its .index.json, or the folder",
    )


def _text(file: Beginning) -> None:
    if not is_plain_text(file.start):
        return
    beginning = quoted(_one_line(file.start[:200])[:60])
    raise _unsupported(
        file,
        f"a text file that begins with {beginning}",
        f"gradscope reads {supported(*CHECKPOINT)}",
    )


# Other formats.

_PACKED = "decompress it and give the file inside"
_GGML = "it is read once llama.cpp has converted it to GGUF; or give the original safetensors"
_H5 = f"HDF5 is not read: {_CONVERT}"

#: Beginnings that name a format by themselves: bytes, what it is, what to do.
_MAGICS: tuple[tuple[bytes, str, str], ...] = (
    *((magic, "a GGML file (llama.cpp before GGUF)", _GGML)
      for magic in (b"lmgg", b"fmgg", b"tjgg", b"algg", b"ggml", b"ggmf", b"ggjt", b"ggla")),
    (b"\x1f\x8b", "a gzip file", _PACKED),
    (b"\xfd7zXZ\0", "an xz file", _PACKED),
    (b"\x28\xb5\x2f\xfd", "a zstd file", _PACKED),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", _PACKED),
    (b"BZh", "a bzip2 file", _PACKED),
    (b"\x04\x22\x4d\x18", "an LZ4 file", _PACKED),
    (b"Rar!\x1a\x07", "a RAR archive", _PACKED),
    (b"PAR1", "a Parquet file", f"gradscope reads {supported(*CHECKPOINT)}"),
    (b"\x89PNG\r\n", "a PNG image", f"gradscope reads {supported(*CHECKPOINT)}"),
    (b"\xff\xd8\xff", "a JPEG image", f"gradscope reads {supported(*CHECKPOINT)}"),
    (b"%PDF-", "a PDF document", f"gradscope reads {supported(*CHECKPOINT)}"),
    (b"\x7fELF", "a program or compiled library", f"gradscope reads {supported(*CHECKPOINT)}"),
)  # fmt: skip


def _nemo(file: Beginning) -> None:
    """NVIDIA NeMo packs a configuration and a state dict in a tar archive, or a gzip of one."""
    tar = file.start[257:262] == b"ustar" or file.start.startswith(b"\x1f\x8b")
    if tar and (file.path.endswith(".nemo") or b"model_config.yaml" in file.start):
        folder = os.path.splitext(file.path)[0]
        remedy = f"`mkdir {folder} && tar -xf {file.path} -C {folder}`, then `gradscope weights"
        raise _unsupported(file, "a NeMo model archive", f"{remedy} {folder}`")


def _magic(file: Beginning) -> None:
    for magic, what, remedy in _MAGICS:
        if file.start.startswith(magic):
            raise _unsupported(file, what, remedy)


def _hdf5(file: Beginning) -> None:
    signature = b"\x89HDF\r\n\x1a\n"
    if any(file.start.startswith(signature, at) for at in (0, 512, 1024, 2048)):
        keras = b"keras_version" in file.start or b"model_weights" in file.start
        raise _unsupported(file, "a Keras model in HDF5" if keras else "an HDF5 file", _H5)


def _tar(file: Beginning) -> None:
    if file.start[257:262] != b"ustar" and not _is_old_torch_tar(file.start):
        return
    if _is_old_torch_tar(file.start):
        remedy = "load it with torch.load and save its state dict again"
        raise _unsupported(file, "a tar checkpoint of PyTorch before 0.2", remedy)
    raise _unsupported(file, "a tar archive", "extract it and give the checkpoint inside")


def _is_old_torch_tar(start: bytes) -> bool:
    name = start[:100].rstrip(b"\0").removeprefix(b"./").rstrip(b"/")
    return name in (b"sys_info", b"pickle", b"storages", b"tensors") and start[257:262] in (
        b"ustar",
        b"\0\0\0\0\0",
    )


def _pickle(file: Beginning) -> None:
    protocol = file.start[:2] in (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
    if not (protocol or _is_text_pickle(file.start) or _is_zlib_pickle(file.start)):
        return
    makers = (b"sklearn", b"xgboost", b"lightgbm", b"joblib", b"paddle", b"jax", b"torch", b"numpy")
    maker = next((name.decode() for name in makers if name in file.start), "")
    what = "a Python pickle" + (f" that mentions {maker}" if maker else "")
    raise _unsupported(
        file,
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


def _protobuf(file: Beginning) -> None:
    """TensorFlow Lite's identifier; first fields of ONNX' ModelProto, SavedModel and GraphDef."""
    start = file.start
    if start[4:8] == b"TFL3":
        raise _unsupported(
            file, "a TensorFlow Lite model", "it is not read: give the weights it came from"
        )
    if start[:3] == b"\x08\x01\x12" and (b"serve" in start or b"saver" in start):
        raise _unsupported(file, "a TensorFlow SavedModel", f"TensorFlow is not read: {_CONVERT}")
    if start[:1] == b"\x08" and 0 < start[1] <= 32 and start[2:3] in (b"\x12", b"\x3a", b"\x42"):
        raise _unsupported(file, "an ONNX model", "ONNX is not read: give the weights it came from")
    if start[:1] == b"\x0a" and re.search(rb"\x12.(Placeholder|Const|VariableV2)", start[:4096]):
        raise _unsupported(file, "a TensorFlow graph", f"TensorFlow is not read: {_CONVERT}")


def _tensorflow_table(file: Beginning) -> None:
    """The index of a TensorFlow checkpoint is a table that ends in a number of its own."""
    if file.size < 48 or _end(file) != _TABLE_MAGIC:
        return
    what = "the index of a TensorFlow checkpoint"
    raise _unsupported(file, what, f"TensorFlow is not read: {_CONVERT}")


def _end(file: Beginning) -> bytes:
    try:
        with open(file.path, "rb") as stream:
            stream.seek(-8, os.SEEK_END)
            return stream.read(8)
    except OSError:
        return b""


def _msgpack(file: Beginning) -> None:
    """Flax writes a map whose first key is a short string, usually ``params``."""
    head = file.start
    at = {0xDE: 3, 0xDF: 5}.get(head[0], 1 if 0x81 <= head[0] <= 0x8F else 0)
    if not at or not 0xA1 <= head[at] <= 0xBF:
        return
    key = head[at + 1 : at + 1 + (head[at] & 0x1F)]
    if not re.fullmatch(rb"[\w./-]+", key):
        return
    what = f"a msgpack file with the key {quoted(key.decode())}, as Flax writes it"
    raise _unsupported(file, what, f"msgpack is not read: {_CONVERT}")


#: In order of certainty: what names itself first, guesses last.
_RECOGNISERS: tuple[_Recogniser, ...] = (
    _empty_zip,
    _zip,
    _nemo,
    _magic,
    _hdf5,
    _zip_behind,
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


def refuse_folder(path: str, names: list[str]) -> None:
    """Raise InputError for a folder that another framework wrote."""
    kind: InputKind = "unsupported"
    if any(name.endswith(".distcp") for name in names):
        what = "a folder of torch.distributed.checkpoint without its .metadata"
        raise InputError(path, kind, f"{what}, which names the tensors; copy it there, too")
    if "saved_model.pb" in names:
        what = "a TensorFlow SavedModel folder"
        raise InputError(path, kind, f"{what}; TensorFlow is not read: {_CONVERT}")
    if "manifest.ocdbt" in names or "_CHECKPOINT_METADATA" in names:
        raise InputError(path, kind, f"an Orbax (JAX) checkpoint folder; {_CONVERT}")
