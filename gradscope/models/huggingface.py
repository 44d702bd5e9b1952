"""Models of transformers: ``--arch transformers:AUTO`` or a class's name, built from config.json.

The library loads its own weights, since it alone knows how the names in its files, which come from
many versions, become those of its modules.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from torch import nn

from gradscope.checkpoints.documents import folder_of
from gradscope.checkpoints.tensors import Checkpoint
from gradscope.errors import InputError, UsageError
from gradscope.models.architecture import parsed
from gradscope.models.fit import counted, left_out, read_tensor, refs_of, widened
from gradscope.models.model import nearest
from gradscope.text import escaped, listed, quoted

LIBRARY = "transformers"
AUTO = "AUTO"


def load(
    arch: str, checkpoint: Checkpoint, prefix: str | None
) -> tuple[nn.Module, tuple[str, ...]]:
    """The model that a config.json beside a checkpoint describes, with its weights, and notes.

    ``AUTO`` takes the class that ``architectures`` names; options override the configuration. Of a
    model of pictures and texts, the picture's tower is taken. Raises UsageError for what is not
    there, InputError for tensors that do not fit.
    """
    path, _, options = parsed(arch, arch.partition(":")[2])
    library = _library(arch)
    config = _config(arch, checkpoint)
    made, notes = _class(library, arch, ".".join(path), config)
    tensors = {
        name.removeprefix(prefix or ""): read_tensor(ref)
        for name, ref in refs_of(checkpoint).items()
        if name.startswith(prefix or "")
    }
    with _quiet(library):
        try:
            settings = made.config_class.from_pretrained(
                folder_of(checkpoint) or ".", local_files_only=True, **options
            )
            module, found = made.from_pretrained(
                None, config=settings, state_dict=dict(tensors), output_loading_info=True,
                ignore_mismatched_sizes=True,
            )  # fmt: skip
        # The library's own errors have no common class.
        except Exception as error:
            said = (str(error).strip().splitlines() or [""])[0][:300]
            raise UsageError(f"--arch {arch} failed: {type(error).__name__}: {said}") from error
    _refuse_misfits(checkpoint.path, arch, found)
    beside = left_out(sorted(found["unexpected_keys"]))
    # Its configuration may ask for half precision.
    return module.float(), (*notes, *beside, *widened(tensors.values()))


def _library(arch: str) -> Any:
    try:
        return import_module(LIBRARY)
    except ImportError as error:
        message = f"--arch {arch}: {LIBRARY} cannot be imported ({error}); pip install {LIBRARY}"
        raise UsageError(message) from None


def _config(arch: str, checkpoint: Checkpoint) -> Mapping[str, Any]:
    found = checkpoint.metadata.get("config")
    if isinstance(found, Mapping):
        return found
    raise UsageError(
        f"--arch {arch}: no config.json beside {checkpoint.path}; it says what to build"
    )


def _class(
    library: Any, arch: str, wanted: str, config: Mapping[str, Any]
) -> tuple[Any, tuple[str, ...]]:
    """The class to build, and a note where it is not the one that was named."""
    name = wanted
    if wanted == AUTO:
        named = config.get("architectures")
        if not isinstance(named, list) or not named or not isinstance(named[0], str):
            raise UsageError(
                f"--arch {arch}: config.json has no architectures; name the class, as in "
                f"{LIBRARY}:ViTForImageClassification"
            )
        name = named[0]
    found = getattr(library, name, None)
    if found is None or not hasattr(found, "from_pretrained"):
        hint = nearest(name, [n for n in dir(library) if "ForImageClassification" in n])
        own = "; the folder brings code of its own: name it with --arch FILE.py:FACTORY"
        raise UsageError(
            f"--arch {arch}: {LIBRARY} has no model {quoted(name)}"
            f"{own if 'auto_map' in config else hint}"
        )
    return _reading_pictures(library, arch, name, found)


def _reading_pictures(
    library: Any, arch: str, name: str, found: Any
) -> tuple[Any, tuple[str, ...]]:
    """The class itself, or the tower of a model of pictures and texts that reads pictures."""
    takes = list(inspect.signature(found.forward).parameters)[1:]
    if takes[:1] == ["pixel_values"]:
        return found, ()
    for end in ("VisionModelWithProjection", "VisionModel"):
        tower = getattr(library, name.removesuffix("Model") + end, None)
        if tower is not None and name.endswith("Model"):
            return tower, (
                f"{tower.__name__} is explained, the part of {name} that reads pictures",
            )
    given = listed(map(escaped, takes), len(takes))
    raise UsageError(f"--arch {arch}: {name} takes {given}, not pictures alone (pixel_values)")


def _refuse_misfits(path: str, arch: str, found: Mapping[str, Any]) -> None:
    """Raise InputError where the library started anything from random numbers."""
    lacking = [n for n in found["missing_keys"] if not n.endswith("num_batches_tracked")]
    parts = counted(sorted(lacking), ())
    reshaped = sorted(found["mismatched_keys"])
    if reshaped:
        shown = (f"{escaped(n)} (file {list(a)}, architecture {list(b)})" for n, a, b in reshaped)
        parts.append(f"{len(reshaped)} of another shape: {listed(shown, len(reshaped), 5)}")
    if parts:
        message = f"its tensors do not fit --arch {arch}: {'; '.join(parts)}"
        raise InputError(path, "malformed", message)


@contextmanager
def _quiet(library: Any) -> Iterator[None]:
    """Meanwhile, the library prints neither progress nor reports of its own."""
    log = library.utils.logging
    level, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity(log.CRITICAL)
    log.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.set_verbosity(level)
        if bars:
            log.enable_progress_bar()
