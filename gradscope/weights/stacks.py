"""Experts stacked in one tensor: [experts, out, in], [experts, in, out], [experts * n, width]."""

from __future__ import annotations

import re
from dataclasses import replace

from gradscope.checkpoints.tensors import TensorRef
from gradscope.statistics.layout import Part, UnitLayout
from gradscope.weights.family import Family, own_name, place

#: What the first matrices of an expert are called, and the last.
_UP = re.compile(r"gate|up|w1|w3|v1|wi|fc1|input|h_to_4h", re.IGNORECASE)
_DOWN = re.compile(r"down|w2|wo|fc2|output|4h_to_h", re.IGNORECASE)
_ROUTERS = ("router.weight", "gate.weight", "router.layer.weight", "router.kernel", "gate.kernel")


def stacked(ref: TensorRef, family: Family) -> UnitLayout | None:
    """Units of each expert, which is a part of its own; None where nothing tells their number."""
    if len(ref.shape) == 2:
        return _along_rows(ref, family)
    axis = 2 if len(ref.shape) == 3 and _input_first(ref, family) else 1
    layout = UnitLayout.along(ref.shape, axis, stacked=1)
    return layout.divided(*(Part(f"expert {i}", layout.width) for i in range(layout.groups)))


def _along_rows(ref: TensorRef, family: Family) -> UnitLayout | None:
    """Matrices [n, width] below one another, as many as the router has rows; w2 is [in, out]."""
    module, own = place(ref.name.removesuffix(".weight"))
    outer = place(place(module.rstrip("./"))[0].rstrip("./"))[0]
    routers = (family.refs.get(outer + name) for name in _ROUTERS)
    experts = next((r.shape[0] for r in routers if r is not None and len(r.shape) == 2), 0)
    if not experts or ref.shape[0] % experts:
        return None
    shape = (experts, ref.shape[0] // experts, ref.shape[1])
    layout = UnitLayout.along(shape, 2 if own == "w2" else 1, stacked=1)
    parts = (Part(f"expert {i}", layout.width) for i in range(experts))
    return replace(layout, axis=1 if own == "w2" else 0).divided(*parts)


def _input_first(ref: TensorRef, family: Family) -> bool:
    """Whether the last dimension is what an expert's matrix gives, by bias, partner or router."""
    _, a, b = ref.shape
    bias = family.bias(ref)
    if bias is not None and len(bias) == 2 and a != b and bias[1] in (a, b):
        return bias[1] == b
    partner = _partner(ref, family)
    if partner is not None:
        _, c, d = partner.shape
        if a == 2 * d or c == 2 * b:  # gate and up in one, a unit a row
            return False
        if b == 2 * c or d == 2 * a:
            return True
    name = own_name(ref.name.removesuffix(".weight"))
    hidden = [n for n in _hidden(ref, family) if n in (a, b)]
    if a == b or not hidden:
        return False
    return (hidden[0] == a) if _UP.search(name) and not _DOWN.search(name) else (hidden[0] == b)


def _partner(ref: TensorRef, family: Family) -> TensorRef | None:
    """The expert's last matrix beside a first one, and the other way round."""
    module = place(ref.name.removesuffix(".weight"))[0]
    down = _DOWN.search(own_name(ref.name.removesuffix(".weight"))) is not None
    others = (
        found
        for name in ("gate_up_proj", "input_linear", "down_proj", "output_linear")
        for leaf in ("", ".weight")
        if (found := family.refs.get(f"{module}{name}{leaf}")) is not None and found is not ref
    )
    return next(
        (o for o in others if len(o.shape) == 3 and bool(_DOWN.search(o.name)) != down), None
    )


def _hidden(ref: TensorRef, family: Family) -> list[int]:
    """What the model's width may be: the configuration's, or that of the router's input."""
    found = []
    module = ref.name
    while module:
        module = place(module.rstrip("./"))[0]
        routers = (family.refs.get(module + name) for name in _ROUTERS)
        for router in (r for r in routers if r is not None and len(r.shape) == 2):
            found += [n for n in router.shape if n != ref.shape[0]]
    return found + family.numbers("hidden_size", "d_model", "n_embd", "dim")
