"""The rules of ``gradscope explain``; importing this registers them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from gradscope.attribution.methods import method_named
from gradscope.attribution.result import Control, ExplainResult, Explanation, Need
from gradscope.report.model import Fact
from gradscope.report.rules import Observation, Unknown, rule
from gradscope.report.severity import Severity


def _about(
    e: Explanation,
    message: str,
    recommendation: str,
    evidence: Mapping[str, Fact],
    *,
    threshold: float | None = None,
    severity: Severity | None = None,
) -> Observation:
    """An observation of one explanation, about its picture."""
    return Observation(
        e.subject, message, recommendation, evidence, threshold, severity, input=e.image
    )


@rule(
    "E101", "incomplete-attribution", Severity.MEDIUM, reads=ExplainResult, needs=Need.COMPLETENESS
)
def incomplete_attribution(
    result: ExplainResult, *, tolerance: float = 0.05, gross: float = 0.2
) -> Iterator[Observation | Unknown]:
    """An attribution's sum is not what the score changed by between reference and image.

    Integrated gradients must add up (Sundararajan et al. 2017, completeness). Where they do not,
    the path was sampled too coarsely: medium above ``tolerance`` of the change, high above
    ``gross``. Relevance must be conserved: what arrives at the pixels and at constants is the
    score. The relative delta is undefined where the score does not change at all.
    """
    for e in result.explanations:
        delta, share = e.diagnostics.completeness_delta, e.diagnostics.relative_delta
        if delta is None:
            continue
        if share is None:
            yield Unknown(f"{e.subject}: the score does not change from the reference")
        elif not share <= tolerance:
            yield _about(
                e,
                f"the attribution's sum misses the change of the score by {share:.1%} "
                f"({delta:+.3g})",
                method_named(e.method).refine,
                {"relative_delta": share, "completeness_delta": delta},
                threshold=tolerance,
                severity=Severity.MEDIUM if share <= gross else Severity.HIGH,
            )


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
            yield _about(
                e,
                "the map contains NaN or infinity",
                "check the weights for NaN (gradscope weights), or run the model in float32",
                facts,
                severity=Severity.CRITICAL,
            )
        elif high - low <= rounding * max(abs(low), abs(high)):
            what = "zero everywhere" if high == 0 else f"{high:.3g} everywhere"
            yield _about(e, f"the map is {what}", _elsewhere(e), facts)
        elif high <= 0 and e.sign == "positive":
            yield _about(
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


@rule("E103", "unfaithful", Severity.MEDIUM, reads=ExplainResult, needs=Need.EVALUATION)
def unfaithful(result: ExplainResult, *, spreads: float = 2.0) -> Iterator[Observation | Unknown]:
    """A map ranks pixels no better than the same map at random positions.

    Inserting its strongest pixels first should raise the target's probability sooner, deleting them
    should lower it sooner (Petsiuk et al. 2018). Medium when neither is better than the control;
    high when both are worse by more than ``spreads`` of its standard deviations.
    """
    for e in result.explanations:
        control = e.diagnostics.random_control
        insertion, deletion = e.diagnostics.insertion_auc, e.diagnostics.deletion_auc
        if control is None or insertion is None or deletion is None:
            yield Unknown(f"{e.subject}: insertion and deletion were not measured")
            continue
        gain, loss = _gains(insertion, deletion, control)
        if max(gain, loss) > 0:
            continue
        yield _about(
            e,
            f"insertion {insertion:.3f} (at random positions {control.insertion_auc:.3f}), "
            f"deletion {deletion:.3f} ({control.deletion_auc:.3f}): the map is no better than "
            "chance",
            "do not rely on it; compare with integrated-gradients or rise, and check the target",
            {
                "insertion_auc": insertion,
                "deletion_auc": deletion,
                "control_insertion_auc": control.insertion_auc,
                "control_deletion_auc": control.deletion_auc,
            },
            threshold=spreads,
            severity=Severity.HIGH if max(gain, loss) < -spreads else Severity.MEDIUM,
        )


def _gains(insertion: float, deletion: float, control: Control) -> tuple[float, float]:
    """How much better than the control, in its spreads (of at least a thousandth)."""
    return (
        (insertion - control.insertion_auc) / max(control.insertion_spread, 1e-3),
        (control.deletion_auc - deletion) / max(control.deletion_spread, 1e-3),
    )


@rule("E104", "sanity-check-failed", Severity.MEDIUM, reads=ExplainResult, needs=Need.EVALUATION)
def sanity_check_failed(
    result: ExplainResult, *, correlation: float = 0.5
) -> Iterator[Observation | Unknown]:
    """A map hardly changes when the model's parameters are randomised.

    A map that does not depend on the parameters shows the image, not the model (Adebayo et al.
    2018). The lowest rank correlation of magnitudes over the last half of the cascade counts, since
    a small map may be similar once by chance. guided-backprop and deconvnet are known to fail.
    """
    for e in result.explanations:
        cascade = e.diagnostics.randomisation
        if not cascade:
            yield Unknown(f"{e.subject}: the model has no parameters to randomise")
            continue
        least = min(point.magnitude_correlation for point in cascade[len(cascade) // 2 :])
        if least >= correlation:
            yield _about(
                e,
                f"with random parameters the map stays similar (rank correlation {least:.2f})",
                "it shows edges of the image rather than what the model uses; use gradcam or "
                "integrated-gradients",
                {"magnitude_correlation": least, "layers": len(cascade)},
                threshold=correlation,
            )


@rule("E105", "low-confidence", Severity.LOW, reads=ExplainResult, needs=Need.MAPS)
def low_confidence(result: ExplainResult, *, likely: float = 0.1) -> Iterator[Observation]:
    """The class that is explained is improbable to the model.

    Its probability is below ``likely``, so the map explains an answer that the model does not give.
    Often the target, the preprocessing or the image is not the intended one.
    """
    for e in result.explanations:
        probability = e.target.probability
        if probability < likely:
            yield _about(
                e,
                f"the model gives the target a probability of {probability:.2g}",
                "check the predictions in the report: is this the class you meant, and do the "
                "preprocessing and the labels belong to the model?",
                {"probability": probability},
                threshold=likely,
            )


@rule("E106", "assumed-preprocessing", Severity.LOW, reads=ExplainResult, needs=Need.MAPS)
def assumed_preprocessing(result: ExplainResult) -> Iterator[Observation]:
    """How images become inputs was not specified, or for which of several weights.

    ImageNet's preprocessing is assumed, or that of the weights that a library takes by default. If
    the model was trained with another, it sees wrong colours or sizes, and every map is about
    those.
    """
    steps = result.preprocessing
    if steps.assumed:
        known = steps.source != "assumed"
        what = f"the preprocessing of {steps.source}" if known else "ImageNet's preprocessing"
        others = "; other weights of that model have another" if known else ""
        yield Observation(
            result.model.path,
            f"{what} is assumed ({', '.join(steps.steps)}){others}",
            "specify it with --preprocess: imagenet, a preprocessor_config.json, or "
            "image_mean=…,image_std=…,size=…",
        )
