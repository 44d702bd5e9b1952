"""TorchScript: named layers by a tap operator, inserted into the graph after a module's output.

A ScriptModule refuses hooks. Its inlined graph records which module each node came from, though,
so our operator goes behind the last of them. It passes the tensor, with its gradient function, to
Python, and what that returns replaces it. Only this module uses private parts of ``torch._C``.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from gradscope.errors import UsageError
from gradscope.models.folding import laid
from gradscope.models.model import Copy, Forward, Model, Tap, first_convolution
from gradscope.models.precision import constants_of, note_of, tensors_of, wide_copy, widen_graph
from gradscope.models.torchscript_copy import rewrite, worthwhile
from gradscope.models.torchscript_places import nodes_of, places_of

#: Fused attention, as traced without gradients: it has no derivative.
_FUSED = "aten::_native_multi_head_attention"
#: TorchScript needs no trust because it cannot touch the system; these operators could.
_TOUCHES_FILES = ("aten::save", "aten::from_file", "aten::load")
_NO_DERIVATIVE = ("aten::_transformer_encoder_layer_fwd",)


class _Active(threading.local):
    taps: Mapping[str, Tap] = {}


_active = _Active()


def _tap(x: Tensor, name: str) -> Tensor:
    tap = _active.taps.get(name)
    found = tap(x) if tap is not None else None
    return x if found is None else found


def _attention(
    query: Tensor, key: Tensor, value: Tensor, width: int, heads: int, weight: Tensor, bias: Tensor,
    projection: Tensor, shift: Tensor, *_masks: object,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """``aten::_native_multi_head_attention`` in differentiable operators."""
    sources = (query, key, value)
    parts = zip(sources, weight.chunk(3), bias.chunk(3), strict=True)
    linear = torch.nn.functional.linear
    projected = [linear(x, w, b) for x, w, b in parts]
    q, k, v = (p.unflatten(2, (heads, width // heads)).transpose(1, 2) for p in projected)
    mixed = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    return linear(mixed.transpose(1, 2).flatten(2), projection, shift), None


_LIBRARY: list[torch.library.Library] = []


def _define_operators() -> None:
    """Register the operators, once per process and only where TorchScript is used."""
    if _LIBRARY:
        return
    library = torch.library.Library("gradscope", "DEF")
    library.define("tap(Tensor(a) x, str name) -> Tensor(a)")
    library.impl("tap", _tap, "CompositeImplicitAutograd")
    library.define(
        "attention(Tensor query, Tensor key, Tensor value, int width, int heads, Tensor weight, "
        "Tensor bias, Tensor projection, Tensor shift, Tensor? mask, bool need_weights, "
        "bool average, int? mask_type) -> (Tensor, Tensor?)"
    )
    library.impl("attention", _attention, "CompositeImplicitAutograd")
    _LIBRARY.append(library)


def script_model(script: torch.jit.ScriptModule) -> Model:
    """A ScriptModule as a Model.

    It runs without the profiling executor, which would hide operators from the probe. Raises
    UsageError for a program that needs more than one tensor.
    """
    _define_operators()
    # Before it is ever run: afterwards inlining loses the modules' names.
    graph = _inlined(script)
    notes = note_of((*tensors_of(script), *constants_of(graph)))
    if notes:
        script = wide_copy(script)
        graph = _inlined(script)
        widen_graph(graph)
    places = places_of(script, graph)
    others = _defaults(script, graph)
    weight = first_convolution(script)

    def passing(layout: torch.memory_format | None = None) -> Forward:
        compiled: dict[frozenset[str], Callable[..., Any]] = {}

        def forward(inputs: Tensor, taps: Mapping[str, Tap]) -> Any:
            names = frozenset(taps)
            if names not in compiled:
                found = _with_taps(graph.copy(), names, places)
                if layout is not None:
                    rewrite(found, list(nodes_of(found)), script, layout)
                compiled[names] = _function(found)
            before, _active.taps = _active.taps, taps
            try:
                with torch.jit.optimized_execution(False), _quiet():  # type: ignore[attr-defined]
                    return compiled[names](script._c, inputs, *others)
            finally:
                _active.taps = before

        return forward

    return Model(
        script,
        "torchscript",
        tuple(places),
        passing(),
        size=(None if weight is None else int(weight.shape[1]), None, None),
        notes=notes,
        copied=lambda _image: (
            Copy(laid(passing(layout), layout))
            for layout in (torch.channels_last, torch.contiguous_format)
            if worthwhile(nodes_of(graph))
        ),
    )


class _quiet(warnings.catch_warnings):  # noqa: N801  reads as what it does
    """Silence TorchScript's deprecation warnings, which the user of a file cannot act on."""

    def __enter__(self) -> Any:
        entered = super().__enter__()
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        return entered


def _inlined(script: torch.jit.ScriptModule) -> Any:
    graph = script.graph.copy()
    torch._C._jit_pass_inline(graph)
    for node in nodes_of(graph):
        if node.kind() in _TOUCHES_FILES:
            raise UsageError(
                f"it contains {node.kind()}, which accesses files; such programs are not run"
            )
        if node.kind() in _NO_DERIVATIVE:
            raise UsageError(
                f"it was traced without gradients and contains {node.kind()}, which has no "
                "derivative; trace it again outside torch.no_grad()"
            )
    return graph


def _defaults(script: torch.jit.ScriptModule, graph: Any) -> tuple[Any, ...]:
    """What the arguments after the images are, where none has to be given.

    Raises UsageError for a program that does not take one tensor first, or needs more.
    """
    # Optional[Tensor] takes a tensor too.
    images, optional = torch._C.OptionalType.ofTensor(), torch._C.OptionalType
    types = [value.type() for value in list(graph.inputs())[1:]]
    _, *taken = script.forward.schema.arguments  # type: ignore[attr-defined]
    arguments = taken[1:]
    free = (
        argument.has_default_value() or isinstance(kind, optional)
        for argument, kind in zip(arguments, types[1:], strict=True)
    )
    if not types or not types[0].isSubtypeOf(images) or not all(free):
        named = ", ".join(f"{argument.name}: {argument.type}" for argument in taken)
        raise UsageError(
            f"this program takes ({named}), not images as one tensor [N, C, H, W]; save one whose "
            "forward takes them so, and hands them on as the model wants them"
        )
    return tuple(a.default_value for a in arguments)


def _with_taps(graph: Any, names: frozenset[str], places: Mapping[str, int]) -> Any:
    """The graph, changed: with a tap after each named layer's output."""
    nodes = list(nodes_of(graph))
    for name in names:
        _insert(graph, nodes[places[name]], name)
    for node in nodes:
        if node.kind() == _FUSED:
            _replace_fused(graph, node)
    return graph


def _function(graph: Any) -> Callable[..., Any]:
    graph.lint()
    function: Callable[..., Any] = torch._C._create_function_from_graph("forward", graph)
    return function


def _insert(graph: Any, node: Any, name: str) -> None:
    value = node.output()
    graph.setInsertPoint(node)
    tap = graph.create("gradscope::tap", [value, graph.insertConstant(name)], 1)
    tap.insertAfter(node)
    value.replaceAllUsesAfterNodeWith(tap, tap.output())
    tap.output().setType(value.type())


def _replace_fused(graph: Any, node: Any) -> None:
    graph.setInsertPoint(node)
    ours = graph.create("gradscope::attention", list(node.inputs()), 2)
    ours.insertAfter(node)
    for old, new in zip(node.outputs(), ours.outputs(), strict=True):
        new.setType(old.type())
        old.replaceAllUsesWith(new)
    node.destroy()


# Which node returns which module's output.
