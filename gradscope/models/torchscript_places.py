"""Where in a TorchScript graph each module's output is: told by what nodes recorded of it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

_LISTS = ("ModuleList", "ModuleDict")
#: All that is left to name in a frozen graph: the operators that return feature maps and tokens.
_NAMED_OPERATORS = frozenset(
    f"aten::{name}"
    for base in ("_convolution", "conv2d", "relu", "hardtanh", "hardswish", "silu", "gelu", "add",
                 "batch_norm", "layer_norm", "linear", "leaky_relu", "elu", "cat", "mul")
    for name in (base, base + "_")
)  # fmt: skip


def nodes_of(block: Any) -> Iterator[Any]:
    """Nodes in post-order: a branch's own output comes after what lies in it."""
    for node in block.nodes():
        for inner in node.blocks():
            yield from nodes_of(inner)
        yield node


@dataclass(slots=True)
class _Module:
    """A module while its nodes are looked for."""

    name: str
    #: The parts of its name that nodes record: lists and dicts of modules are left out.
    known: list[str]
    #: Modules whose nodes record the same name.
    twins: list[str]
    place: int | None = None


def places_of(script: torch.jit.ScriptModule, graph: Any) -> dict[str, int]:
    """The index, among all nodes, of the last output of each module's last call."""
    modules = _modules(script)
    by_known: dict[tuple[str, ...], list[_Module]] = {}
    for module in modules:
        by_known.setdefault(tuple(module.known), []).append(module)
    owner: str | None = None
    nodes = list(nodes_of(graph))
    for index, node in enumerate(nodes):
        if node.kind() in ("prim::GetAttr", "prim::Constant"):
            continue
        owner = _parameter_used(node) or owner
        if not _gives_tensor(node):
            continue
        path = _path(node)
        for depth in range(1, len(path) + 1):
            for module in by_known.get(tuple(path[:depth]), ()):
                if _is_it(module, owner):
                    module.place = index
    found = {m.name: m.place for m in modules if m.name and m.place is not None}
    return found or dict(_by_operator(nodes))


def _by_operator(nodes: Sequence[Any]) -> Iterator[tuple[str, int]]:
    """Names in a frozen graph, which has lost its modules: the operator and a running number."""
    counts: dict[str, int] = {}
    for index, node in enumerate(nodes):
        if node.kind() in _NAMED_OPERATORS and _gives_tensor(node):
            base = node.kind().removeprefix("aten::").strip("_")
            counts[base] = counts.get(base, -1) + 1
            yield f"{base}.{counts[base]}", index


def _modules(script: torch.jit.ScriptModule) -> list[_Module]:
    kinds = {
        name: getattr(module, "original_name", type(module).__name__)
        for name, module in script.named_modules()
    }
    known = {name: list(_traced_parts(name, kinds)) for name in kinds}
    return [
        _Module(name, parts, [other for other, theirs in known.items() if theirs == parts])
        for name, parts in known.items()
    ]


def _traced_parts(name: str, kinds: Mapping[str, str]) -> Iterator[str]:
    parts = name.split(".") if name else []
    for i, part in enumerate(parts):
        if kinds.get(".".join(parts[: i + 1])) not in _LISTS:
            yield part


_SELF = ("SELF", "UNKNOWN_INSTANCE", "top")


def _path(node: Any) -> list[str]:
    """The module path in a node's hierarchy, ``layer4(Sequential).1(BasicBlock).relu(ReLU)``."""
    hierarchy = node.getModuleHierarchy()
    if not hierarchy:
        return []
    parts = [part.split("(")[0] for part in re.split(r"\.(?![^()]*\))", hierarchy)]
    return [part for part in parts if part not in _SELF]


def _gives_tensor(node: Any) -> bool:
    if node.outputsSize() != 1 or node.kind().startswith("prim::Get"):
        return False
    return bool(node.output().type().isSubtypeOf(torch._C.TensorType.get()))


def _parameter_used(node: Any) -> str | None:
    """The name of a parameter among a node's inputs."""
    tensor = torch._C.TensorType.get()
    for value in node.inputs():
        parts: list[str] = []
        source = value.node()
        while source.kind() == "prim::GetAttr":
            parts.append(source.s("name"))
            source = source.input().node()
        if parts and value.type().isSubtypeOf(tensor):
            return ".".join(reversed(parts))
    return None


def _is_it(module: _Module, owner: str | None) -> bool:
    """Among modules with the same name, the one whose parameters were used last."""
    if len(module.twins) == 1 or owner is None:
        return True
    return max(module.twins, key=lambda twin: _shared(twin, owner)) == module.name


def _shared(a: str, b: str) -> int:
    count = 0
    for x, y in zip(a.split("."), b.split("."), strict=False):
        if x != y:
            break
        count += 1
    return count
