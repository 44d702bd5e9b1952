"""Half precision is for storage: models saved in it are computed in float32, as state dicts are.

Gradients in half precision round off what explains an answer. A model in memory is copied first.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.overrides import TorchFunctionMode

from gradscope.errors import UsageError

HALF = (torch.float16, torch.bfloat16)
#: The same as TorchScript's numbers, and float32's.
_HALF_NUMBERS, _FLOAT_NUMBER = (5, 15), 6
_Model = TypeVar("_Model", bound=nn.Module | ExportedProgram)


def note_of(tensors: Iterable[Tensor]) -> tuple[str, ...]:
    """What to say of a model with these tensors; nothing where none is in half precision."""
    found = sorted({str(t.dtype).removeprefix("torch.") for t in tensors if t.dtype in HALF})
    return (f"{' and '.join(found)} in the model: it is computed in float32",) if found else ()


def tensors_of(module: nn.Module) -> list[Tensor]:
    """The parameters and buffers of a module."""
    return [*module.parameters(), *module.buffers()]


def wide_copy(model: _Model) -> _Model:
    """A copy in float32 of a module, or of a program, whose graph is not yet changed.

    Raises UsageError for a model that cannot be copied.
    """
    try:
        # With a graph, TorchScript's copied parameters would no longer be parameters.
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            found = copy.deepcopy(model)
            if isinstance(found, nn.Module):
                found.float()
            return found
    # Modules may hold anything.
    except Exception as error:
        raise UsageError(
            f"the model is in half precision and cannot be copied ({error}); explain model.float()"
        ) from error


class Widened(TorchFunctionMode):
    """Meanwhile, code that asks for half precision gets float32."""

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Calls a function of torch with the wider type."""
        if function in (Tensor.half, Tensor.bfloat16):
            function = Tensor.float
        wide = {name: _wider(value) for name, value in (kwargs or {}).items()}
        return function(*map(_wider, args), **wide)


def _wider(value: Any) -> Any:
    return torch.float32 if isinstance(value, torch.dtype) and value in HALF else value


# --- programs -------------------------------------------------------------------------------------


def constants_of(graph: Any) -> list[Tensor]:
    """The tensors that a TorchScript graph holds itself: all weights, once it is frozen."""
    return [node.t("value") for node in _nodes(graph) if _is_tensor(node)]


def widen_graph(graph: Any) -> None:
    """Let a TorchScript graph compute in float32 wherever it says half precision."""
    tensor = torch._C.TensorType.get()
    for node in _nodes(graph):
        if _is_tensor(node) and node.t("value").dtype in HALF:
            node.t_("value", node.t("value").float())
        for at, (name, value) in enumerate(zip(_arguments(node), node.inputs(), strict=False)):
            if name == "dtype" and value.toIValue() in _HALF_NUMBERS:
                graph.setInsertPoint(node)
                node.replaceInput(at, graph.insertConstant(_FLOAT_NUMBER))
        for value in node.outputs():
            # Traced values are annotated with their types.
            if value.type().isSubtypeOf(tensor):
                value.setType(tensor)
    for value in list(graph.inputs())[1:]:
        if value.type().isSubtypeOf(tensor):
            value.setType(tensor)


def _nodes(block: Any) -> Iterable[Any]:
    for node in list(block.nodes()):
        for inner in node.blocks():
            yield from _nodes(inner)
        yield node


def _is_tensor(node: Any) -> bool:
    constant = node.kind() == "prim::Constant" and node.hasAttribute("value")
    return bool(constant and node.kindOf("value") == "t")


def _arguments(node: Any) -> list[str]:
    """The names of an operator's arguments; none for what has no schema."""
    schema = node.schema()
    if schema.startswith("("):
        return []
    return [argument.name for argument in torch._C.parse_schema(schema).arguments]


def widen_program(program: ExportedProgram) -> None:
    """Let an exported program's graph compute in float32 wherever it says half precision."""
    for part in program.graph_module.modules():
        if not isinstance(part, torch.fx.GraphModule):
            continue
        for node in list(part.graph.nodes):
            if node.target is torch.ops.aten._assert_tensor_metadata.default:
                part.graph.erase_node(node)
                continue
            node.args = tuple(map(_wider, node.args))
            node.kwargs = {name: _wider(value) for name, value in node.kwargs.items()}
        part.recompile()
