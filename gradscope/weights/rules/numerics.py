"""Rules about values and their dtype, and about the scales of quantised weights."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from gradscope.report.rules import Observation, rule
from gradscope.report.severity import Severity
from gradscope.statistics.dtypes import is_narrow
from gradscope.weights.names import common_pattern
from gradscope.weights.result import Examined, Need, TensorResult
from gradscope.weights.roles import AUXILIARY, Role, split
from gradscope.weights.rules.tensors import VANISHED, with_numerics


@rule("W115", "dtype-headroom", Severity.MEDIUM, reads=Examined, needs=Need.STATISTICS)
def dtype_headroom(
    examined: Examined,
    *,
    headroom_bits: float = 1.0,
    saturated: float = 1e-3,
    subnormal: float = 0.01,
) -> Iterator[Observation]:
    """The values are close to an end of their dtype's range.

    Less than one doubling below the greatest finite value (float16: above 32,752) overflows at
    the next update; more than 0.1 % of elements at the greatest value of an 8-bit float were
    clipped by their scale; more than 1 % subnormal elements have lost precision (low). What decayed
    to nothing as a whole is judged by `all-zero`.
    """
    for tensor, s, numerics in with_numerics(examined):
        if is_narrow(tensor.dtype):
            share = numerics.saturated_fraction or 0.0
            if tensor.dtype.startswith("F8") and share > saturated:
                yield Observation(
                    tensor.name,
                    f"{share:.2%} of elements are at the greatest value of {tensor.dtype}",
                    "recompute the scale from the greatest magnitude, per row or block",
                    {"saturated_fraction": share, "affected_fraction": share},
                    saturated,
                )
            continue
        if numerics.headroom_bits is not None and numerics.headroom_bits < headroom_bits:
            yield Observation(
                tensor.name,
                f"its greatest magnitude {s.abs_max:.6g} is {numerics.headroom_bits:.2f} doublings "
                f"below the limit of {tensor.dtype}",
                "store it in BF16 or F32",
                {"headroom_bits": numerics.headroom_bits},
                headroom_bits,
            )
        share = s.subnormal_count / s.count
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


@rule("W116", "redundant-precision", Severity.INFO, reads=Examined, needs=Need.STATISTICS)
def redundant_precision(examined: Examined, *, least: int = 256) -> Iterator[Observation]:
    """Float32 tensors whose values all fit a 16-bit type without loss: half the bytes are zero."""
    for payload in ("BF16", "F16"):
        found = [
            t
            for t, s, n in with_numerics(examined)
            if n.payload == payload and t.numel >= least and s.min != s.max
        ]
        if found:
            saved = sum(t.numel for t in found) * 2
            yield Observation(
                common_pattern(found),
                f"{len(found)} F32 tensors hold {payload} values: {saved:,} bytes are redundant",
                f"store them as {payload}; no value changes",
                {"tensors": len(found), "redundant_bytes": saved},
            )


_SCALES = (
    "weight_scale",
    "weight_scale_inv",
    "scale",
    "scales",
    "scale_weight",
    "weight_scale_2",
    "scale_inv",
)
_NEEDED = {"qweight": ("scales",), "weight_packed": ("weight_scale",)}


@rule("W117", "scale-missing", Severity.HIGH, reads=Examined, needs=Need.STATISTICS)
def scale_missing(examined: Examined, *, scaled_from: float = 16.0) -> Iterator[Observation]:
    """A quantised weight has no scale, or one that is not positive, not finite or misshapen.

    Loaders leave an absent scale uninitialised and carry on (vLLM #57108). An 8-bit float
    weight whose values stay below 16, in a file without any scale, was cast, not scaled: info.
    """
    any_scale = any(t.role is Role.SCALE for t in examined.tensors)
    for tensor in examined.tensors:
        module, leaf = split(tensor.name)
        candidates = _NEEDED.get(leaf) or (
            _scale_names(leaf) if tensor.role is Role.QUANTIZED else ()
        )
        if not candidates:
            continue
        scales = [
            s
            for name in candidates
            if (s := examined.by_name.get(f"{module}.{name}" if module else name))
        ]
        if not scales:
            yield _no_scale(tensor, candidates[0], any_scale, scaled_from)
        for scale in scales:
            if reason := _invalid(scale, tensor):
                yield Observation(
                    scale.name,
                    f"the scale of {tensor.name} {reason}",
                    "quantise again, or restore the scale from the source",
                    {"weight": tensor.name, "affected_fraction": 1.0},
                )


def _scale_names(leaf: str) -> tuple[str, ...]:
    """What the scale of a tensor may be called beside it: by convention, or after its own name."""
    return (*_SCALES, f"{leaf}_scale", f"{leaf}_scale_inv", f"{leaf}_scales")


def _no_scale(
    tensor: TensorResult, wanted: str, any_scale: bool, scaled_from: float
) -> Observation:
    peak = tensor.statistics.abs_max if tensor.statistics is not None else None
    cast = tensor.role is Role.QUANTIZED and not any_scale and (peak or 0) < scaled_from
    return Observation(
        tensor.name,
        f"{tensor.dtype} weight without a scale" + (": cast, not scaled" if cast else ""),
        "nothing to do if the loader expects an unscaled cast"
        if cast
        else f"restore {split(tensor.name)[0]}.{wanted} from the source, or quantise again",
        {"abs_max": float(peak) if peak is not None else math.nan, "affected_fraction": 1.0},
        threshold=scaled_from,
        severity=Severity.INFO if cast else None,
    )


def _invalid(scale: TensorResult, weight: TensorResult) -> str:
    """What is wrong with a scale, or nothing."""
    s = scale.statistics
    if s is None:
        return ""
    if s.finite_count < s.count:
        return f"has {s.count - s.finite_count:,} elements that are not finite"
    if s.min is not None and s.min <= 0:
        return f"has elements that are not positive (smallest {s.min:.6g})"
    if weight.role is Role.QUANTIZED and not _grid_fits(scale.shape, weight.shape):
        return (
            f"has shape {list(scale.shape)}, which does not divide {list(weight.shape)} into blocks"
        )
    return ""


def _grid_fits(scale: Sequence[int], weight: Sequence[int]) -> bool:
    """Whether a scale's shape is one value, one a row, or a grid of equal blocks of a weight."""
    if math.prod(scale) == 1 or list(scale) == [weight[0]]:
        return True
    if len(scale) != len(weight):
        return False
    return all(0 < n <= m and -(-m // -(-m // n)) == n for n, m in zip(scale, weight, strict=True))
