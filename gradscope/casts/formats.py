"""The types that weights are cast to, and how their scales are chosen: the one table of both."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from gradscope.errors import UsageError
from gradscope.statistics.dtypes import FORMATS, FloatFormat
from gradscope.text import quoted

#: What elements share a scale: none has one, all of the tensor, of a row (unit), of a block.
Grain = Literal["plain", "tensor", "row", "block"]


@dataclass(frozen=True, slots=True)
class Target:
    """A type that tensors are cast to. ``name`` is how it was asked for.

    The grid of values is that of a float of ``mantissa_bits`` whose smallest exponent is
    ``least_exponent`` (integers are one whose least exponent is as large as that of the greatest
    value). ``scale_bits`` are those of each scale, ``own_bits`` of one more for the whole tensor.
    """

    name: str
    bits: int
    mantissa_bits: int
    least_exponent: int
    greatest: float
    grain: Grain = "plain"
    #: Grains that may be asked for, the first unasked.
    grains: tuple[Grain, ...] = ("plain",)
    block: int = 0
    #: Whether the scale of a block is a power of two (E8M0); else it is a float8 E4M3.
    powers: bool = False
    scale_bits: int = 32
    own_bits: int = 0

    def nbytes(self, rows: int, columns: int) -> int:
        """Bytes of a tensor seen as ``rows`` of ``columns``, with its scales."""
        scales = {
            "plain": 0,
            "tensor": 1,
            "row": rows,
            "block": rows * -(-columns // self.block) if self.block else 0,
        }[self.grain]
        bits = rows * columns * self.bits + scales * self.scale_bits + self.own_bits
        return -(-bits // 8)


def _float(name: str, bits: int, form: FloatFormat, greatest: float, *grains: Grain) -> Target:
    return Target(
        name, bits, form.mantissa_bits, 1 - form.bias, greatest, grains[0], grains
    )  # fmt: skip


_E2M1 = FORMATS["F4"]
#: By name. A name without a grain is what deployment means by it: fp8 with one scale a tensor,
#: int8 with one a row, the 4-bit floats in their blocks (OCP Microscaling v1.0; NVIDIA's NVFP4).
TARGETS: dict[str, Target] = {
    t.name: t
    for t in (
        _float("fp16", 16, FORMATS["F16"], 65504.0, "plain"),
        _float("bf16", 16, FORMATS["BF16"], math.ldexp(255, 120), "plain"),
        _float("fp8_e4m3", 8, FORMATS["F8_E4M3"], 448.0, "tensor", "row", "plain"),
        _float("fp8_e5m2", 8, FORMATS["F8_E5M2"], 57344.0, "tensor", "row", "plain"),
        Target("int8", 8, 6, 6, 127.0, "row", ("row", "tensor")),
        replace(
            _float("nvfp4", 4, _E2M1, 6.0, "block"), block=16, scale_bits=8, own_bits=32
        ),
        replace(_float("mxfp4", 4, _E2M1, 6.0, "block"), block=32, scale_bits=8, powers=True),
    )
}  # fmt: skip


def target(spelled: str) -> Target:
    """The target of a name, or of ``name:grain``. Raises UsageError for one that there is not."""
    name, _, grain = spelled.partition(":")
    found = TARGETS.get(name)
    if found is None:
        known = ", ".join(_spellings())
        raise UsageError(f"cannot cast to {quoted(spelled, 40)}; there are {known}")
    if not grain:
        return found
    wanted = next((g for g in found.grains if g == grain), None)
    if wanted is None:
        one = ", ".join(f"{name}:{g}" for g in found.grains)
        raise UsageError(f"{name} is not scaled by {quoted(grain, 40)}; there are {one}")
    return replace(found, name=spelled, grain=wanted)


def _spellings() -> list[str]:
    """Every name, with the grains that it does not have unasked."""
    return [
        t.name + "".join(f" (:{g})" for g in t.grains[1:]) for t in TARGETS.values()
    ]  # fmt: skip
