"""What a file is, by its content: the extension is never asked."""

from __future__ import annotations

import os

from gradscope.checkpoints.choice import holds_checkpoints, is_dcp, names_in
from gradscope.checkpoints.foreign import refusal, refuse_empty, refuse_folder, refuse_part
from gradscope.checkpoints.foreign_folders import refuse_parts
from gradscope.containers.beginning import Beginning
from gradscope.formats import CHECKPOINT, recognised

#: What ``sniff`` says of a folder; every other name is one of the table of formats.
FOLDER = "folder"
#: And of a folder of torch.distributed.checkpoint.
DCP = "dcp"


def sniff(path: str) -> str:
    """The format of a checkpoint: a name of the table of formats, ``folder`` or ``dcp``.

    Raises InputError for everything else: kind ``unsupported`` for another format, ``truncated``
    for a file that has no content (yet).
    """
    if os.path.isdir(path):
        return _sniff_folder(path)
    file = Beginning(path)
    refuse_empty(file)
    refuse_part(file)
    row = recognised(file, *CHECKPOINT)
    if row is None:
        raise refusal(file)
    return row.name


def _sniff_folder(path: str) -> str:
    names = names_in(path, folders=True)
    if is_dcp(names):
        return DCP
    refuse_parts(path, names)
    if not holds_checkpoints(names):
        refuse_folder(path, names)
    return FOLDER
