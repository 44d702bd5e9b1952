"""What a map itself tells: whether it adds up, shows anything, and is of a likely class."""

from __future__ import annotations

import math
from collections.abc import Iterator

from gradscope.attribution.methods import method_named
from gradscope.attribution.result import ExplainResult, Explanation, Need
from gradscope.attribution.rules.about import about
from gradscope.report.rules import Observation, Unknown, rule
from gradscope.report.severity import Severity


@rule(
    "E101", "incomplete-attribution", Severity.MEDIUM, reads=ExplainResult, needs=Need.COMPLETENESS
)
def incomplete_attribution(
    result: ExplainResult, *, tolerance: float = 0.05, gross: float = 0.2, runaway: float = 10.0
) -> Iterator[Observation | Unknown]:
    """An attribution's sum is not what the score changed by between reference and image.

    Integrated gradients must add up (Sundararajan et al. 2017, completeness). Where they do not,
    the path was sampled too coarsely: medium above ``tolerance`` of the change, high above
    ``gross``. Relevance must be conserved: what arrives at the pixels and at constants is the
    score; more than ``runaway`` times of it missing or added means that it grew without bound. The
    relative delta is undefined where the score does not change at all.
    """
    for e in result.explanations:
        delta, share = e.diagnostics.completeness_delta, e.diagnostics.relative_delta
        if delta is None:
            continue
        if share is None:
            yield Unknown(f"{e.subject}: the score does not change from the reference")
        elif not share <= tolerance:
            grows = "relevance_of_constants" in e.diagnostics.method and share > runaway
            yield about(
                e,
                f"the attribution's sum misses the change of the score by {_of(share)} "
                f"({delta:+.3g})",
                _RUNAWAY if grows else method_named(e.method).refine,
                {"relative_delta": share, "completeness_delta": delta},
                threshold=tolerance,
                severity=Severity.MEDIUM if share <= gross else Severity.HIGH,
            )


_RUNAWAY = (
    "contributions cancel in this model (a sum of branches, a norm by itself), and relevance grows "
    "without bound: the map shows nothing; use integrated-gradients or deeplift"
)


def _of(share: float) -> str:
    return f"{share:.1%}" if share < 10 else f"{share:.3g} times of it"


@rule("E102", "degenerate-map", Severity.MEDIUM, reads=ExplainResult, needs=Need.MAPS)
def degenerate_map(result: ExplainResult, *, rounding: float = 1e-6) -> Iterator[Observation]:
    """A map shows nothing: it is not finite (critical), zero, constant, or nowhere positive.

    A map without a positive value is a result, "no evidence for the target at this layer", but its
    picture is empty. A range below ``rounding`` of the greatest magnitude counts as constant:
    bilinear upsampling in float32 makes as much of a constant map.
    """
    for e in result.explanations:
        low, high, total = e.map.min, e.map.max, e.map.sum
        facts = {"min": low, "max": high}
        if not (math.isfinite(low) and math.isfinite(high) and math.isfinite(total)):
            yield about(
                e,
                "the map contains NaN or infinity",
                "check the weights for NaN (gradscope weights), or run the model in float32",
                facts,
                severity=Severity.CRITICAL,
            )
        elif high - low <= rounding * max(abs(low), abs(high)):
            what = "zero everywhere" if high == 0 else f"{high:.3g} everywhere"
            yield about(e, f"the map is {what}", _elsewhere(e), facts)
        elif high <= 0 and e.sign == "positive":
            yield about(
                e,
                f"no evidence for the target: the map's greatest value is {high:.3g}",
                _elsewhere(e),
                facts,
                threshold=0.0,
            )


def _elsewhere(e: Explanation) -> str:
    if e.layer is not None:
        return (
            f"layer {e.layer} may get no gradient, or not respond to the target: try another "
            "--layer (see `gradscope layers`), another --target, or integrated-gradients"
        )
    return "try another --target, or a CAM method; saturated or dead models give such maps too"


@rule("E105", "low-confidence", Severity.LOW, reads=ExplainResult, needs=Need.MAPS)
def low_confidence(
    result: ExplainResult, *, likely: float = 0.1
) -> Iterator[Observation | Unknown]:
    """The class that is explained is improbable to the model.

    Its probability is below ``likely``, so the map explains an answer that the model does not give.
    Often the target, the preprocessing or the image is not the intended one.
    """
    for e in result.explanations:
        probability = e.target.probability
        if probability is None:
            yield Unknown(f"{e.subject}: the model gives no probabilities")
        elif probability < likely:
            yield about(
                e,
                f"the model gives the target a probability of {probability:.2g}",
                "check the predictions in the report: is this the class you meant, and do the "
                "preprocessing and the labels belong to the model?",
                {"probability": probability},
                threshold=likely,
            )
