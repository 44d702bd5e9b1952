"""One file of ``gradscope.grads``, read and checked."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
from pydantic import ValidationError

from gradscope.containers import npy, strict_json
from gradscope.containers.beginning import Beginning
from gradscope.containers.files import stamp
from gradscope.containers.zip import is_bomb, read_archive
from gradscope.errors import InputError
from gradscope.histories.format import FORMAT, KEYS, VERSION, Meta, fault
from gradscope.text import size

Arrays = dict[str, np.ndarray[Any, Any]]

_FETCH_AGAIN = "copy it again, or leave it out to read the rest"
#: Floats that compiled analyzers do not take, and what holds their values; sketches stay small.
_WIDENED = {"f2": "f4", "f12": "f8", "f16": "f8"}


@dataclass(frozen=True, eq=False, slots=True)
class Shard:
    """One file: its arrays, checked against the format, and its meta."""

    path: str
    arrays: Arrays
    meta: dict[str, Any]
    unknown: tuple[str, ...]


def recognises(file: Beginning) -> bool:
    """An archive of this format."""
    return file.start.startswith(b"PK") and is_native(file.path)


def is_native(path: str) -> bool:
    """Whether a file is an archive of this format, even one that lost its ``meta``."""
    try:
        stamp(path)
        with open(path, "rb") as file:
            names = read_archive(file, path, 0, os.fstat(file.fileno()).st_size).members
    except (OSError, InputError):
        return False
    return "meta.npy" in names or {"grad/l2.npy", "layer/name.npy"} <= names.keys()


def read_shard(path: str) -> Shard:
    """The checked content of one file. Raises InputError when it breaks the format."""
    try:
        stamp(path)  # a FIFO would never end
        with open(path, "rb") as file:
            arrays, unknown = _arrays(path, file)
    except OSError as error:
        raise InputError(path, "missing", f"cannot be read: {error.strerror or error}") from None
    except InputError as error:
        if error.kind != "truncated":
            raise
        raise InputError(path, "truncated", f"{error.message}; {_FETCH_AGAIN}") from None
    meta = _meta(path, arrays.pop("meta", None))
    if reason := fault(arrays, sorted_=False):
        raise InputError(path, "malformed", reason)
    return Shard(path, arrays, meta, unknown)


def _arrays(path: str, file: BinaryIO) -> tuple[Arrays, tuple[str, ...]]:
    """The arrays of the format's keys, and the names of the others, which are not read."""
    archive = read_archive(file, path, 0, os.fstat(file.fileno()).st_size)
    named = {
        name.removesuffix(".npy"): m for name, m in archive.members.items() if name.endswith(".npy")
    }
    known = {name: m for name, m in named.items() if name == "meta" or name in KEYS}
    if is_bomb(known.values()):
        unpacked = size(sum(member.size for member in known.values()))
        message = (
            f"would unpack to {unpacked}, as only a decompression bomb does; if the file is "
            "genuine, save it uncompressed"
        )
        raise InputError(path, "unsafe", message)
    arrays = {name: _array(path, name, archive.content(file, m)) for name, m in known.items()}
    return arrays, tuple(name for name in named if name not in known)


def _array(path: str, name: str, data: bytes) -> np.ndarray[Any, Any]:
    """An .npy file's array, read-only, in a dtype that every analyzer takes."""
    try:
        header = npy.read_header(data[: npy.HEADER_ROOM])
        if header.is_pickled:
            message = f"{name} holds pickled objects, which are never loaded"
            raise InputError(path, "unsafe", message)
        array = npy.elements(header, data)
        if array.dtype.kind == "U":
            array.tolist()  # raises on code points beyond Unicode
    except (npy.HeaderError, ValueError, SystemError) as error:
        message = f"{name} is not a readable array: {error}"
        raise InputError(path, "malformed", message) from None
    widened = _WIDENED.get(array.dtype.str.lstrip("<>|="))
    return array if widened is None or name == "grad/sketch" else array.astype(widened)


def _meta(path: str, found: np.ndarray[Any, Any] | None) -> dict[str, Any]:
    if found is None:
        raise InputError(path, "malformed", f"has no meta, so it is not a {FORMAT} file")
    try:
        text = found.astype(np.uint8, casting="equiv").tobytes()
        meta = strict_json.parse_once(text, "meta", non_finite=True)
        if not isinstance(meta, dict):
            raise ValueError("meta is not a JSON object")
        if meta.get("format") == FORMAT and _major(meta) not in (None, VERSION[0]):
            raise InputError(
                path,
                "malformed",
                f"is version {_major(meta)} of {FORMAT}; this gradscope reads version {VERSION[0]}",
            )
        Meta.model_validate(meta)
    except InputError:
        raise
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise InputError(path, "malformed", f"meta.{where}: {first['msg']}") from None
    except (strict_json.MalformedError, ValueError, TypeError) as error:
        raise InputError(path, "malformed", str(error)) from None
    return meta


def _major(meta: Mapping[str, Any]) -> object:
    version = meta.get("version")
    return version[0] if isinstance(version, list) and version else None
