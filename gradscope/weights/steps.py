"""How many training steps a checkpoint has seen, as far as anything beside it says."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import PurePath

from gradscope.weights.result import Examined

_NAMES = ("global_step", "step", "steps", "iteration", "iter", "num_updates", "ss_steps")
#: What the Trainer calls the folders of its checkpoints.
_FOLDER = re.compile(r"(?:checkpoint|global_step|step)[-_]?(\d{1,18})")


def step_count(examined: Examined) -> int | None:
    """The first that is found: in the file, in ``trainer_state.json``, in the folder's name."""
    return next(_counts(examined), None)


def _counts(examined: Examined) -> Iterator[int]:
    metadata = examined.checkpoint.metadata
    for name in _NAMES:
        if (count := _whole(metadata.get(name))) is not None:
            yield count
        tensor = examined.by_name.get(name)
        found = tensor.statistics if tensor is not None and tensor.numel == 1 else None
        if found is not None and found.min is not None:
            yield int(found.min)
    if (count := _whole(_training_info(metadata.get("training_info")))) is not None:
        yield count
    if (count := _whole(examined.document("trainer_state").get("global_step"))) is not None:
        yield count
    yield from _in_path(examined.checkpoint.path)


def _whole(value: object) -> int | None:
    if isinstance(value, str) and value.isdecimal() and len(value) < 19:
        return int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _training_info(text: object) -> object:
    """ai-toolkit writes ``{"step": 500, "epoch": 1}``."""
    try:
        found = json.loads(text) if isinstance(text, str) else None
    except (ValueError, RecursionError):
        return None
    return found.get("step") if isinstance(found, dict) else None


def _in_path(path: str) -> Iterator[int]:
    """The checkpoint may be the folder or a file in it."""
    for name in reversed(PurePath(path).parts[-2:]):
        if found := _FOLDER.fullmatch(name):
            yield int(found[1])
