"""Rules about broken values: not finite, impossibly large, all equal."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise

from gradscope.report.rules import Observation, rule
from gradscope.report.severity import Severity
from gradscope.statistics.records import Statistics
from gradscope.text import listed, plural
from gradscope.weights.adapters import MULTIPLIERS
from gradscope.weights.leaves import Leaf, leaf_of
from gradscope.weights.names import common_pattern
from gradscope.weights.result import Examined, Need, OutlierResult, TensorResult
from gradscope.weights.roles import (
    ADAPTERS,
    AUXILIARY,
    GAINS,
    MATRICES,
    TABLES,
    TRAINING,
    Role,
    split,
)
from gradscope.weights.rules.tensors import VANISHED, measured, mostly_dead, with_outliers


@rule("W101", "non-finite", Severity.CRITICAL, reads=Examined, needs=Need.TENSOR)
def non_finite(examined: Examined) -> Iterator[Observation]:
    """NaN or Inf among the elements of a tensor.

    One NaN makes every output that it reaches NaN; in an optimizer's state, every weight at the
    next step. Infinities are meant in an attention mask, in the state of a metric that has seen
    nothing, and where a schedule ends in 1/0: info where their pattern shows that, whatever the
    tensor is called, but never in a layer's parameter.
    """
    scales = examined.quantization.companions()
    for tensor, s in measured(examined):
        bad = s.nan_count + s.posinf_count + s.neginf_count
        if not bad or tensor.name in scales:  # those belong to scale-missing
            continue
        meant = _meant(tensor, s) if _may_hold_infinity(tensor) else None
        where = listed([list(e.index) for e in tensor.nonfinite[:3]], bad)
        yield Observation(
            tensor.name,
            f"{bad:,} of {s.count:,} elements are not finite ({s.nan_count:,} NaN, "
            f"{s.posinf_count:,} +Inf, {s.neginf_count:,} -Inf), "
            + (f"as {meant}" if meant else f"at {where}"),
            _instead(tensor, meant),
            {
                "nan_count": s.nan_count,
                "posinf_count": s.posinf_count,
                "neginf_count": s.neginf_count,
                "affected_fraction": bad / s.count,
            },
            threshold=0,
            severity=Severity.INFO if meant else None,
        )


#: What the patterns of ``statistics.infinity`` are found in.
_MEANT = {
    "state": "in a minimum or maximum that has seen nothing",
    "mask": "in a mask",
    "triangle": "in a mask of positions",
    "ramp": "at the end of a schedule",
}


def _meant(tensor: TensorResult, s: Statistics) -> str | None:
    """What infinities are there for: told by their pattern, or because a mask says it is one."""
    if tensor.infinity is not None:
        return _MEANT[tensor.infinity]
    masked = "mask" in split(tensor.name)[1] and s.count - s.finite_count == s.neginf_count
    return _MEANT["mask"] if masked else None


def _may_hold_infinity(tensor: TensorResult) -> bool:
    """Whether a tensor is none that a layer computes with, as far as its role and name tell."""
    if tensor.role is Role.BIAS:  # GPT-2 calls its causal mask so
        return len(tensor.shape) >= 2 and tensor.infinity in ("mask", "triangle")
    return _may_be_constant(tensor)


def _may_be_constant(tensor: TensorResult) -> bool:
    possible = tensor.role in (Role.BUFFER, Role.OTHER, Role.SCALAR, Role.VECTOR)
    return possible and leaf_of(tensor.name) in (Leaf.UNKNOWN, Leaf.FIXED)


def _instead(tensor: TensorResult, meant: str | None) -> str:
    if meant:
        return "nothing to do if that is what this tensor is"
    if tensor.role in (Role.OPTIMIZER, Role.MASTER):
        return (
            "do not resume from this file: the optimizer carries them into the weights; go back to "
            "the last checkpoint without them, and check the loss scale and the gradients of the "
            "steps after it"
        )
    return (
        "do not use this file; go back to the last checkpoint without them, and check the loss "
        "scale and the gradients of the steps after it"
    )


@rule("W102", "extreme-value", Severity.HIGH, reads=Examined, needs=Need.TENSOR)
def extreme_value(
    examined: Examined,
    *,
    peak_ratio: float = 1e4,
    magnitude: float = 1e6,
    gap: float = 100.0,
    gap_elsewhere: float = 1e4,
    score: float = 50.0,
    least: int = 1000,
    least_gap: int = 16,
) -> Iterator[Observation]:
    """A few elements lie so far out that storage or conversion must have damaged them.

    A flipped exponent bit multiplies a value by 2^16 (float16) to 2^128. Three signs: the peak
    ratio (greatest robust score over that of as many Gaussian values) above 1e4, where the
    greatest of 113 healthy matrices measured 37 and of small audio convolutions 689; a magnitude
    above 1e6 in a weight, a thousand times what a survey of eight released models found (aprender
    #2039); or a gap: the farthest elements lie 100 times (outside matrices 1e4 times) farther out
    than the next, alone. Flips of mantissa or sign bits leave no such trace; only a hash reveals
    those. Fewer than 16 elements below 1e6 have gaps by chance. In a constant, a gap must come with
    such a magnitude, and values that stand for "never" (-1e4 in the transitions of a CRF, 1e8 at
    the end of a series) are no damage.
    """
    scales = examined.quantization.companions()
    for tensor, s, outliers in with_outliers(examined):
        if tensor.role in TRAINING | {Role.COUNTER} or tensor.name in scales:
            continue
        limit = gap if tensor.role in MATRICES else gap_elsewhere
        great = (s.abs_max or 0) > magnitude
        telling = great or tensor.numel >= least_gap
        apart, widest = _gap(outliers, score) if telling else (0, 0.0)
        if _may_be_constant(tensor) and _stand_for_never(tensor, outliers, apart):
            continue
        if tensor.role is Role.BUFFER and not (great and widest > limit):
            continue
        reasons = []
        enough = tensor.numel >= least and tensor.role not in (Role.RUNNING_VAR, Role.BUFFER)
        enough = enough and not mostly_dead(tensor)
        if enough and (outliers.peak_ratio or 0) > peak_ratio:
            reasons.append(f"a peak ratio of {outliers.peak_ratio:.3g}")
        if great and tensor.role in MATRICES | GAINS | {Role.BIAS}:
            reasons.append(f"a magnitude of {s.abs_max:.3g}")
        if widest > limit:
            reasons.append(f"{widest:.3g} times farther out than the next")
        if reasons:
            yield _extreme(tensor, s, outliers, reasons, limit, apart)


def _stand_for_never(tensor: TensorResult, outliers: OutlierResult, apart: int) -> bool:
    """Whether the farthest elements are one value repeated, or the end of a series."""
    far = [e.value for e in outliers.top[: apart or len(outliers.top)]]
    if len(far) > 1:
        return max(far) - min(far) <= 1e-3 * abs(far[0])
    ends = (0, tensor.numel - 1)
    return len(far) == 1 and len(tensor.shape) == 1 and outliers.top[0].index[0] in ends


def _extreme(
    tensor: TensorResult,
    s: Statistics,
    outliers: OutlierResult,
    reasons: list[str],
    limit: float,
    apart: int,
) -> Observation:
    """``outliers`` lists no element of a tensor whose values are nearly all equal."""
    peak = outliers.top[0] if outliers.top else None
    value = peak.value if peak is not None else float(s.abs_max or 0)
    place = f"element {list(peak.index)}" if peak is not None else "its greatest magnitude"
    return Observation(
        tensor.name,
        f"{place} is {value:.6g}: {', '.join(reasons)}",
        f"compare the file's hash with its source; if it matches, check how {tensor.dtype} values "
        f"were converted or scaled, and {place} in an earlier checkpoint",
        {
            "value": value,
            "robust_score": peak.score if peak is not None and peak.score else math.nan,
            "peak_ratio": outliers.peak_ratio if outliers.peak_ratio is not None else math.nan,
            "affected_fraction": max(apart, 1) / tensor.numel,
        },
        threshold=limit,
    )


def _gap(outliers: OutlierResult, least_score: float) -> tuple[int, float]:
    """How many of the farthest elements stand apart from the rest, and by which factor."""
    scores = [e.score for e in outliers.top if e.score is not None]
    ratios = [
        (far / near if near > 0 else math.inf, place)
        for place, (far, near) in enumerate(pairwise(scores), 1)
        if far > least_score
    ]
    widest, place = max(ratios, key=lambda pair: pair[0], default=(0.0, 0))
    return place, widest


@rule("W103", "all-zero", Severity.HIGH, reads=Examined, needs=Need.STATISTICS)
def all_zero(examined: Examined, *, nothing: float = VANISHED) -> Iterator[Observation]:
    """Every element of a tensor is zero, or next to it.

    A matrix of zeros passes nothing on; failed downloads and saves leave them
    (aprender #2337: 27 of 339 tensors of a cached file). Zero biases, zero-initialised gains and
    tables of one row (RoBERTa's token types) are normal: info. Adapters, one of whose factors
    starts at zero, are judged by `idle-adapter`. A matrix of F32 or BF16 whose greatest magnitude
    is below 1e-30 was never saved wrong: weight decay shrank it while no gradient reached it, as it
    does to layers that the model does not use: medium. Experts belong to `dead-expert`. Averaged
    (EMA) or master weights that are zero where the model is not are one finding: the next
    evaluation or step would use them. So are the multipliers of adapters (DoRA's magnitudes, IA3).
    """
    yield from _zero_copies(examined)
    yield from _zero_multipliers(examined)
    for tensor, s in measured(examined):
        if s.zero_count < s.count or tensor.role in AUXILIARY | ADAPTERS:
            continue
        if examined.experts.covers(tensor.name) or MULTIPLIERS.search(tensor.name):
            continue
        matrix = tensor.role in MATRICES | {Role.QUANTIZED}
        matrix = matrix and not (tensor.role in TABLES and tensor.shape[0] == 1)
        yield Observation(
            tensor.name,
            f"all {s.count:,} elements are zero",
            "reload the tensor from its source, or retrain the layer"
            if matrix
            else "nothing to do if the layer starts from zero and was not trained",
            {"zero_count": s.zero_count, "affected_fraction": 1.0},
            severity=None if matrix else Severity.INFO,
        )
    for tensor, s in measured(examined, MATRICES - ADAPTERS):
        if tensor.dtype in ("F32", "BF16") and 0 < (s.abs_max or 0) < nothing:
            yield _decayed(tensor, s, nothing)


def _zero_multipliers(examined: Examined) -> Iterator[Observation]:
    scales = [(t, s) for t, s in measured(examined) if MULTIPLIERS.search(t.name)]
    zero = [t for t, s in scales if s.zero_count == s.count]
    if zero:
        yield Observation(
            common_pattern(zero),
            f"{len(zero)} of {plural(len(scales), 'tensor')} that multiply what a module gives are "
            f"zero: nothing is left of it ({listed([t.name for t in zero], len(zero), 3)})",
            "go back to an earlier checkpoint of the adapter, or leave these modules out of it",
            {"zero_tensors": len(zero), "tensors": len(scales), "affected_fraction": 1.0},
        )


def _decayed(tensor: TensorResult, s: Statistics, limit: float) -> Observation:
    return Observation(
        tensor.name,
        f"its greatest magnitude is {s.abs_max:.3g}: it passes nothing on; weight decay shrank it "
        "while no gradient reached it",
        "leave the layer out if the model does not use it; otherwise find out why it gets no "
        "gradient, and retrain it",
        {"abs_max": float(s.abs_max or 0), "affected_fraction": 1.0},
        threshold=limit,
        severity=Severity.MEDIUM,
    )


def _zero_copies(examined: Examined) -> Iterator[Observation]:
    for role, what in ((Role.AVERAGE, "averaged (EMA)"), (Role.MASTER, "master")):
        copies = list(measured(examined, {role}))
        zero = [t for t, s in copies if s.zero_count == s.count]
        lost = [t for t in zero if not _is_zero_in_model(t, examined, len(zero) == len(copies))]
        if lost:
            yield Observation(
                lost[0].name,
                f"{len(lost)} of {len(copies)} {what} tensors are zero, unlike the model's: "
                f"{listed([t.name for t in lost], len(lost))}",
                "do not evaluate or resume from them: start them anew from the model's weights",
                {"zero_tensors": len(lost), "tensors": len(copies), "affected_fraction": 1.0},
            )


def _is_zero_in_model(copy: TensorResult, examined: Examined, all_are: bool) -> bool:
    """Whether what a zero tensor is a copy of is zero, too, as biases and scales may be."""
    parts = copy.name.split(".")
    names = (".".join(parts[at:]) for at in range(1, len(parts)))
    for name in names:
        original = examined.by_name.get(name)
        if original is not None and original.statistics and original.shape == copy.shape:
            return original.statistics.zero_count == original.statistics.count
    return not all_are  # without names: only that nothing of the copy is left is telling


@rule("W104", "constant-tensor", Severity.MEDIUM, reads=Examined, needs=Need.TENSOR)
def constant_tensor(examined: Examined, *, least: int = 16) -> Iterator[Observation]:
    """All elements of a matrix have one value, not zero: its rows cannot differ.

    Vectors are often constant when they were not trained: info. Norm gains are judged by
    `untrained`, factors of adapters by `idle-adapter`, zeros by `all-zero`.
    """
    for tensor, s in measured(examined):
        constant = s.count >= least and s.min is not None and s.min == s.max != 0
        if (
            not constant
            or tensor.role in GAINS | AUXILIARY | {Role.ADAPTER}
            or s.finite_count < s.count
        ):
            continue
        yield Observation(
            tensor.name,
            f"all {s.count:,} elements are {s.min:.6g}",
            "check that this tensor was loaded and trained",
            {"value": float(s.min or 0), "affected_fraction": 1.0},
            severity=None if tensor.role in MATRICES else Severity.INFO,
        )


@rule("W118", "broken-index", Severity.MEDIUM, reads=Examined, needs=Need.TENSOR)
def broken_index(examined: Examined) -> Iterator[Observation]:
    """A table of indices does not hold the integers that it must.

    Position ids are 0 … n - 1; relative positions of a window change their sign when two places
    are exchanged; a permutation has every index once. Merges that average every tensor make
    fractions of them, half precision repeats (float16 above 2,048, bfloat16 above 256), and the
    model then looks up the rows of other positions (sd-webui #6728, #7450).
    """
    for found in examined.indices:
        tensor = examined.by_name[found.name]
        wanted = "" if found.wanted is None else f" instead of {found.wanted:g}"
        kinds = [
            f"{count:,} {kind}"
            for count, kind in ((found.fractions, "fractions"), (found.repeats, "repeats"))
            if count
        ]
        yield Observation(
            found.name,
            f"{found.wrong:,} of {tensor.numel:,} indices are wrong"
            + (f" ({', '.join(kinds)})" if kinds else "")
            + f"; {list(found.first)} is {found.value:.9g}{wanted}",
            "take this tensor from the base model, in its integer type, or leave it out: models "
            "make it anew; exclude it from merges and casts",
            {
                "wrong": found.wrong,
                "fractions": found.fractions,
                "repeats": found.repeats,
                "affected_fraction": found.wrong / tensor.numel,
            },
            threshold=0,
        )
