"""Rules about values and their dtype."""

from __future__ import annotations

from collections.abc import Iterator

from gradscope.report.rules import Observation, rule
from gradscope.report.severity import Severity
from gradscope.statistics.dtypes import is_narrow
from gradscope.weights.names import common_pattern
from gradscope.weights.result import Examined, Need, TensorResult
from gradscope.weights.roles import AUXILIARY, GAINS, MATRICES, TRAINING, Role
from gradscope.weights.rules.tensors import VANISHED, mostly_dead, with_numerics

_WIDE = ("F64", "F32", "BF16")


@rule("W115", "dtype-headroom", Severity.MEDIUM, reads=Examined, needs=Need.TENSOR)
def dtype_headroom(
    examined: Examined,
    *,
    headroom_bits: float = 1.0,
    saturated: float = 1e-3,
    subnormal: float = 0.01,
) -> Iterator[Observation]:
    """The values are close to an end of their dtype's range.

    Less than one doubling below the greatest finite value (float16: above 32,752) overflows at
    the next update; more than 0.1 % of elements at the greatest value of an 8-bit float, and more
    than three a scale, which maps one there, were clipped; more than 1 % subnormal elements have
    lost precision (low), unless they are those of `dead-units`. What decayed to nothing as a whole
    is judged by `all-zero`.
    """
    codes = examined.quantization.codes()
    for tensor, s, numerics in with_numerics(examined):
        without_values = tensor.name in codes and tensor.dequantized is None
        if tensor.role is Role.SCALE or without_values:  # scale-missing judges them
            continue
        if is_narrow(tensor.dtype):
            share = numerics.saturated_fraction or 0.0
            if tensor.dtype.startswith("F8") and share > saturated + _at_limit_by_design(tensor):
                yield Observation(
                    tensor.name,
                    f"{share:.2%} of elements are at the greatest value of {tensor.dtype}",
                    "recompute the scale from the greatest magnitude, per row or block",
                    {"saturated_fraction": share, "affected_fraction": share},
                    saturated,
                )
            continue
        if tensor.role in TRAINING:
            continue
        headroom = numerics.headroom_bits
        if tensor.role is Role.BUFFER:  # masks are filled with the least value there is
            headroom = None
        if tensor.dtype in _WIDE and tensor.role in MATRICES | GAINS | {Role.BIAS}:
            headroom = None  # extreme-value judges what no training reaches
        if headroom is not None and headroom < headroom_bits:
            yield Observation(
                tensor.name,
                f"its greatest magnitude {s.abs_max:.6g} is {headroom:.2f} doublings "
                f"below the limit of {tensor.dtype}",
                "store it in BF16 or F32",
                {"headroom_bits": headroom},
                headroom_bits,
            )
        share = 0.0 if mostly_dead(tensor) else s.subnormal_count / s.count
        if (s.abs_max or 0) < VANISHED or tensor.role in AUXILIARY:
            continue
        if share > subnormal and s.count >= 256:
            yield Observation(
                tensor.name,
                f"{share:.1%} of elements are subnormal in {tensor.dtype}: they have fewer bits "
                "than the rest, and some devices flush them to zero",
                "store it in BF16 or F32",
                {"subnormal_fraction": share},
                subnormal,
                Severity.LOW,
            )


def _at_limit_by_design(tensor: TensorResult, a_scale: float = 3.0) -> float:
    """Share of codes at their greatest value that scales from greatest magnitudes account for."""
    found = tensor.dequantized
    return a_scale * found.scales / tensor.numel if found is not None else 0.0


@rule("W116", "redundant-precision", Severity.INFO, reads=Examined, needs=Need.STATISTICS)
def redundant_precision(examined: Examined, *, least: int = 256) -> Iterator[Observation]:
    """Float32 tensors whose values all fit a 16-bit type without loss: half the bytes are zero."""
    for payload in ("BF16", "F16"):
        found = [
            t
            for t, s, n in with_numerics(examined)
            if n.payload == payload
            and t.numel >= least
            and s.min != s.max
            and t.role not in TRAINING | {Role.SCALE}
        ]
        if found:
            saved = sum(t.numel for t in found) * 2
            yield Observation(
                common_pattern(found),
                f"{len(found)} F32 tensors hold {payload} values: {saved:,} bytes are redundant",
                f"store them as {payload}; no value changes",
                {"tensors": len(found), "redundant_bytes": saved},
            )
