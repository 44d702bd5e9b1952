"""One file of ``gradscope.grads``, read and checked."""

from __future__ import annotations

import io
import json
import math
import os
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
from numpy.lib import format as npy
from pydantic import ValidationError

from gradscope.checkpoints.archive import DEFLATED, STORED, Member, read_archive
from gradscope.checkpoints.files import stamp
from gradscope.errors import InputError
from gradscope.histories.format import FORMAT, KEYS, VERSION, Meta, fault
from gradscope.text import size

Arrays = dict[str, np.ndarray[Any, Any]]

#: Deflate reaches about 1000:1 on zeros; neither a ratio nor a size alone makes a bomb.
_BOMB_RATIO = 200
_BOMB_BYTES = 1 << 30
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
    if reason := fault(arrays):
        raise InputError(path, "malformed", reason)
    return Shard(path, arrays, meta, unknown)


def _arrays(path: str, file: BinaryIO) -> tuple[Arrays, tuple[str, ...]]:
    """The arrays of the format's keys, and the names of the others, which are not read."""
    members = read_archive(file, path, 0, os.fstat(file.fileno()).st_size).members
    named = {name.removesuffix(".npy"): m for name, m in members.items() if name.endswith(".npy")}
    known = {name: m for name, m in named.items() if name == "meta" or name in KEYS}
    unpacked = sum(m.size for m in known.values())
    packed = sum(m.packed_size for m in known.values())
    if unpacked > _BOMB_BYTES and unpacked > _BOMB_RATIO * packed:
        message = (
            f"would unpack from {size(packed)} to {size(unpacked)}, as only a decompression "
            "bomb does; if the file is genuine, save it uncompressed"
        )
        raise InputError(path, "unsafe", message)
    arrays = {name: _array(path, name, _content(path, file, m)) for name, m in known.items()}
    return arrays, tuple(name for name in named if name not in known)


def _content(path: str, file: BinaryIO, member: Member) -> bytes:
    """The bytes of a member: as many as declared, with the checksum that it has."""
    file.seek(member.offset)
    data = file.read(member.packed_size)
    try:
        if member.method == DEFLATED:
            data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, member.size + 1)
        elif member.method != STORED:
            raise InputError(
                path,
                "unsupported",
                f"{member.name} uses compression method {member.method}",
            )
    except zlib.error as error:
        raise InputError(
            path, "malformed", f"{member.name} is damaged: {error}; {_FETCH_AGAIN}"
        ) from None
    if len(data) != member.size or zlib.crc32(data) != member.crc:
        raise InputError(
            path, "malformed", f"{member.name} is damaged: its checksum is wrong; {_FETCH_AGAIN}"
        )
    return data


def _array(path: str, name: str, data: bytes) -> np.ndarray[Any, Any]:
    """An .npy file's array, read-only, in a dtype that every analyzer takes."""
    try:
        array = _parsed(data)
        if array is not None and array.dtype.kind == "U":
            array.tolist()  # raises on code points beyond Unicode
    # What literal_eval, np.dtype and decoding raise on hostile bytes is not documented.
    except (Exception, SystemError) as error:
        message = f"{name} is not a readable array: {error}"
        raise InputError(path, "malformed", message) from None
    if array is None:
        raise InputError(path, "unsafe", f"{name} holds pickled objects, which are never loaded")
    widened = _WIDENED.get(array.dtype.str.lstrip("<>|="))
    return array if widened is None or name == "grad/sketch" else array.astype(widened)


def _parsed(data: bytes) -> np.ndarray[Any, Any] | None:
    file = io.BytesIO(data)
    header = (
        npy.read_array_header_1_0 if npy.read_magic(file) == (1, 0) else npy.read_array_header_2_0
    )
    shape, fortran, dtype = header(file)
    if dtype.hasobject:
        return None
    count = math.prod(shape)
    if min(shape, default=0) < 0 or count * dtype.itemsize != len(data) - file.tell():
        raise ValueError(f"its {len(data) - file.tell()} bytes are not {list(shape)} of {dtype}")
    flat = np.frombuffer(data, dtype, count, file.tell()) if count else np.empty(0, dtype)
    flat = flat.astype(flat.dtype.newbyteorder("="), copy=False)
    return flat.reshape(shape, order="F") if fortran else flat.reshape(shape)


def _meta(path: str, found: np.ndarray[Any, Any] | None) -> dict[str, Any]:
    if found is None:
        raise InputError(path, "malformed", f"has no meta, so it is not a {FORMAT} file")
    try:
        meta = json.loads(found.astype(np.uint8, casting="equiv").tobytes())
        if not isinstance(meta, dict):
            raise ValueError("it is not an object")
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
    except (ValueError, TypeError, RecursionError) as error:
        raise InputError(path, "malformed", f"meta is not valid JSON: {error}") from None
    return meta


def _major(meta: Mapping[str, Any]) -> object:
    version = meta.get("version")
    return version[0] if isinstance(version, list) and version else None
