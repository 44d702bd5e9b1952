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
from gradscope.weights.rules.tensors import SHAPED, measured, with_outliers, with_units


@rule("W107", "heavy-tails", Severity.MEDIUM, reads=Examined, needs=Need.STATISTICS)
def heavy_tails(
    examined: Examined, *, limit: float = 10.0, depthwise: float = 25.0, least: int = 1000
) -> Iterator[Observation]:
    """The bulk of a matrix has far heavier tails than a Gaussian.

    Judged on the kurtosis without the 0.1 % farthest elements, because a single super weight
    can give a healthy matrix a plain kurtosis of 1,582 (trimmed: 0.5). Healthy matrices
    measured at most 3.6, convolutions 3.1 (90 %), depthwise ones 16.6. Calibrated.
    """
    for tensor, s in measured(examined, SHAPED):
        bound = depthwise if tensor.role is Role.DEPTHWISE else limit
        if s.count < least or s.trimmed_kurtosis is None or s.trimmed_kurtosis <= bound:
            continue
        yield Observation(
            tensor.name,
            f"trimmed excess kurtosis {s.trimmed_kurtosis:.3g} "
            f"(plain {s.kurtosis or math.nan:.3g}; a Gaussian has 0)",
            "quantise this tensor per row or group, not with a single scale; if training goes on, "
            "look for spikes in its gradients",
            {"trimmed_kurtosis": s.trimmed_kurtosis, "kurtosis": s.kurtosis or math.nan},
            threshold=bound,
        )


@rule("W108", "skewed", Severity.LOW, reads=Examined, needs=Need.STATISTICS)
def skewed(examined: Examined, *, limit: float = 2.0, least: int = 1000) -> Iterator[Observation]:
    """A matrix is skewed: |skewness| without the 0.1 % farthest elements above 2.

    It must also exceed six standard errors, 6 sqrt(6 / n), so that a few elements prove nothing.
    Matrices that cannot be negative (the weights of a metric) are skewed by design.
    """
    for tensor, s in measured(examined, SHAPED):
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


@rule("W109", "outliers", Severity.MEDIUM, reads=Examined, needs=Need.STATISTICS)
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
    any size; the greatest of 113 healthy matrices was 37; above 1e4 it is `extreme-value`. Outliers
    in the same row or column of three or more layers are a feature of trained transformers
    (Kovaleva et al. 2021, arXiv 2105.06990; Yu et al. 2024, arXiv 2411.07191): info, and worth
    keeping when quantising.
    """
    for tensor, _, found in with_outliers(examined, MATRICES - TABLES):
        if tensor.numel >= least and peak_ratio < (found.peak_ratio or 0) <= extreme:
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


@rule("W110", "high-sparsity", Severity.LOW, reads=Examined, needs=Need.STATISTICS)
def high_sparsity(examined: Examined, *, limit: float = 0.5) -> Iterator[Observation]:
    """More than half of a matrix is exactly zero, not counting rows that are entirely dead.

    Pruning does this on purpose; otherwise it is underflow, or a mask saved as a weight. Codes of
    three bits and fewer are left out: most of them are zero.
    """
    for tensor, units in with_units(examined, SHAPED | TABLES):
        if tensor.dequantized and (tensor.dequantized.bits or 8) <= 3:
            continue
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
                "store it as sparse if it was pruned; otherwise look for underflow in a conversion",
                {"zero_fraction": s.zero_fraction or 0.0, "live_zero_fraction": share},
                threshold=limit,
            )
