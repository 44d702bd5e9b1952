"""Which values the companions of codes may have."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from gradscope.checkpoints.tensors import TensorRef
from gradscope.quantization.weights import Companion, Kind, QuantizedWeight
from gradscope.statistics.records import Statistics

#: Share of a weight that scales of zero may cost where the scales are 8-bit floats: those of
#: blocks that are nearly zero vanish in their type.
VANISHING = 0.01


def wrong_values(
    weight: QuantizedWeight, measured: Mapping[str, Statistics], lost: Mapping[str, float]
) -> dict[str, str]:
    """What is wrong with the values of a weight's companions, by name.

    ``lost`` is the share of the weight's codes that are not zero and have a scale of zero.
    """
    found = {
        companion.name: wrong_value(companion, statistics, lost.get(weight.codes.name, 0.0))
        for companion in weight.companions
        if (statistics := measured.get(companion.name)) is not None
    }
    return {name: reason for name, reason in found.items() if reason}


def wrong_value(companion: Companion, s: Statistics, lost: float = 0.0) -> str:
    """What is wrong with the values of one companion; nothing where they are sound."""
    if companion.kind is Kind.ANY:
        return ""
    if companion.kind is Kind.INDEX:
        outside = (
            s.min is not None and s.max is not None and not 0 <= s.min <= s.max < companion.groups
        )
        return (
            f"names groups {s.min} to {s.max}, and there are {companion.groups:,}"
            if outside
            else ""
        )
    if s.finite_count < s.count:
        return f"has {s.count - s.finite_count:,} of {s.count:,} elements that are not finite"
    if companion.kind is Kind.SIGNED or s.min is None:
        return ""
    if s.min < 0 or (s.min == 0 and companion.kind is Kind.GLOBAL):
        return f"has elements that are not positive (smallest {s.min:.6g})"
    limit = VANISHING if companion.ref.dtype.startswith("F8") else 0.0
    if s.zero_count and (lost > limit or companion.ref.numel == 1):
        return (
            f"has elements that are not positive: {s.zero_count:,} of {s.count:,} are zero, "
            "over codes that are not"
        )
    return ""


def loses(weight: QuantizedWeight, measured: Mapping[str, Statistics]) -> TensorRef | None:
    """What to measure to know how much of a weight scales of zero cost; None without any."""
    from gradscope.quantization.decoding import Dequantized  # which rules have no use for

    values = weight.values
    zeros = any(
        c.kind is Kind.SCALE and c.name in measured and measured[c.name].zero_count
        for c in weight.companions
    )
    if values is None or not isinstance(weight.decoding, Dequantized) or not zeros:
        return None
    return replace(values, decoding=replace(weight.decoding, lost=True))
