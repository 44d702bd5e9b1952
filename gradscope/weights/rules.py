"""Rules about the values of one checkpoint's tensors.

Limits marked "calibrated" were set on the healthy models of ``fixtures/`` so that none of them has
a high finding; the README prints that rate. The others cite their source.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise

from gradscope.report.model import Severity
from gradscope.report.rules import Observation, rule
from gradscope.statistics.dtypes import is_float, is_narrow
from gradscope.statistics.records import Numerics, Statistics, Units
from gradscope.weights.result import Examined, OutlierResult, TensorResult
from gradscope.weights.roles import AUXILIARY, GAINS, MATRICES, TABLES, Role, split


def _measured(
    examined: Examined, roles: Iterable[Role] | None = None
) -> Iterator[tuple[TensorResult, Statistics]]:
    """The float and complex tensors that were measured, with their statistics."""
    wanted = None if roles is None else frozenset(roles)
    for tensor in examined.tensors:
        if tensor.statistics is None or tensor.numel == 0 or (wanted and tensor.role not in wanted):
            continue
        if is_float(tensor.dtype) or tensor.dtype.startswith("C"):
            yield tensor, tensor.statistics


def _with_outliers(
    examined: Examined, roles: Iterable[Role] | None = None
) -> Iterator[tuple[TensorResult, Statistics, OutlierResult]]:
    for tensor, statistics in _measured(examined, roles):
        if tensor.outliers is not None:
            yield tensor, statistics, tensor.outliers


def _with_units(examined: Examined, roles: Iterable[Role]) -> Iterator[tuple[TensorResult, Units]]:
    for tensor, statistics in _measured(examined, roles):
        if tensor.units is not None and statistics.zero_count < statistics.count:
            yield tensor, tensor.units


def _listed(items: Sequence[object], total: int) -> str:
    more = f" and {total - len(items):,} more" if total > len(items) else ""
    return ", ".join(map(str, items)) + more


# -- broken values --------------------------------------------------------------------------------


@rule("W101", "non-finite", Severity.CRITICAL)
def non_finite(examined: Examined) -> Iterator[Observation]:
    """NaN or Inf among the elements of a tensor.

    One NaN makes every output NaN that it reaches. -Inf alone in a mask that was saved with the
    model is what masks are made of: info.
    """
    for tensor, s in _measured(examined):
        bad = s.nan_count + s.posinf_count + s.neginf_count
        if not bad:
            continue
        mask = tensor.role is Role.BUFFER and bad == s.neginf_count
        where = _listed([list(e.index) for e in tensor.nonfinite[:3]], bad)
        yield Observation(
            tensor.name,
            f"{bad:,} of {s.count:,} elements are not finite ({s.nan_count:,} NaN, "
            f"{s.posinf_count:,} +Inf, {s.neginf_count:,} -Inf), at {where}",
            "do not use this file; go back to the last checkpoint without them and look at the "
            "loss scale and the gradients of the steps after it",
            {
                "nan_count": s.nan_count,
                "posinf_count": s.posinf_count,
                "neginf_count": s.neginf_count,
                "affected_fraction": bad / s.count,
            },
            threshold=0,
            severity=Severity.INFO if mask else None,
        )


@rule("W102", "extreme-value", Severity.HIGH)
def extreme_value(
    examined: Examined,
    *,
    peak_ratio: float = 1e4,
    magnitude: float = 1e6,
    gap: float = 100.0,
    gap_elsewhere: float = 1e4,
    score: float = 50.0,
    least: int = 1000,
) -> Iterator[Observation]:
    """A few elements stand so far out that storage or conversion must have damaged them.

    A flipped exponent bit multiplies a value by 2^16 (float16) to 2^128. Three signs: the peak
    ratio (greatest robust score over that of as many Gaussian values) above 1e4, where the
    greatest of 113 healthy matrices measured 37 and of small audio convolutions 689; a magnitude
    above 1e6 in a weight, a thousand times what a survey of eight released models found (aprender
    #2039); or a gap: the farthest elements lie 100 times (outside matrices 1e4 times) farther out
    than the next, alone. Mantissa and sign flips leave no such trace: only a hash finds those.
    """
    for tensor, s, outliers in _with_outliers(examined):
        if tensor.role in (Role.OPTIMIZER, Role.BUFFER, Role.COUNTER):
            continue
        limit = gap if tensor.role in MATRICES else gap_elsewhere
        apart, widest = _gap(outliers, score)
        reasons = []
        enough = tensor.numel >= least and tensor.role is not Role.RUNNING_VAR
        if enough and (outliers.peak_ratio or 0) > peak_ratio:
            reasons.append(f"a peak ratio of {outliers.peak_ratio:.3g}")
        if (s.abs_max or 0) > magnitude and tensor.role in MATRICES | GAINS | {Role.BIAS}:
            reasons.append(f"a magnitude of {s.abs_max:.3g}")
        if widest > limit:
            reasons.append(f"{widest:.3g} times farther out than the next")
        if reasons:
            yield _extreme(tensor, s, outliers, reasons, limit, apart)


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
        f"compare the file's hash with its source; if it agrees, look at how {tensor.dtype} values "
        f"were converted or scaled, and at {place} in an earlier checkpoint",
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


@rule("W103", "all-zero", Severity.HIGH)
def all_zero(examined: Examined) -> Iterator[Observation]:
    """Every element of a tensor is zero.

    A matrix of zeros passes nothing on; it is what is left of a failed download or save
    (aprender #2337: 27 of 339 tensors of a cached file). Zero biases, zero-initialised gains, the
    B of an untrained LoRA adapter and tables of one row (RoBERTa's token types) are ordinary: info.
    """
    for tensor, s in _measured(examined):
        if s.zero_count < s.count or tensor.role in AUXILIARY:
            continue
        matrix = tensor.role in (MATRICES | {Role.QUANTIZED}) - {Role.LORA_B}
        matrix = matrix and not (tensor.role in TABLES and tensor.shape[0] == 1)
        yield Observation(
            tensor.name,
            f"all {s.count:,} elements are zero",
            "load the tensor from the source again or retrain the layer"
            if matrix
            else "nothing to do if the layer was meant to start from zero and was not trained",
            {"zero_count": s.zero_count, "affected_fraction": 1.0},
            severity=None if matrix else Severity.INFO,
        )


@rule("W104", "constant-tensor", Severity.MEDIUM)
def constant_tensor(examined: Examined, *, least: int = 16) -> Iterator[Observation]:
    """All elements of a matrix have one value other than zero: its rows cannot differ.

    Vectors are often constant when they were not trained: info. Norm gains are judged by
    `untrained`, zeros by `all-zero`.
    """
    for tensor, s in _measured(examined):
        constant = s.count >= least and s.min is not None and s.min == s.max != 0
        if not constant or tensor.role in GAINS | AUXILIARY or s.finite_count < s.count:
            continue
        yield Observation(
            tensor.name,
            f"all {s.count:,} elements are {s.min:.6g}",
            "check that this tensor was loaded and trained",
            {"value": float(s.min or 0), "affected_fraction": 1.0},
            severity=None if tensor.role in MATRICES else Severity.INFO,
        )


# -- units ----------------------------------------------------------------------------------------


@rule("W105", "dead-units", Severity.HIGH)
def dead_units(
    examined: Examined, *, high: float = 0.30, medium: float = 0.10
) -> Iterator[Observation]:
    """Rows (output units, filters) whose L2 norm is below 1e-3 of the tensor's median row norm.

    They pass nothing on. Some are normal under batch norm: 29 of 106 convolutions of healthy
    mobile nets had a few, so below 10 % is info, to 30 % medium. Rows of embeddings belong to
    `undertrained-rows` until they are more than 30 %.
    """
    for tensor, units in _with_units(examined, MATRICES):
        share = units.dead_rows / units.rows
        if not units.dead_rows or units.rows < 2 or (tensor.role in TABLES and share <= high):
            continue
        severity = None if share > high else Severity.MEDIUM if share > medium else Severity.INFO
        yield Observation(
            tensor.name,
            f"{units.dead_rows:,} of {units.rows:,} rows are dead ({share:.1%}): "
            f"{_listed(units.dead, units.dead_rows)}",
            "prune them, or if the model is still to be trained: lower the learning rate, check "
            "the initialisation, use an activation that does not saturate at zero",
            {
                "dead_rows": units.dead_rows,
                "rows": units.rows,
                "median_row_norm": units.norm_median,
                "affected_fraction": share,
            },
            threshold=high if severity is None else medium,
            severity=severity,
        )


@rule("W106", "duplicate-units", Severity.MEDIUM)
def duplicate_units(
    examined: Examined, *, medium: float = 0.10, least_numel: int = 8
) -> Iterator[Observation]:
    """Rows that repeat an earlier row bit by bit, rows of zeros aside.

    Equal units compute the same and stay equal under equal gradients; trained rows of eight or
    more elements do not coincide by chance. Up to 10 % is info.
    """
    for tensor, units in _with_units(examined, MATRICES - TABLES):
        if not units.duplicate_rows or tensor.row_numel < least_numel:
            continue
        share = units.duplicate_rows / units.rows
        first, second = units.duplicates[0]
        yield Observation(
            tensor.name,
            f"{units.duplicate_rows:,} of {units.rows:,} rows repeat an earlier one "
            f"({share:.1%}); row {second} equals row {first}",
            "break the symmetry with a random initialisation, or merge the units",
            {
                "duplicate_rows": units.duplicate_rows,
                "rows": units.rows,
                "affected_fraction": share,
            },
            threshold=medium,
            severity=None if share > medium else Severity.INFO,
        )


@rule("W114", "undertrained-rows", Severity.MEDIUM)
def undertrained_rows(examined: Examined, *, medium: float = 0.20) -> Iterator[Observation]:
    """Rows of an embedding that training hardly touched: nearly zero, or equal to another.

    Reserved and padding tokens are such rows in most released models (Land and Bartolo 2024,
    arXiv 2405.05417); a prompt that reaches one gives undefined output. Above 20 %: medium.
    """
    for tensor, units in _with_units(examined, TABLES):
        found = units.dead_rows + units.duplicate_rows
        if not found or units.rows < 16:
            continue
        share = found / units.rows
        rows = sorted({*units.dead, *(second for _, second in units.duplicates)})[:10]
        yield Observation(
            tensor.name,
            f"{found:,} of {units.rows:,} rows look untrained ({share:.1%}; {units.dead_rows:,} "
            f"nearly zero, {units.duplicate_rows:,} equal to another): {_listed(rows, found)}",
            "keep these token ids out of prompts and of the tokenizer's special tokens",
            {
                "dead_rows": units.dead_rows,
                "duplicate_rows": units.duplicate_rows,
                "rows": units.rows,
                "affected_fraction": share,
            },
            threshold=medium,
            severity=None if share > medium else Severity.INFO,
        )


# -- the shape of the distribution ----------------------------------------------------------------

_SHAPED = frozenset({Role.LINEAR, Role.CONV, Role.DEPTHWISE, Role.RECURRENT, Role.EXPERTS})


@rule("W107", "heavy-tails", Severity.MEDIUM)
def heavy_tails(
    examined: Examined, *, limit: float = 10.0, depthwise: float = 25.0, least: int = 1000
) -> Iterator[Observation]:
    """The bulk of a matrix has far heavier tails than a Gaussian.

    Judged on the kurtosis without the 0.1 % farthest elements, because one super weight makes
    the plain kurtosis of a healthy matrix 1,582 and the trimmed one 0.5. Healthy matrices
    measured at most 3.6, convolutions 3.1 (90 %), depthwise ones 16.6. Calibrated.
    """
    for tensor, s in _measured(examined, _SHAPED):
        bound = depthwise if tensor.role is Role.DEPTHWISE else limit
        if s.count < least or s.trimmed_kurtosis is None or s.trimmed_kurtosis <= bound:
            continue
        yield Observation(
            tensor.name,
            f"trimmed excess kurtosis {s.trimmed_kurtosis:.3g} "
            f"(plain {s.kurtosis or math.nan:.3g}; a Gaussian has 0)",
            "quantise this tensor by row or group, not with one scale; if training is under way, "
            "look for spikes in its gradients",
            {"trimmed_kurtosis": s.trimmed_kurtosis, "kurtosis": s.kurtosis or math.nan},
            threshold=bound,
        )


@rule("W108", "skewed", Severity.LOW)
def skewed(examined: Examined, *, limit: float = 2.0, least: int = 1000) -> Iterator[Observation]:
    """A matrix leans to one side: |skewness| without the 0.1 % farthest elements above 2.

    Also above six standard errors, sqrt(6 / n), so that few elements are no evidence. Matrices
    that may not be negative (a metric's weights) lean by design.
    """
    for tensor, s in _measured(examined, _SHAPED):
        if s.count < least or s.trimmed_skewness is None or (s.min or 0) >= 0:
            continue
        if abs(s.trimmed_skewness) > max(limit, 6 * math.sqrt(6 / s.count)):
            yield Observation(
                tensor.name,
                f"trimmed skewness {s.trimmed_skewness:.3g}",
                "check for a missing normalisation before this layer, or a weight constraint",
                {"trimmed_skewness": s.trimmed_skewness},
                threshold=limit,
            )


@rule("W109", "outliers", Severity.MEDIUM)
def outliers(
    examined: Examined,
    *,
    peak_ratio: float = 50.0,
    extreme: float = 1e4,
    least: int = 1000,
    score: float = 20.0,
    least_tensors: int = 3,
) -> Iterator[Observation]:
    """Single weights far beyond the rest of their matrix, and dimensions where they repeat.

    The peak ratio is the greatest robust score over sqrt(2 ln n), which is 1 for a Gaussian of
    any size; the greatest of 113 healthy matrices was 37, and from 1e4 on it is `extreme-value`
    that speaks. Outliers in one and the same row or
    column of three or more layers are a feature of trained transformers (Kovaleva et al. 2021,
    arXiv 2105.06990; Yu et al. 2024, arXiv 2411.07191): info, and worth keeping when quantising.
    """
    for tensor, _, found in _with_outliers(examined, MATRICES - TABLES):
        if tensor.numel >= least and peak_ratio < (found.peak_ratio or 0) <= extreme:
            peak = found.top[0]
            yield Observation(
                tensor.name,
                f"element {list(peak.index)} = {peak.value:.4g} is {peak.score:.4g} robust "
                f"deviations out, {found.peak_ratio:.3g} times what {tensor.numel:,} Gaussian "
                "values reach",
                "keep it in high precision when quantising; a single scale for the tensor would "
                "spend its range on it",
                {
                    "peak_ratio": found.peak_ratio or math.nan,
                    "value": peak.value,
                    "above_10": found.counts["10"],
                },
                threshold=peak_ratio,
            )
    yield from _shared_dimensions(examined, score, least_tensors)


def _shared_dimensions(examined: Examined, score: float, least: int) -> Iterator[Observation]:
    """Rows or columns of equally long dimensions that hold far elements in several layers."""
    tensors: dict[tuple[str, str, int, int], list[str]] = defaultdict(list)
    for tensor, _, found in _with_outliers(examined, {Role.LINEAR, Role.EXPERTS}):
        far = [e for e in found.top if e.score is not None and e.score > score]
        for axis, kind in ((-2, "row"), (-1, "column")):
            for index in {e.index[axis] for e in far if len(e.index) >= 2}:
                key = (_pattern(tensor.name), kind, tensor.shape[axis], index)
                tensors[key].append(tensor.name)
    for (pattern, kind, length, index), names in tensors.items():
        if len(names) >= least:
            yield Observation(
                f"{pattern}[{kind} {index}]",
                f"{kind} {index} of {length} holds outliers in {len(names)} tensors: "
                f"{_listed(names[:4], len(names))}",
                "a feature of many trained models; keep this dimension in high precision when "
                "quantising",
                {kind: index, "tensors": len(names)},
                threshold=score,
                severity=Severity.INFO,
            )


def _pattern(name: str) -> str:
    """A name with its layer numbers taken out: what the layers of a stack share."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)


@rule("W110", "high-sparsity", Severity.LOW)
def high_sparsity(examined: Examined, *, limit: float = 0.5) -> Iterator[Observation]:
    """More than half of a matrix is exactly zero, outside rows that are dead as a whole.

    Pruning does this on purpose; otherwise it is underflow, or a mask saved as a weight.
    """
    for tensor, units in _with_units(examined, _SHAPED | TABLES):
        s = tensor.statistics
        alive = units.rows - units.dead_rows
        if s is None or not alive:
            continue
        zeros = max(0, s.zero_count - units.dead_rows * tensor.row_numel)
        share = zeros / (alive * tensor.row_numel)
        if share > limit:
            yield Observation(
                tensor.name,
                f"{share:.1%} of the elements of its live rows are exactly zero",
                "store it sparse if it was pruned; if not, look for underflow in the conversion",
                {"zero_fraction": s.zero_fraction or 0.0, "live_zero_fraction": share},
                threshold=limit,
            )


# -- training state -------------------------------------------------------------------------------


@rule("W111", "negative-variance", Severity.HIGH)
def negative_variance(examined: Examined) -> Iterator[Observation]:
    """A running variance or a second moment is below zero, which no average of squares can be.

    Its square root is NaN at inference (detectron2 #2413).
    """
    second = r"(exp_avg_sq|square_avg)$"
    for tensor, s in _measured(examined):
        if tensor.role is not Role.RUNNING_VAR and not re.search(second, tensor.name):
            continue
        if s.min is not None and s.min < 0:
            yield Observation(
                tensor.name,
                f"its least element is {s.min:.6g}; a variance cannot be negative",
                "estimate the statistics again on training data; look for a wrong tensor order in "
                "a conversion",
                {"min": float(s.min), "affected_fraction": 1.0},
                threshold=0,
            )


@rule("W112", "untrained", Severity.HIGH)
def untrained(examined: Examined) -> Iterator[Observation]:
    """Norms or adapters that are exactly as they were initialised.

    High where the checkpoint says it itself: batch norms with unit gain, mean 0 and variance 1
    whose `num_batches_tracked` is 0, or unit norms beside a step count of 0. Unit norm gains
    without such a witness, and LoRA adapters whose B is zero throughout, are info; a B that is
    zero in some modules only is medium.
    """
    yield from _untrained_batch_norms(examined)
    yield from _untrained_norms(examined)
    yield from _untrained_adapters(examined)


def _is(tensor: TensorResult | None, value: float) -> bool:
    s = tensor.statistics if tensor is not None else None
    return s is not None and s.min == s.max == value and s.finite_count == s.count > 0


def _untrained_batch_norms(examined: Examined) -> Iterator[Observation]:
    for tensor, _ in _measured(examined, {Role.RUNNING_VAR}):
        module, _leaf = split(tensor.name)
        mean = examined.by_name.get(f"{module}.running_mean")
        batches = examined.by_name.get(f"{module}.num_batches_tracked")
        if _is(tensor, 1) and _is(mean, 0) and _is(batches, 0):
            yield Observation(
                module,
                "this batch norm has seen no batch: mean 0, variance 1, num_batches_tracked 0",
                "load the trained checkpoint, or train; in evaluation mode this layer does not "
                "normalise anything",
                {"num_batches_tracked": 0, "affected_fraction": 1.0},
            )


def _untrained_norms(examined: Examined) -> Iterator[Observation]:
    gains = [t for t, _ in _measured(examined, {Role.NORM_GAIN}) if t.numel > 1]
    untouched = [t for t in gains if _is(t, 1) or (_is(t, 0) and len(gains) > 1)]
    if not untouched:
        return
    steps = _step_count(examined)
    subject = untouched[0].name if len(untouched) == 1 else _common(untouched)
    yield Observation(
        subject,
        f"{len(untouched)} of {len(gains)} norm gains are exactly as initialised"
        + ("" if steps is None else f", in a checkpoint of step {steps}"),
        "load the trained checkpoint, or train"
        if steps == 0
        else "nothing to do if these norms were frozen or folded into the next layer",
        {"untouched": len(untouched), "norm_gains": len(gains)}
        | ({} if steps is None else {"step": steps}),
        severity=None if steps == 0 else Severity.INFO,
    )


def _common(tensors: Sequence[TensorResult]) -> str:
    patterns = dict.fromkeys(_pattern(t.name) for t in tensors)
    return next(iter(patterns)) + (f" (+{len(patterns) - 1} more)" if len(patterns) > 1 else "")


def _step_count(examined: Examined) -> int | None:
    for name in ("global_step", "step", "steps", "iteration", "iter", "num_updates"):
        value = examined.checkpoint.metadata.get(name)
        if isinstance(value, str) and value.isdigit():
            return int(value)
        if isinstance(value, int) and not isinstance(value, bool):
            return value
        tensor = examined.by_name.get(name)
        if tensor is not None and tensor.numel == 1 and tensor.statistics is not None:
            return int(tensor.statistics.min or 0)
    return None


def _untrained_adapters(examined: Examined) -> Iterator[Observation]:
    adapters = [t for t, _ in _measured(examined, {Role.LORA_B})]
    zero = [t for t in adapters if _is(t, 0)]
    if zero:
        everywhere = len(zero) == len(adapters)
        yield Observation(
            _common(zero),
            f"B is zero in {len(zero)} of {len(adapters)} LoRA adapters: "
            + ("the adapter changes nothing" if everywhere else "these were not trained"),
            "train the adapter"
            if everywhere
            else "check that these modules received gradients (target modules, frozen layers)",
            {"zero_adapters": len(zero), "adapters": len(adapters)},
            severity=Severity.INFO if everywhere else Severity.MEDIUM,
        )


@rule("W113", "duplicate-tensors", Severity.MEDIUM)
def duplicate_tensors(examined: Examined, *, least: int = 64) -> Iterator[Observation]:
    """Matrices of different layers that are equal bit by bit.

    Two layers do not train to the same weights: one was copied over the other, by a merge, a
    wrong conversion or a failed restart. Equal embeddings and output layers are tied weights
    saved twice: info.
    """
    groups: dict[str, list[TensorResult]] = defaultdict(list)
    for tensor, s in _measured(examined, MATRICES | {Role.QUANTIZED}):
        if tensor.content_hash and tensor.numel >= least and s.min != s.max:
            groups[tensor.content_hash].append(tensor)
    copies: dict[tuple[str, str], list[tuple[TensorResult, TensorResult]]] = defaultdict(list)
    for original, *others in groups.values():
        for other in others:
            copies[_differing(original.name, other.name)].append((original, other))
    for (first, second), pairs in copies.items():
        yield _copied(first, second, pairs)


def _copied(
    first: str, second: str, pairs: Sequence[tuple[TensorResult, TensorResult]]
) -> Observation:
    tied = all(t.role in TABLES for pair in pairs for t in pair)
    original, copy = pairs[0]
    return Observation(
        copy.name,
        f"{copy.name} equals {original.name}"
        if len(pairs) == 1
        else f"{len(pairs)} matrices of {second} equal those of {first}, e.g. {copy.name}",
        "store tied weights once"
        if tied
        else "compare with the source of the checkpoint; retrain or restore the copied layer",
        {"equal_tensors": len(pairs), "original": original.name, "affected_fraction": 1.0},
        severity=Severity.INFO if tied else None,
    )


def _differing(first: str, second: str) -> tuple[str, str]:
    """The parts of two names up to where they last differ: the layers they are of."""
    a, b = first.split("."), second.split(".")
    while len(a) > 1 and len(b) > 1 and a[-1] == b[-1]:
        a, b = a[:-1], b[:-1]
    return ".".join(a), ".".join(b)


# -- numerics -------------------------------------------------------------------------------------


def _with_numerics(
    examined: Examined, roles: Iterable[Role] | None = None
) -> Iterator[tuple[TensorResult, Statistics, Numerics]]:
    for tensor, s in _measured(examined, roles):
        if tensor.numerics is not None:
            yield tensor, s, tensor.numerics


@rule("W115", "dtype-headroom", Severity.MEDIUM)
def dtype_headroom(
    examined: Examined,
    *,
    headroom_bits: float = 1.0,
    saturated: float = 1e-3,
    subnormal: float = 0.01,
) -> Iterator[Observation]:
    """The values crowd an end of their type's range.

    Less than one doubling below the greatest finite value (float16: above 32,752) overflows at
    the next update; more than 0.1 % of elements at the greatest value of an 8-bit float were cut
    off by their scale; more than 1 % subnormal elements have lost precision (low).
    """
    for tensor, s, numerics in _with_numerics(examined):
        if is_narrow(tensor.dtype):
            share = numerics.saturated_fraction or 0.0
            if tensor.dtype.startswith("F8") and share > saturated:
                yield Observation(
                    tensor.name,
                    f"{share:.2%} of elements are at the greatest value of {tensor.dtype}",
                    "recompute the scale from the greatest magnitude, by row or block",
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
        if share > subnormal and s.count >= 256 and tensor.role not in AUXILIARY:
            yield Observation(
                tensor.name,
                f"{share:.1%} of elements are subnormal in {tensor.dtype}: they keep fewer bits "
                "than the rest, and flush to zero on some devices",
                "store it in BF16 or F32",
                {"subnormal_fraction": share},
                subnormal,
                Severity.LOW,
            )


@rule("W116", "redundant-precision", Severity.INFO)
def redundant_precision(examined: Examined, *, least: int = 256) -> Iterator[Observation]:
    """Float32 tensors whose values all fit a 16-bit type without loss: half the bytes are zeros."""
    for payload in ("BF16", "F16"):
        found = [
            t
            for t, s, n in _with_numerics(examined)
            if n.payload == payload and t.numel >= least and s.min != s.max
        ]
        if found:
            saved = sum(t.numel for t in found) * 2
            yield Observation(
                _common(found),
                f"{len(found)} F32 tensors hold {payload} values: {saved:,} bytes carry nothing",
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


@rule("W117", "scale-missing", Severity.HIGH)
def scale_missing(examined: Examined, *, scaled_from: float = 16.0) -> Iterator[Observation]:
    """A quantised weight has no scale, or one that is not positive, not finite or misshapen.

    Loaders leave an absent scale uninitialised and compute on (vLLM #57108). An 8-bit float
    weight whose values stay below 16 beside no scale anywhere was cast, not scaled: info.
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
        return f"has elements that are not positive (least {s.min:.6g})"
    if weight.role is Role.QUANTIZED and not _grid_fits(scale.shape, weight.shape):
        return f"has shape {list(scale.shape)}, which divides {list(weight.shape)} into no blocks"
    return ""


def _grid_fits(scale: Sequence[int], weight: Sequence[int]) -> bool:
    """Whether a scale's shape is one value, one a row, or a grid of equal blocks of a weight."""
    if math.prod(scale) == 1 or list(scale) == [weight[0]]:
        return True
    if len(scale) != len(weight):
        return False
    return all(0 < n <= m and -(-m // -(-m // n)) == n for n, m in zip(scale, weight, strict=True))
