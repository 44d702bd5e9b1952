"""Where the output units of a tensor lie: rows as a rule, and how the exceptions are told.

The length of the bias decides before the name, the name before the neighbours. What nothing tells
are the rows of dimension 0, as ``torch.nn`` has them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

from gradscope.checkpoints.tensors import TensorRef
from gradscope.statistics.layout import UnitLayout
from gradscope.weights.family import KERNEL, Family, place, told
from gradscope.weights.fused import divided
from gradscope.weights.roles import MATRICES, Role
from gradscope.weights.stacks import stacked

#: Columns are summed in arrays as long as a row.
WIDEST = 1 << 20

_TRANSPOSED = re.compile(r"deconv|transpose|conv_?t(ranspose)?\d*(\.|$)", re.IGNORECASE)
_OF_HEADS = re.compile(r"(^|_)(q|k|v|query|key|value)$")


def layouts(
    refs: Iterable[TensorRef], roles: Mapping[str, Role], config: Mapping[str, object]
) -> Callable[[TensorRef], UnitLayout | None]:
    """The layout of each tensor of a checkpoint; None where its units are plain rows."""
    family = Family({ref.name: ref for ref in refs}, config)
    return lambda ref: unit_layout(ref, roles[ref.name], family)


def unit_layout(ref: TensorRef, role: Role, family: Family) -> UnitLayout | None:
    """What the units of a tensor are; None for the rows of dimension 0, all alike."""
    if role not in MATRICES or len(ref.shape) < 2 or 0 in ref.shape:
        return None
    if role is Role.EXPERTS:
        return stacked(ref, family)
    found = divided(ref, _oriented(ref, role, family), family)
    if found.is_rows:
        return found if found.parts or found.head else None
    return found if found.width <= WIDEST else None


def as_rows(ref: TensorRef, units: UnitLayout | None) -> tuple[TensorRef, int, int]:
    """A tensor to be read unit after unit: so many rows of so many columns."""
    if units is None or units.contiguous or ref.strides is not None:
        rows = units.units if units is not None and units.contiguous else ref.rows or 1
        return ref, rows, ref.numel // rows
    shape = (units.groups, units.width, units.depth, units.inner)
    matrix = units.depth * units.width * units.inner
    strides = (matrix, units.inner, units.width * units.inner, 1)
    return replace(ref, shape=shape, strides=strides), units.units, units.unit_numel


def _oriented(ref: TensorRef, role: Role, family: Family) -> UnitLayout:
    bias = family.bias(ref)
    module, leaf = place(ref.name)
    if role is Role.EMBEDDING:
        return UnitLayout.along(ref.shape, 0)
    if KERNEL.fullmatch(leaf):
        return _kernel(ref, leaf, bias)
    axis = told(ref, bias)
    if axis is None:
        axis = family.orientation(ref)
    if axis is None:
        axis = 1 if len(ref.shape) > 2 and _TRANSPOSED.search(module) else 0
    if axis == 1 < len(ref.shape) - 1:
        return _transposed(ref, bias)
    return UnitLayout.along(ref.shape, axis)


def _kernel(ref: TensorRef, leaf: str, bias: tuple[int, ...] | None) -> UnitLayout:
    """Flax, Keras: [..., in, out]; attention's of heads [in, heads, size]; scanned layers first."""
    shape = ref.shape
    if leaf == "depthwise_kernel" and len(shape) > 2:
        return _joined(shape, 2)
    if bias is not None and len(bias) == 2 < len(shape):
        if shape[-2:] == bias:
            return _of_heads(shape)
        if (shape[0], shape[-1]) == bias:
            return UnitLayout.along(shape, -1, stacked=1)
    own = re.split(r"[./]", place(ref.name)[0][:-1])[-1]
    if bias is None and len(shape) == 3 and _OF_HEADS.search(own):
        return _of_heads(shape)
    if bias is not None and len(bias) == 1 and bias[0] == shape[0] != shape[-1]:
        return UnitLayout.along(shape, 0)
    return UnitLayout.along(shape, -1)


def _joined(shape: tuple[int, ...], last: int) -> UnitLayout:
    """Units along the last dimensions together."""
    return UnitLayout(1, math.prod(shape[:-last]), math.prod(shape[-last:]), 1, len(shape) - 1)


def _of_heads(shape: tuple[int, ...]) -> UnitLayout:
    return _joined(shape, 2).divided(head=shape[-1])


def _transposed(ref: TensorRef, bias: tuple[int, ...] | None) -> UnitLayout:
    """A transposed convolution's [in, out / groups, …]."""
    first, width, *kernel = ref.shape
    groups = bias[0] // width if bias is not None and bias[0] % width == 0 else 1
    found = UnitLayout.along((groups, first // groups, width, *kernel), 2, stacked=1)
    return UnitLayout(found.groups, found.depth, found.width, found.inner, 1)
