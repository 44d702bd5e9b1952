"""The table of checkpoint formats: what each is called, how it is recognised and who reads it.

A new reader is one source file and one row. Sniffing, opening, the search of a folder and every
text that lists what can be read come from this table.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from typing import Any, Literal

from gradscope.checkpoints.index import INDEX_SUFFIX
from gradscope.checkpoints.safetensors import HEADER_CAP
from gradscope.checkpoints.torch_legacy import is_legacy
from gradscope.containers import npy
from gradscope.containers.files import read_start, stamp, unreadable
from gradscope.containers.zip import member_names

#: What a format holds: tensors alone, a program with its weights, or the names of other files.
Kind = Literal["tensors", "program", "set"]

_START = 65_536
#: An index of shards is a few megabytes; more is not searched for its one telling key.
_JSON_CAP = 100_000_000


class File:
    """A file of which only the beginning was read, and of a zip archive the directory."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.size = stamp(path)[0]
        self.start = read_start(path, _START)

    @cached_property
    def members(self) -> list[str] | None:
        """The names in a zip archive; None for another file. Raises InputError when damaged."""
        if not self.start.startswith((b"PK\x03\x04", b"PK\x07\x08PK\x03\x04")):
            return None
        try:
            with open(self.path, "rb") as file:
                return member_names(file, self.path, self.size)
        except OSError as error:
            raise unreadable(self.path, error) from None

    def has(self, base: str) -> bool:
        """Whether a zip archive has a member of this name, in any folder."""
        return any(n == base or n.endswith("/" + base) for n in self.members or ())

    @cached_property
    def json(self) -> bytes:
        """The text of a JSON file, up to a generous limit; nothing for another file."""
        text = self.start.removeprefix(b"\xef\xbb\xbf").lstrip()
        if not text.startswith((b"{", b"[")) or not is_plain_text(self.start):
            return b""
        whole = self.size <= len(self.start) or self.size > _JSON_CAP
        return self.start if whole else read_start(self.path, _JSON_CAP)


@dataclass(frozen=True, slots=True)
class Format:
    """One row. ``reader`` is ``module:function``, imported when a file of the format is opened.

    It is called with the path, and the ``key`` of a nested dict where the format ``has_keys``. The
    reader of a ``set`` is called with a function that reads one file of the set.
    """

    name: str
    family: str
    suffixes: tuple[str, ...]
    kind: Kind
    recognises: Callable[[File], bool]
    reader: str
    has_keys: bool = False

    def load(self) -> Callable[..., Any]:
        """The reader."""
        module, _, function = self.reader.partition(":")
        reader: Callable[..., Any] = getattr(import_module(module), function)
        return reader


def recognised(file: File) -> Format | None:
    """The row of a file, by its content; None for a file in no format of the table."""
    return next((row for row in FORMATS if row.recognises(file)), None)


def find(name: str) -> Format:
    """The row of a name that ``sniff`` returned."""
    return next(row for row in FORMATS if row.name == name)


def supported() -> str:
    """What can be read, in words: each family with its suffixes."""
    return ", ".join(f"{name} ({', '.join(found)})" for name, found in _families().items())


def suffixes_by_family() -> list[tuple[str, ...]]:
    """What may be a checkpoint in a folder, most readable first; content decides once opened."""
    return [tuple(s for s in found if s != INDEX_SUFFIX) for found in _families().values()]


def _families() -> dict[str, list[str]]:
    """The suffixes of each family, in the order of the table."""
    found: dict[str, list[str]] = {}
    for row in FORMATS:
        if row.suffixes:
            suffixes = found.setdefault(row.family, [])
            suffixes += (suffix for suffix in row.suffixes if suffix not in suffixes)
    return found


# --- how each is recognised, by content alone -----------------------------------------------------


def _is_safetensors(file: File) -> bool:
    """A length, then JSON; a file with a damaged length or brace is still named by its header."""
    length, header = int.from_bytes(file.start[:8], "little"), file.start[8:].lstrip(b" \t\r\n")
    plausible = 0 < length <= HEADER_CAP and header.startswith(b"{")
    telling = b'"data_offsets"' in header and not file.start.lstrip().startswith(b"{")
    other = file.start.startswith((b"PK", npy.MAGIC)) or is_legacy(file.start)
    return plausible or (telling and not other)


def _is_index(file: File) -> bool:
    return b'"weight_map"' in file.json


def _is_pt2(file: File) -> bool:
    return any(
        name == "serialized_exported_program.json"
        or name.rpartition("/")[2] == "archive_format"
        or re.fullmatch(r"(.*/)?models/[^/]*\.json", name)
        for name in file.members or ()
    )


def _is_torchscript(file: File) -> bool:
    code = file.has("constants.pkl") or any("/code/" in name for name in file.members or ())
    return code and file.has("data.pkl")


def _is_npz(file: File) -> bool:
    return any(name.endswith(".npy") for name in file.members or ())


def is_plain_text(data: bytes) -> bool:
    """UTF-8 without control characters; a last character that was cut is forgiven."""
    try:
        text = data[:4096].decode("utf-8")
    except UnicodeDecodeError as error:
        if error.start < min(len(data), 4096) - 3:
            return False
        text = data[: error.start].decode("utf-8")
    return not any(char < " " and char not in "\t\n\r\f\x1b" for char in text)


#: In the order in which they are tried.
FORMATS: tuple[Format, ...] = (
    Format(
        name="safetensors",
        family="safetensors",
        suffixes=(".safetensors",),
        kind="tensors",
        recognises=_is_safetensors,
        reader="gradscope.checkpoints.safetensors:read_safetensors",
    ),
    Format(
        name="safetensors-index",
        family="safetensors",
        suffixes=(INDEX_SUFFIX,),
        kind="set",
        recognises=_is_index,
        reader="gradscope.checkpoints.sharded:read_index",
        has_keys=True,
    ),
    Format(
        name="pt2",
        family="PyTorch",
        suffixes=(".pt2",),
        kind="program",
        recognises=_is_pt2,
        reader="gradscope.checkpoints.torchfile:read_torch",
        has_keys=True,
    ),
    Format(
        name="torchscript",
        family="PyTorch",
        suffixes=(".pt",),
        kind="program",
        recognises=_is_torchscript,
        reader="gradscope.checkpoints.torchfile:read_torch",
        has_keys=True,
    ),
    Format(
        name="zip-torch",
        family="PyTorch",
        suffixes=(".pt", ".pth", ".bin", ".ckpt"),
        kind="tensors",
        recognises=lambda file: file.has("data.pkl"),
        reader="gradscope.checkpoints.torchfile:read_torch",
        has_keys=True,
    ),
    Format(
        name="torch-legacy",
        family="PyTorch",
        suffixes=(".pt", ".pth", ".bin"),
        kind="tensors",
        recognises=lambda file: is_legacy(file.start),
        reader="gradscope.checkpoints.torchfile:read_torch",
        has_keys=True,
    ),
    Format(
        name="npz",
        family="NumPy",
        suffixes=(".npz",),
        kind="tensors",
        recognises=_is_npz,
        reader="gradscope.checkpoints.npz:read_npz",
    ),
    Format(
        name="npy",
        family="NumPy",
        suffixes=(".npy",),
        kind="tensors",
        recognises=lambda file: file.start.startswith(npy.MAGIC),
        reader="gradscope.checkpoints.npz:read_npz",
    ),
)
