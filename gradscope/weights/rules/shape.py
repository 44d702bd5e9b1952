"""Rules about the shape of a matrix's distribution: tails, skew, outliers, sparsity."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator

from gradscope.report.rules import Observation, rule
from gradscope.report.severity import Severity
from gradscope.text import listed
from gradscope.weights.names import pattern
from gradscope.weights.result import Examined, Need
from gradscope.weights.roles import MATRICES, TABLES, Role
from gradscope.weights.rules.tensors import (
    SHAPED,
    measured,
    mostly_dead,
    with_outliers,
    with_units,
)


@rule("W107", "heavy-tails", Severity.INFO, reads=Examined, needs=Need.STATISTICS)
def heavy_tails(
    examined: Examined, *, limit: float = 10.0, depthwise: float = 25.0, least: int = 1000
) -> Iterator[Observation]:
    """The bulk of some matrices has far heavier tails than a Gaussian: for quantisation to know.

    Judged on the kurtosis without the 0.1 % farthest elements, because a single super weight
    can give a healthy matrix a plain kurtosis of 1,582 (trimmed: 0.5). It says nothing of health:
    the healthy models that the limits were set on reach 415 in the small convolutions of audio.
    One finding a model, which names the heaviest. Where more than 30 % of the units are dead, the
    living are far from the median: that is `dead-units` alone, as for `skewed` and `outliers`.
    """
    found = [
        (s.trimmed_kurtosis, s.kurtosis, t, depthwise if t.role is Role.DEPTHWISE else limit)
        for t, s in measured(examined, SHAPED)
        if s.count >= least and s.trimmed_kurtosis is not None and not mostly_dead(t)
    ]
    heavy = sorted((f for f in found if f[0] > f[-1]), key=lambda f: -f[0])
    if not heavy:
        return
    kurtosis, plain, worst, bound = heavy[0]
    shown = listed((f"{t.name} ({value:.3g})" for value, _, t, _ in heavy), len(heavy))
    yield Observation(
        worst.name,
        f"{len(heavy):,} of {len(found):,} matrices have heavy tails, by trimmed excess kurtosis "
        f"(a Gaussian has 0): {shown}",
        "nothing to do, unless you quantise: then per row or group, not with a single scale",
        {
            "trimmed_kurtosis": kurtosis,
            "kurtosis": plain or math.nan,
            "heavy_tensors": len(heavy),
            "tensors": len(found),
        },
        threshold=bound,
    )


@rule("W108", "skewed", Severity.LOW, reads=Examined, needs=Need.TENSOR)
def skewed(examined: Examined, *, limit: float = 2.0, least: int = 1000) -> Iterator[Observation]:
    """A matrix is skewed: |skewness| without the 0.1 % farthest elements above 2.

    Matrices that cannot be negative (the weights of a metric) are skewed by design.
    """
    for tensor, s in measured(examined, SHAPED):
        if s.count < least or s.trimmed_skewness is None or (s.min or 0) >= 0:
            continue
        if abs(s.trimmed_skewness) > limit and not mostly_dead(tensor):
            yield Observation(
                tensor.name,
                f"trimmed skewness {s.trimmed_skewness:.3g}",
                "check for a missing normalisation before this layer, or a weight constraint",
                {"trimmed_skewness": s.trimmed_skewness},
                threshold=limit,
            )


@rule("W109", "outliers", Severity.LOW, reads=Examined, needs=Need.STATISTICS)
def outliers(
    examined: Examined,
    *,
    peak_ratio: float = 50.0,
    extreme: float = 1e4,
    least: int = 1000,
    score: float = 20.0,
    least_tensors: int = 3,
) -> Iterator[Observation]:
    """Single weights far beyond the rest of their matrix, and dimensions where they recur.

    The peak ratio is the greatest robust score over sqrt(2 ln n), which is 1 for a Gaussian of
    any size; the greatest of 113 healthy matrices was 37, but that of working audio convolutions
    689, so it is for quantisation to know; above 1e4 it is `extreme-value`. Outliers in the same
    row or column of three or more layers are a feature of trained transformers (Kovaleva et al.
    2021, arXiv 2105.06990; Yu et al. 2024, arXiv 2411.07191): info.
    """
    for tensor, _, found in with_outliers(examined, MATRICES - TABLES):
        far = peak_ratio < (found.peak_ratio or 0) <= extreme
        if tensor.numel >= least and far and not mostly_dead(tensor):
            peak = found.top[0]
            yield Observation(
                tensor.name,
                f"element {list(peak.index)} = {peak.value:.4g} is {peak.score:.4g} robust "
                f"deviations out, {found.peak_ratio:.3g} times what {tensor.numel:,} Gaussian "
                "values reach",
                "keep it in high precision when quantising; a single scale for the tensor would "
                "waste its range on it",
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
    for tensor, _, found in with_outliers(examined, {Role.LINEAR, Role.EXPERTS}):
        if mostly_dead(tensor):
            continue
        far = [e for e in found.top if e.score is not None and e.score > score]
        for axis, kind in ((-2, "row"), (-1, "column")):
            for index in {e.index[axis] for e in far if len(e.index) >= 2}:
                key = (pattern(tensor.name), kind, tensor.shape[axis], index)
                tensors[key].append(tensor.name)
    for (stack, kind, length, index), names in tensors.items():
        if len(names) >= least:
            yield Observation(
                f"{stack}[{kind} {index}]",
                f"{kind} {index} of {length} holds outliers in {len(names)} tensors: "
                f"{listed(names, len(names), 4)}",
                "a feature of many trained models; keep this dimension in high precision when "
                "quantising",
                {kind: index, "tensors": len(names)},
                threshold=score,
                severity=Severity.INFO,
            )


@rule("W110", "high-sparsity", Severity.LOW, reads=Examined, needs=Need.TENSOR)
def high_sparsity(examined: Examined, *, limit: float = 0.5) -> Iterator[Observation]:
    """More than half of a matrix is exactly zero, not counting rows that are entirely dead.

    Pruning does this on purpose; otherwise it is underflow, or a mask saved as a weight. Codes of
    three bits and fewer are left out: most of them are zero.
    """
    for tensor, units in with_units(examined, (SHAPED | TABLES) - {Role.CODEBOOK}):
        if tensor.dequantized and (tensor.dequantized.bits or 8) <= 3:
            continue
        s = tensor.statistics
        alive = units.rows - units.dead_rows
        if s is None or not alive:
            continue
        zeros = max(0, s.zero_count - units.dead_rows * tensor.unit_numel)
        share = zeros / (alive * tensor.unit_numel)
        if share > limit:
            yield Observation(
                tensor.name,
                f"{share:.1%} of the elements of its live rows are exactly zero",
                "store it as sparse if it was pruned; otherwise look for underflow in a conversion",
                {"zero_fraction": s.zero_fraction or 0.0, "live_zero_fraction": share},
                threshold=limit,
            )
