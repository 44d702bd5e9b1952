"""The module that trains, inside its wrappers, and its parameters by name."""

from __future__ import annotations

from collections.abc import Iterator

import torch


def inner(model: torch.nn.Module) -> torch.nn.Module:
    """The module itself inside torch.compile's and data parallel wrappers."""
    while True:
        found = getattr(model, "_orig_mod", None)
        if found is None and type(model).__name__ in ("DistributedDataParallel", "DataParallel"):
            found = getattr(model, "module", None)
        if not isinstance(found, torch.nn.Module):
            return model
        model = found


def modules_of(model: torch.nn.Module) -> Iterator[tuple[str, str, torch.nn.Parameter]]:
    """(parameter's name, its module's name, the parameter), tied ones once.

    The names are those of the model that was not compiled.
    """
    for name, parameter in model.named_parameters():
        name = name.replace("_orig_mod.", "")
        yield name, name.rpartition(".")[0], parameter
