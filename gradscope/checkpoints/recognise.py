"""How each checkpoint format is recognised: by the beginning of a file, never by its name."""

from __future__ import annotations

import re

from gradscope.checkpoints.safetensors import HEADER_CAP
from gradscope.checkpoints.torch_magic import is_legacy
from gradscope.containers import npy
from gradscope.containers.beginning import Beginning


def is_safetensors(file: Beginning) -> bool:
    """A length, then JSON; a file with a damaged length or brace is still named by its header."""
    length, header = int.from_bytes(file.start[:8], "little"), file.start[8:].lstrip(b" \t\r\n")
    plausible = 0 < length <= HEADER_CAP and header.startswith(b"{")
    telling = b'"data_offsets"' in header and not file.start.lstrip().startswith(b"{")
    other = file.start.startswith((b"PK", npy.MAGIC)) or is_legacy(file.start)
    return plausible or (telling and not other)


def is_index(file: Beginning) -> bool:
    """JSON that places tensors in shards."""
    return b'"weight_map"' in file.json


def is_pt2(file: Beginning) -> bool:
    """An archive of torch.export, of any of its layouts."""
    return any(
        name == "serialized_exported_program.json"
        or name.rpartition("/")[2] == "archive_format"
        or re.fullmatch(r"(.*/)?models/[^/]*\.json", name)
        for name in file.members or ()
    )


def is_torchscript(file: Beginning) -> bool:
    """An archive with code beside its data."""
    code = file.has("constants.pkl") or any("/code/" in name for name in file.members or ())
    return code and file.has("data.pkl")


def is_npz(file: Beginning) -> bool:
    """An archive of arrays."""
    return any(name.endswith(".npy") for name in file.members or ())


def is_torch_zip(file: Beginning) -> bool:
    """A zip archive of torch.save."""
    return file.has("data.pkl")


def is_torch_legacy(file: Beginning) -> bool:
    """The container of torch.save before 1.6."""
    return is_legacy(file.start)


def is_npy(file: Beginning) -> bool:
    """NumPy's magic number."""
    return file.start.startswith(npy.MAGIC)
