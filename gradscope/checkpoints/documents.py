"""The documents beside a checkpoint: what its model, adapter or training was meant to be."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace

from gradscope.checkpoints.tensors import Checkpoint
from gradscope.containers.files import read_start, stamp
from gradscope.containers.strict_json import MalformedError, parse
from gradscope.errors import InputError
from gradscope.text import size

_CAP = 32_000_000
#: Key of ``Checkpoint.metadata`` -> file. Larger ones (tokenizer.json) are read by who needs them.
DOCUMENTS: Mapping[str, str] = {
    "config": "config.json",
    "adapter_config": "adapter_config.json",
    "trainer_state": "trainer_state.json",
    "hf_quant_config": "hf_quant_config.json",
    "quantize_config": "quantize_config.json",
    "quant_config": "quant_config.json",
}


def with_documents(checkpoint: Checkpoint, folder: str) -> Checkpoint:
    """Adds the documents of a folder to the metadata, for rules that compare tensors with them."""
    metadata, notes = dict(checkpoint.metadata), list(checkpoint.notes)
    for key, name in DOCUMENTS.items():
        try:
            if (found := document(os.path.join(folder, name))) is not None:
                metadata[key] = found
        except MalformedError as error:
            notes.append(f"{name} was not used: {error}")
    return replace(checkpoint, metadata=metadata, notes=tuple(dict.fromkeys(notes)))


def document(path: str, cap: int = _CAP) -> Mapping[str, object] | None:
    """The JSON object of a file; None where there is no such file. Raises MalformedError."""
    try:
        if stamp(path)[0] > cap:
            raise MalformedError(f"it is larger than {size(cap)}")
        data = read_start(path, cap)
    except InputError:
        return None
    value = parse(data, os.path.basename(path), non_finite=True)
    if not isinstance(value, dict):
        raise MalformedError("it is not a JSON object")
    return value


def folder_of(checkpoint: Checkpoint) -> str:
    """Where the documents of a checkpoint lie."""
    return checkpoint.path if os.path.isdir(checkpoint.path) else os.path.dirname(checkpoint.path)
