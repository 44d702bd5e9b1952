"""The manifest: the fingerprints of a checkpoint as a JSON document, written and read back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from gradscope.containers.strict_json import MalformedError, parse_once
from gradscope.errors import InputError
from gradscope.report.model import Record, Tool

VERSION = "1.0"


class Fingerprint(Record):
    """What one tensor is. ``parts`` are those of long tensors, of 16,777,216 elements each."""

    dtype: str
    shape: tuple[int, ...]
    hash: str
    histogram: str | None = None
    parts: tuple[str, ...] = ()


class Manifest(Record):
    """The fingerprints of a checkpoint's tensors, in file order."""

    format: Literal["gradscope.manifest"] = "gradscope.manifest"
    version: str = VERSION
    tool: Tool = Tool()
    hash: Literal["blake2b-256"] = "blake2b-256"
    #: The name of the checkpoint's file or folder, without its path.
    model: str
    bytes: int
    tensors: Mapping[str, Fingerprint]


def written(manifest: Manifest) -> str:
    """The document; each tensor is a line, readable with ``less`` and small in a diff."""
    plain = manifest.model_dump()
    tensors = plain.pop("tensors")
    lines = (f"  {json.dumps(name)}: {json.dumps(_brief(t))}" for name, t in tensors.items())
    head = ",\n".join(f" {json.dumps(k)}: {json.dumps(v)}" for k, v in plain.items())
    body = ",\n".join(lines)
    return f'{{\n{head},\n "tensors": {{\n{body}\n }}\n}}\n'


def _brief(fingerprint: Mapping[str, object]) -> dict[str, object]:
    """Without what most tensors do not have."""
    return {k: v for k, v in fingerprint.items() if v or k not in ("histogram", "parts")}


def is_manifest(path: str) -> bool:
    """Whether a file is a manifest, by its beginning."""
    try:
        with open(path, "rb") as file:
            return b'"gradscope.manifest"' in file.read(200)
    except OSError:
        return False


def read_manifest(path: str | Path) -> Manifest:
    """A manifest that was saved. Raises InputError for anything else."""
    try:
        text = Path(path).read_bytes()
    except OSError as error:
        reason = "file not found" if isinstance(error, FileNotFoundError) else error.strerror
        raise InputError(path, "missing", reason or str(error)) from None
    try:
        found = Manifest.model_validate(parse_once(text, "the manifest"))
    except (MalformedError, ValidationError) as error:
        first = str(error).split("\n", 1)[0]
        message = f"not a manifest of gradscope ({first}); `gradscope manifest MODEL` prints one"
        raise InputError(path, "malformed", message) from None
    if found.version.split(".")[0] != VERSION.split(".")[0]:
        message = f"a manifest of version {found.version}; this program reads {VERSION}"
        raise InputError(path, "unsupported", message)
    return found
