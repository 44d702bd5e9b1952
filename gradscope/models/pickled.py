"""Whole modules and other objects from pickles: loading them runs code that the file names."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from gradscope.checkpoints.statedict import KNOWN_NAMES
from gradscope.errors import InputError, UsageError
from gradscope.models.architecture import build, importable
from gradscope.models.fit import fit_tensors
from gradscope.models.quiet import first_line, silent
from gradscope.text import escaped, listed, quoted


def unpickled(
    path: str, needed: str, arch: str | None, key: str | None, trust: frozenset[str]
) -> tuple[str, nn.Module, tuple[str, ...]]:
    """What a pickle is ("module" or "state-dict"), its module in evaluation mode, and notes.

    ``needed`` says why it is more than tensors. Raises InputError for one that ``trust`` does not
    allow, or that cannot be restored, and UsageError for one that is no module and has no ``arch``.
    """
    if "pickle" not in trust:
        raise InputError(
            path,
            "unsafe",
            f"a pickled module: loading it runs any code that the file names ({needed}). If you "
            "trust its source, pass --trust pickle; better, save its state dict, or export the "
            "model with torch.export.save",
        ) from None
    with silent(), importable(str(Path.cwd())):
        try:
            found = torch.load(path, map_location="cpu", weights_only=False)
        # Its code may raise anything.
        except Exception as error:
            advice = "its classes must be importable, from the working directory or installed"
            message = f"unpickling failed ({type(error).__name__}: {first_line(error)}); {advice}"
            raise InputError(path, "malformed", message) from None
    found, prefix = _entry(found, key, path)
    inner = next((v for v in _values(found) if isinstance(v, nn.Module)), None)
    if inner is not None:
        return "module", _whole(inner, path), ()
    if arch is None:
        raise UsageError(
            f"{path} holds a {type(found).__name__}, not a module; name its class with --arch"
        )
    module = build(arch)
    notes = fit_tensors(module, _tensors_in(found), path, arch, prefix)
    return "state-dict", module.eval(), notes


def _whole(module: nn.Module, path: str) -> nn.Module:
    """The module in evaluation mode.

    Raises InputError where a part was not restored: torch cannot pickle its quantised modules, and
    a class that changed since may lack what it needs now.
    """
    try:
        return module.eval()
    # Parts that lack their attributes raise AttributeError, if nothing worse.
    except Exception as error:
        raise InputError(
            path,
            "malformed",
            f"a part of the pickled module was not restored ({first_line(error)}); save its state "
            "dict, or the model as TorchScript, with the version of torch that made it",
        ) from None


def _entry(found: object, key: str | None, path: str) -> tuple[object, str | None]:
    """The value at a dotted path of keys, and what the names in it begin with, if that is left."""
    parts = [] if key is None else key.split(".")
    for at, part in enumerate(parts):
        prefix = "".join(f"{left}." for left in parts[at:])
        if any(name.startswith(prefix) for name in _tensors_in(found)):
            return found, prefix
        if not isinstance(found, Mapping) or part not in found:
            names = [escaped(str(name), 60) for name in found] if isinstance(found, Mapping) else []
            there = f"it has {listed(names, len(names), 12)}" if names else "it has no entries"
            raise UsageError(f"--key {key}: no {quoted(part)} in {path}; {there}")
        found = found[part]
    return found, None


def _values(found: object) -> Iterator[object]:
    yield found
    if isinstance(found, Mapping):
        for name in (*KNOWN_NAMES, *found):
            if name in found:
                yield found[name]


def _tensors_in(found: object) -> dict[str, Tensor]:
    for value in _values(found):
        if isinstance(value, Mapping):
            tensors = OrderedDict((str(k), v) for k, v in value.items() if isinstance(v, Tensor))
            if tensors:
                tensors._metadata = getattr(value, "_metadata", {})  # type: ignore[attr-defined]
                return tensors
    return {}
