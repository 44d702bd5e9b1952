"""Programs of ``torch.export``: unflattened, so that their layers have names and hooks."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from gradscope.errors import UsageError
from gradscope.models.exported_layers import with_layers
from gradscope.models.folding import folded_copies
from gradscope.models.model import Forward, Model, hooked
from gradscope.models.precision import note_of, tensors_of, wide_copy, widen_program


def exported_model(program: ExportedProgram) -> Model:
    """An exported program as a Model.

    Guards in the file are never compiled. A program exported in training mode is rewritten to
    evaluation mode, since training is a constant of its graph. Raises UsageError for a program
    that does not take one image batch.
    """
    name, shape = _image_input(program)
    halves = note_of((*program.state_dict.values(), *_tensors(program.constants.values())))
    if halves:
        program = wide_copy(program)
        widen_program(program)
    notes = ("exported in training mode; evaluation mode is used",) * _in_evaluation(program)
    module = _unflattened(program)

    def passing(made: nn.Module) -> Forward:
        return hooked(made, lambda x: made(x) if name is None else made(**{name: x}))

    batch, *size = [s if isinstance(s, int) else None for s in shape]
    return Model(
        module,
        "export",
        tuple(layer for layer, _ in module.named_modules() if layer),
        passing(module),
        batch=batch,
        size=(size[0], size[1], size[2]),
        notes=(*notes, *halves),
        copied=lambda image: folded_copies(
            lambda: with_layers(_unflattened(program)), passing, image
        ),
    )


def _unflattened(program: ExportedProgram) -> nn.Module:
    """The program's modules in float32. They share its tensors, and need no gradient."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module: nn.Module = torch.export.unflatten(program)
        return module.float() if note_of(tensors_of(module)) else module


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    return (value for value in values if isinstance(value, Tensor))


def _image_input(program: ExportedProgram) -> tuple[str | None, list[Any]]:
    """The keyword (None: by position) and the shape of the program's one input."""
    wanted = set(program.graph_signature.user_inputs)
    nodes = [n for n in program.graph.nodes if n.op == "placeholder" and n.name in wanted]
    shapes = [list(n.meta["val"].shape) for n in nodes if isinstance(n.meta.get("val"), Tensor)]
    if len(nodes) != 1 or len(shapes) != 1 or len(shapes[0]) != 4:
        given = ", ".join(f"{n.name} {s}" for n, s in zip(nodes, shapes, strict=False))
        raise UsageError(
            f"this program takes {given or 'no tensor'}; it has to take images [N, C, H, W]"
        )
    arguments, keywords = program.call_spec.in_spec.children()
    return (keywords.context[0] if not arguments.num_children else None), shapes[0]


#: The position of the argument that says "training".
_TRAINING = {
    torch.ops.aten.batch_norm.default: 5,
    torch.ops.aten.dropout.default: 2,
    torch.ops.aten.dropout_.default: 2,
    torch.ops.aten.feature_dropout.default: 2,
    torch.ops.aten.alpha_dropout.default: 2,
}


def _in_evaluation(program: ExportedProgram) -> int:
    """Switch training off; 1 if it was on anywhere."""
    changed = 0
    for node in program.graph_module.graph.nodes:
        flag = _TRAINING.get(node.target)
        if flag is not None and len(node.args) > flag and node.args[flag] is True:
            node.args = (*node.args[:flag], False, *node.args[flag + 1 :])
            changed = 1
    if changed:
        program.graph_module.recompile()
    return changed
