"""The rules of ``gradscope explain``; importing this registers them."""

from __future__ import annotations

import math
from collections.abc import Iterator

from gradscope.attribution.result import Control, ExplainResult, Explanation, Need
from gradscope.report.rules import Observation, Unknown, rule
from gradscope.report.severity import Severity


@rule(
    "E101", "incomplete-attribution", Severity.MEDIUM, reads=ExplainResult, needs=Need.COMPLETENESS
)
def incomplete_attribution(
    result: ExplainResult, *, tolerance: float = 0.05, gross: float = 0.2
) -> Iterator[Observation | Unknown]:
    """An attribution's sum is not what the score changed by between reference and image.

    Integrated gradients must add up (Sundararajan et al. 2017, completeness). Where they do not,
    the path was sampled too coarsely: medium above ``tolerance`` of the change, high above
    ``gross``. A relative delta is undefined where the score does not change at all.
    """
    for e in result.explanations:
        delta, share = e.diagnostics.completeness_delta, e.diagnostics.relative_delta
        if delta is None:
            continue
        if share is None:
            yield Unknown(f"{e.subject}: the score does not change from the reference")
        elif not share <= tolerance:
            yield Observation(
                e.subject,
                f"the attribution's sum misses the change of the score by {share:.1%} "
                f"({delta:+.3g})",
                "refine: --steps 256, or --tolerance 0.01, which doubles the steps until it is met",
                {"relative_delta": share, "completeness_delta": delta},
                threshold=tolerance,
                severity=Severity.MEDIUM if share <= gross else Severity.HIGH,
            )


@rule("E102", "degenerate-map", Severity.MEDIUM, reads=ExplainResult, needs=Need.MAPS)
def degenerate_map(result: ExplainResult, *, rounding: float = 1e-6) -> Iterator[Observation]:
    """A map says nothing: it is not finite (critical), zero, constant, or nowhere positive.

    A map without a positive value is a result, "nothing at this layer speaks for the target", but
    its picture is empty. A range below ``rounding`` of the greatest magnitude is constant: bilinear
    upsampling in float32 leaves as much of a constant map.
    """
    for e in result.explanations:
        low, high, total = e.map.min, e.map.max, e.map.sum
        facts = {"min": low, "max": high}
        if not (math.isfinite(low) and math.isfinite(high) and math.isfinite(total)):
            yield Observation(
                e.subject,
                "the map holds NaN or infinity",
                "look for NaN in the weights (gradscope weights), or run the model in float32",
                facts,
                severity=Severity.CRITICAL,
            )
        elif high - low <= rounding * max(abs(low), abs(high)):
            what = "zero everywhere" if high == 0 else f"{high:.3g} everywhere"
            yield Observation(e.subject, f"the map is {what}", _elsewhere(e), facts)
        elif high <= 0 and e.sign == "positive":
            yield Observation(
                e.subject,
                f"nothing speaks for the target: the map's greatest value is {high:.3g}",
                _elsewhere(e),
                facts,
                threshold=0.0,
            )


def _elsewhere(e: Explanation) -> str:
    if e.layer is not None:
        return (
            f"layer {e.layer} may get no gradient or see nothing of the target: try another "
            "--layer (see `gradscope layers`), another --target, or integrated-gradients"
        )
    return "try another --target, or a CAM method; a saturated or dead model gives such maps, too"


@rule("E103", "unfaithful", Severity.MEDIUM, reads=ExplainResult, needs=Need.EVALUATION)
def unfaithful(result: ExplainResult, *, spreads: float = 2.0) -> Iterator[Observation | Unknown]:
    """A map ranks pixels no better than the same map at random places.

    Showing its strongest pixels first should raise the target's probability sooner, hiding them
    should lower it sooner (Petsiuk et al. 2018). Medium when neither is better than the control;
    high when both are worse by more than ``spreads`` standard deviations of it.
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
        yield Observation(
            e.subject,
            f"insertion {insertion:.3f} (at random places {control.insertion_auc:.3f}), deletion "
            f"{deletion:.3f} ({control.deletion_auc:.3f}): the map finds nothing that matters",
            "do not rely on it; compare with integrated-gradients or rise, and look at the target",
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
    """How much better than the control, in its spreads (at least a thousandth)."""
    return (
        (insertion - control.insertion_auc) / max(control.insertion_spread, 1e-3),
        (control.deletion_auc - deletion) / max(control.deletion_spread, 1e-3),
    )


@rule("E104", "sanity-check-failed", Severity.MEDIUM, reads=ExplainResult, needs=Need.EVALUATION)
def sanity_check_failed(
    result: ExplainResult, *, correlation: float = 0.5
) -> Iterator[Observation | Unknown]:
    """A map hardly changes when the model's parameters are drawn anew.

    What does not depend on the parameters shows the image, not the model (Adebayo et al. 2018).
    The least rank correlation of magnitudes over the last half of the cascade counts, for a small
    map may be alike once by chance. guided-backprop and deconvnet are known to fail.
    """
    for e in result.explanations:
        cascade = e.diagnostics.randomisation
        if not cascade:
            yield Unknown(f"{e.subject}: the model has no parameters that can be drawn anew")
            continue
        least = min(point.magnitude_correlation for point in cascade[len(cascade) // 2 :])
        if least >= correlation:
            yield Observation(
                e.subject,
                f"with random parameters the map stays alike (rank correlation {least:.2f})",
                "it shows the image's edges rather than the model's reasons; take gradcam or "
                "integrated-gradients",
                {"magnitude_correlation": least, "layers": len(cascade)},
                threshold=correlation,
            )


@rule("E105", "low-confidence", Severity.LOW, reads=ExplainResult, needs=Need.MAPS)
def low_confidence(result: ExplainResult, *, likely: float = 0.1) -> Iterator[Observation]:
    """The model does not believe in the class that is explained.

    Its probability is below ``likely``, so the map explains an answer that was not given. Often
    the target, the preprocessing or the image is another than was meant.
    """
    for e in result.explanations:
        probability = e.target.probability
        if probability < likely:
            yield Observation(
                e.subject,
                f"the model gives the target a probability of {probability:.2g}",
                "look at the predictions in the report: is it the class you meant, and are the "
                "preprocessing and the labels those of the model?",
                {"probability": probability},
                threshold=likely,
            )


@rule("E106", "assumed-preprocessing", Severity.LOW, reads=ExplainResult, needs=Need.MAPS)
def assumed_preprocessing(result: ExplainResult) -> Iterator[Observation]:
    """Nothing said how images become inputs, so ImageNet's normalisation was taken.

    With another the model sees wrong colours or sizes, and every map is about those.
    """
    if result.preprocessing.assumed:
        yield Observation(
            result.model.path,
            f"ImageNet's preprocessing is assumed ({', '.join(result.preprocessing.steps)})",
            "say it with --preprocess: imagenet, a preprocessor_config.json, or "
            "image_mean=…,image_std=…,size=…",
        )
