"""Every form that a model can have, as one ``Model``."""

from __future__ import annotations

import torch
from torch import nn

from gradscope.errors import UsageError
from gradscope.models.exported import exported_model
from gradscope.models.model import Model, module_model
from gradscope.models.torchscript import script_model


def as_model(model: object) -> Model:
    """Anything that torch runs as a Model. Raises UsageError for anything else."""
    if isinstance(model, Model):
        return model
    if isinstance(model, torch.jit.ScriptModule):
        return script_model(model)
    if isinstance(model, torch.export.ExportedProgram):
        return exported_model(model)
    if isinstance(model, nn.Module):
        return module_model(model)
    raise UsageError(
        f"a model is an nn.Module, a ScriptModule or an ExportedProgram, not {type(model).__name__}"
    )
